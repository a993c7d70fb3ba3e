"""Folders of theirs, read by us, and written again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from llm_dist.exchange.load import is_hugging_face, open_folder
from llm_dist.model.size import parameter_shapes
from tests.unit.exchange.folders import CASES, PAD_ID, VOCABULARY_TOKENS, exported, ours, reopened, saved, transformers


def some_ids(num_tokens: int = 40) -> Tensor:
    """No padding, no special token: int64 [2, T]."""
    return torch.randint(8, VOCABULARY_TOKENS, (2, num_tokens), generator=torch.Generator().manual_seed(0))


def our_logits(model: Any, ids: Tensor, **inputs: Any) -> dict[str, Tensor]:
    """By the names that theirs have."""
    hidden = model(ids, **inputs)
    if model.pair_head is not None:
        pairs = model.pair_head.logits(model.pooler(hidden[:, 0]))
        return {"prediction_logits": model.language.logits(hidden), "seq_relationship_logits": pairs}
    if model.class_head is None:
        return {"logits": model.language.logits(hidden)}
    read = hidden if model.pooler is None else model.pooler(hidden[:, 0])
    return {"logits": model.class_head.logits(read)}


def assert_same(found: dict[str, Tensor], expected: Any, where: Any = ...) -> None:
    for name, logits in found.items():
        assert logits.shape == expected[name].shape
        assert (logits - expected[name])[where].abs().max() <= 1e-5 * max(1.0, float(expected[name].abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_we_compute_the_same_logits_there_and_back(case, tmp_path):
    model, ids = saved(case, tmp_path / "hf"), some_ids()
    source = open_folder(tmp_path / "hf")
    assert_same(our_logits(ours(source), ids), model(ids))
    name = exported(source, tmp_path / "again")
    again, report = getattr(transformers, name).from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    again_logits = again(ids)
    for kind, logits in our_logits(ours(source), ids).items():
        torch.testing.assert_close(again_logits[kind], logits, rtol=1e-5, atol=1e-5)
    if not case.endswith("everywhere"):  # Mistral without a window is Llama
        assert name == CASES[case][0]
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    unread = {"cls.predictions.bias"} if case == "bert-untied" else set()
    assert {key for key in before if not _equal(before[key], after[key])} <= unread


def _equal(one: Tensor, other: Tensor) -> bool:
    """Without the rows in front of RoBERTa's positions, which nothing reads."""
    skipped = PAD_ID + 1 if one.shape == (64, 32) else 0
    return torch.equal(one[skipped:] if one.dim() > 1 else one, other[skipped:] if other.dim() > 1 else other)


@pytest.mark.parametrize("case", CASES)
def test_what_was_exported_is_read_bit_for_bit(case, tmp_path):
    saved(case, tmp_path / "hf")
    source = open_folder(tmp_path / "hf")
    again = reopened(source, tmp_path / "again")
    assert (again.model, again.heads, again.labels) == (source.model, source.heads, source.labels)
    for name in parameter_shapes(source.model, VOCABULARY_TOKENS, source.heads):
        assert torch.equal(source.parameter(name), again.parameter(name)), name


@torch.no_grad()
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    case=st.sampled_from(["llama", "qwen2", "qwen3", "mistral", "gpt2", "bert", "roberta", "modernbert"]),
    layers=st.integers(1, 3),
    heads=st.sampled_from([1, 2, 4]),
    grouped=st.booleans(),
    tied=st.booleans(),
    vocabulary_tokens=st.integers(70, 140),
    seed=st.integers(0, 99),
)
def test_random_configurations_agree(case, layers, heads, grouped, tied, vocabulary_tokens, seed, tmp_path_factory):
    changes: dict[str, Any] = {
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "tie_word_embeddings": tied,
        "vocab_size": vocabulary_tokens,
    }
    if case in ("llama", "qwen2", "qwen3", "mistral"):
        changes["num_key_value_heads"] = heads // 2 if grouped and heads > 1 else heads
    if case == "modernbert":
        changes["layer_types"] = ["sliding_attention" if layer % 2 else "full_attention" for layer in range(layers)]
    folder = tmp_path_factory.mktemp("random")
    model = saved(case, folder, seed=seed, **changes)
    ids = some_ids() % (vocabulary_tokens - 8) + 8
    assert_same(our_logits(ours(open_folder(folder)), ids), model(ids))


@torch.no_grad()
@pytest.mark.parametrize("case", ["bert", "bert-pairs", "bert-classes", "roberta", "roberta-tags", "modernbert"])
def test_padded_rows_of_encoders_agree(case, tmp_path):
    model, ids = saved(case, tmp_path), some_ids(20)
    ids[1, 13:] = PAD_ID
    mask = (ids != PAD_ID).long()
    source = open_folder(tmp_path)
    positions = torch.arange(20).expand(2, -1)
    found = our_logits(ours(source), ids, document_ids=1 - mask, positions=positions)
    for name, logits in found.items():
        expected = model(ids, attention_mask=mask)[name]
        seen = mask.bool() if logits.dim() == 3 and logits.size(1) == 20 else slice(None)
        torch.testing.assert_close(logits[seen], expected[seen], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_token_types_of_bert_agree(tmp_path):
    model, ids = saved("bert-pairs", tmp_path), some_ids(20)
    types = (torch.arange(20) > 11).long().expand(2, -1)
    assert_same(our_logits(ours(open_folder(tmp_path)), ids, segment_ids=types), model(ids, token_type_ids=types))


@torch.no_grad()
def test_shards_and_half_precision_are_read(tmp_path):
    saved("qwen2-window", tmp_path / "one").bfloat16().save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 2
    source = open_folder(tmp_path / "hf")
    assert source.parameter("blocks.0.attention.key.bias").dtype == torch.float32
    widened = transformers.Qwen2ForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    assert_same(our_logits(ours(source), some_ids()), widened(some_ids()))


@pytest.mark.parametrize(("case", "prefix"), [("llama", "model."), ("gpt2", "transformer."), ("bert-pairs", "bert.")])
def test_names_without_a_prefix_and_old_names_are_read(case, prefix, tmp_path):
    saved(case, tmp_path)
    before = open_folder(tmp_path)
    weights = before.parameter("blocks.1.attention_norm.weight"), before.parameter("blocks.1.feed_forward.down.weight")
    tensors = load_file(tmp_path / "model.safetensors")
    body = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): value for name, value in body.items()}
    old["h.0.attn.bias" if case == "gpt2" else "rotary_emb.inv_freq"] = torch.ones(1)
    save_file(old, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = [config["architectures"][0].split("For")[0].replace("LMHead", "") + "Model"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    source = open_folder(tmp_path)
    assert torch.equal(source.parameter("blocks.1.attention_norm.weight"), weights[0])
    assert torch.equal(source.parameter("blocks.1.feed_forward.down.weight"), weights[1])
    assert source.heads.language == (case == "gpt2"), "a tied head is the embedding"
    assert ("pooler.dense.weight" in source.rows) == (case == "bert-pairs")


def test_labels_have_their_names(tmp_path):
    names = {0: "no", 1: "perhaps", 2: "yes"}
    saved("bert-classes", tmp_path / "hf", id2label=names, label2id={name: id_ for id_, name in names.items()})
    source = open_folder(tmp_path / "hf")
    assert source.labels == ("no", "perhaps", "yes")
    exported(source, tmp_path / "again")
    again = transformers.AutoConfig.from_pretrained(tmp_path / "again")
    assert (again.id2label, again.label2id["perhaps"]) == (names, 1)


def test_a_run_folder_is_none_of_theirs(tmp_path: Path):
    assert not is_hugging_face(tmp_path)
    (tmp_path / "config.json").write_text('{"model": {"layers": 2}}')
    assert not is_hugging_face(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert is_hugging_face(tmp_path)
