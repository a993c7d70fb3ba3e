"""From a model of others to a run of ours and back: import, tokenize, train, export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llm_dist import config
from llm_dist.data.opening import open_reading
from tests import hugging_face_tokenizers as makers
from tests.e2e.commands import llm_dist, losses

pytestmark = pytest.mark.e2e

SMALLER = (
    "run.steps=3",
    "data.sequence_tokens=32",
    "batch.tokens_per_step=128",
    "batch.sequences_per_micro_batch=4",
    "optim.warmup_steps=0",
    "engine.precision=fp32",
    "engine.compile=off",
    "log.every_steps=1",
    "log.sinks=[]",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of theirs and its tokenizer."""
    transformers = pytest.importorskip("transformers", reason="needs the extra llm_dist[hf]")
    folder = tmp_path_factory.mktemp("theirs") / "tiny-llama"
    makers.llama(folder)
    shape = transformers.LlamaConfig(
        vocab_size=len(transformers.AutoTokenizer.from_pretrained(folder)) + 5,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(shape).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def imported(folder: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `llm-dist import` made of it, beside shards of our text in its tokens."""
    out = tmp_path_factory.mktemp("ours") / "tiny"
    made = llm_dist("import", folder, "--out", out, "--json").json
    assert made["run_file"] == str(out / "run.toml")
    text = out.parent / "some.jsonl"
    text.write_text("".join(corpus.read_text(encoding="utf-8").splitlines(keepends=True)[:60]), encoding="utf-8")
    words = ("--tokenizer", out / "tokenizer", "--out", out.parent / "shards", "--holdout", "0.1", "--workers", "1")
    assert llm_dist("tokenize", text, *words).code == 0
    return out


def test_a_run_begins_with_their_loss_and_goes_back_to_them(folder, imported, tmp_path):
    transformers = pytest.importorskip("transformers")
    shards = imported.parent / "shards"
    words = (*SMALLER, f"data.train={shards}/train", f"data.holdout={shards}/holdout", f"run.dir={tmp_path}")
    said = llm_dist("train", imported / "run.toml", *words)
    assert said.code == 0, said.err
    (run_folder,) = (path.parent for path in tmp_path.glob("*/config.json"))
    run = config.load(run_folder)
    reading = open_reading(run)
    rows = reading.read(*(each[0] for each in reading.places(range(1), range(4))))
    inputs, following = (torch.from_numpy(array.astype("int64")) for array in (rows.inputs, rows.following))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(theirs(inputs).logits.flatten(0, 1), following.flatten())
    assert losses(run_folder)[1] == pytest.approx(float(expected), abs=1e-4)
    exported = llm_dist("export", run_folder, "--out", tmp_path / "back", "--json").json
    assert exported["hugging_face_class"] == "LlamaForCausalLM"
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert back.config.vocab_size == theirs.config.vocab_size
    assert (back.config.bos_token_id, back.config.eos_token_id) == (1, 2)
    assert not torch.equal(back.lm_head.weight, theirs.lm_head.weight)
    tokens = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")("the fox").input_ids
    assert tokens == transformers.AutoTokenizer.from_pretrained(folder)("the fox").input_ids


def test_their_folder_is_scored_and_writes(folder, imported):
    scored = llm_dist("eval", folder, "--data", imported.parent / "shards" / "holdout", "--json").json
    assert scored["tokens"] > 100
    written = llm_dist("generate", folder, "--prompt", "the", "--max-tokens", "4", "--json").json
    assert written["tokens"] <= 4


def test_a_run_that_does_not_fit_is_refused_in_one_line(folder, imported, shards, tmp_path):
    ours = imported.parent / "shards"
    words = (*SMALLER, f"data.holdout={ours}/holdout", f"run.dir={tmp_path}", f"data.train={ours}/train")
    refused = llm_dist("train", imported / "run.toml", *words, "model.d_ff=64")
    assert f"init.from={folder}: model.d_ff=64 here, 48 there" in refused.mistake
    words = (*SMALLER, f"data.holdout={shards}/holdout", f"run.dir={tmp_path}", f"data.train={shards}/train")
    refused = llm_dist("train", imported / "run.toml", *words, "run.name=other")
    assert "the tokenizer does not fit the checkpoint" in refused.mistake
    table = json.loads((folder / "config.json").read_text()) | {"model_type": "mamba"}
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "config.json").write_text(json.dumps(table))
    refused = llm_dist("import", tmp_path / "strange", "--out", tmp_path / "out")
    assert "model_type=mamba, which is unknown here; known are llama," in refused.mistake
