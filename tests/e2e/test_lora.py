"""Low-rank updates on the whole way: only they change, they survive stops and other layouts, and they are exported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llm_dist.checkpoint import layout
from llm_dist.checkpoint.store import read_parameters
from llm_dist.config_lora import ADAPTER
from tests.e2e.commands import LAUNCH, assert_same_end, llm_dist, losses, run, state_at_end

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

ANSWERS = {"Name a module.": "It is csv.", "Which one sorts?": "Use heapq.", "At random?": "Take random.", "A?": "No."}


@pytest.fixture(scope="module")
def base(tmp_path_factory, write_run_file) -> Path:
    """A run whose head has learnt something: it stays as it is."""
    folder = tmp_path_factory.mktemp("base")
    said = llm_dist("train", write_run_file(folder), "run.steps=60", "optim.lr=1e-2", "checkpoint.every_steps=60")
    assert said.code == 0, said.err
    return folder / "runs" / "tiny"


@pytest.fixture(scope="module")
def words(base) -> tuple[str, ...]:
    """What makes a run with updates of a run file; each step reads all the answers."""
    path = base.parent.parent / "answers.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r in ANSWERS.items()))
    return (
        f"init.from={base}",
        "lora.rank=4",
        'lora.targets=["*.attention.*", "*.feed_forward.*"]',
        "objective.name=instruct",
        f"data.train={path}",
        "data.holdout=[]",
        f"data.cache={path.with_name('cache')}",
        "data.sequence_tokens=64",
        "optim.lr=1e-2",
        "optim.total_steps=24",
    )


@pytest.fixture(scope="module")
def adapted(tmp_path_factory, write_run_file, words) -> Path:
    """A run of 24 steps on top of the base."""
    folder = tmp_path_factory.mktemp("adapted")
    said = llm_dist("train", write_run_file(folder), *words, "run.steps=24")
    assert said.code == 0, said.err
    assert "trains 4,352 of" in said.err
    return folder / "runs" / "tiny"


def test_only_the_updates_change_and_the_loss_falls(adapted, base):
    before, after = (read_parameters(layout.find(folder).folder) for folder in (base, adapted))
    updates = {name for name in after if ADAPTER in name}
    assert len(updates) == 2 * 7 * 2 and before.keys() == after.keys() - updates
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert all(after[name].abs().max() > 0 for name in updates)
    moments = {name.partition("/")[2] for name in state_at_end(adapted) if not name.startswith("param/")}
    assert moments == updates
    found = losses(adapted)
    assert found[24] < 0.9 * found[1]


def test_a_stop_and_other_layouts_change_nothing(tmp_path, write_run_file, words, adapted):
    run_file, runs = write_run_file(tmp_path), tmp_path / "runs"
    for steps in (12, 24):
        assert llm_dist("train", run_file, *words, "run.name=resumed", f"run.steps={steps}").code == 0
    assert_same_end(runs / "resumed", adapted)

    spread = (*LAUNCH, "--ranks", 2, run_file, *words, "run.name=spread")
    for command in ((*spread, "run.steps=12", "engine.name=fsdp"), (*spread, "run.steps=24")):
        said = run(command)
        assert said.code == 0, said.err
    assert losses(runs / "spread") == pytest.approx(losses(adapted), rel=1e-5)


def test_what_was_trained_is_used_and_exported(tmp_path, adapted, write_run_file, finished, words):
    transformers = pytest.importorskip("transformers", reason="needs the extra llm_dist[hf]")
    made = llm_dist("export", adapted, "--out", tmp_path / "merged", "--json").json
    assert made["hugging_face_class"] == "LlamaForCausalLM"
    weights = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    assert not any("lora" in name for name in weights)
    adapter = llm_dist("export", adapted, "--out", tmp_path / "adapter", "--adapter", "--json").json
    assert adapter["hugging_face_class"] == "LlamaForCausalLM"
    names = sorted(file.name for file in (tmp_path / "adapter").iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors"]
    line = llm_dist("export", finished, "--out", tmp_path / "none", "--adapter").mistake
    assert "has no adapter" in line and "lora.rank" in line

    next_words = ("run.name=next", "run.steps=1", "optim.total_steps=1", "optim.lr=1e-9", f"init.from={adapted}")
    without = tuple(word for word in words if not word.startswith(("lora.", "init.", "optim.")))
    said = llm_dist("train", write_run_file(tmp_path), *without, *next_words, "optim.warmup_steps=0")
    assert said.code == 0, said.err
    assert losses(tmp_path / "runs" / "next")[1] < losses(adapted)[23], "updates are in the weights that it starts from"


def test_what_does_not_fit_is_one_line(tmp_path, write_run_file, finished):
    start = ("train", write_run_file(tmp_path), f"init.from={finished}", "lora.rank=4")
    assert "no layer fits" in llm_dist(*start, 'lora.targets=["*.attn"]').mistake
    assert 'lora.rank needs engine.name="plain" or "fsdp"' in llm_dist(*start, "engine.name=zero").mistake
