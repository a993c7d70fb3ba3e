"""Low-rank updates on the whole way: only they change, they survive stops and other layouts, and they are exported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llm_dist import metrics
from llm_dist.checkpoint import layout
from llm_dist.checkpoint.store import read_parameters
from llm_dist.config_lora import ADAPTER
from tests.e2e.commands import LAUNCH, assert_same_end, llm_dist, losses, run, state_at_end

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

LORA = (
    "lora.rank=4",
    'lora.targets=["*.attention.*", "*.feed_forward.*"]',
    "optim.lr=1e-2",
    "optim.total_steps=8",
    "eval.every_steps=4",
)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory, write_run_file, finished) -> Path:
    """A run of 8 steps on top of the finished one."""
    folder = tmp_path_factory.mktemp("adapted")
    said = llm_dist("train", write_run_file(folder), *LORA, f"init.from={finished}")
    assert said.code == 0, said.err
    assert "trains 4,352 of" in said.err
    return folder / "runs" / "tiny"


def test_only_the_updates_change_and_the_loss_falls(adapted, finished):
    before, after = (read_parameters(layout.find(folder).folder) for folder in (finished, adapted))
    updates = {name for name in after if ADAPTER in name}
    assert len(updates) == 2 * 7 * 2 and before.keys() == after.keys() - updates
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert all(after[name].abs().max() > 0 for name in updates)
    moments = {name.partition("/")[2] for name in state_at_end(adapted) if not name.startswith("param/")}
    assert moments == updates
    first, last = evaluated(adapted)
    assert last < first < evaluated(finished)[-1]


def evaluated(folder: Path) -> list[float]:
    records = metrics.read(folder / "metrics.jsonl")
    return [record["eval"]["holdout"]["loss_nats"] for record in records if "eval" in record]


def test_a_stop_and_other_layouts_change_nothing(tmp_path, write_run_file, finished, adapted):
    run_file, runs = write_run_file(tmp_path), tmp_path / "runs"
    words = (*LORA, f"init.from={finished}")
    for steps in (4, 8):
        assert llm_dist("train", run_file, *words, "run.name=resumed", f"run.steps={steps}").code == 0
    assert_same_end(runs / "resumed", adapted)

    spread = (*LAUNCH, "--ranks", 2, run_file, *words, "run.name=spread", "engine.name=fsdp")
    for command in ((*spread, "run.steps=4"), (*LAUNCH, "--ranks", 2, run_file, *words, "run.name=spread")):
        said = run(command)
        assert said.code == 0, said.err
    assert losses(runs / "spread") == pytest.approx(losses(adapted), rel=1e-5)


def test_what_was_trained_is_used_and_exported(tmp_path, adapted, write_run_file, finished):
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

    run_file = write_run_file(tmp_path)
    words = ("run.name=next", "run.steps=1", "optim.warmup_steps=0", f"init.from={adapted}", "optim.lr=1e-9")
    assert llm_dist("train", run_file, *words).code == 0, "updates go into the weights of what starts from them"
    assert losses(tmp_path / "runs" / "next")[1] == pytest.approx(losses(adapted)[1], abs=0.3)


def test_what_does_not_fit_is_one_line(tmp_path, write_run_file, finished):
    run_file = write_run_file(tmp_path)
    words = ("train", run_file, f"init.from={finished}", "lora.rank=4")
    assert "no layer fits" in llm_dist(*words, 'lora.targets=["*.attn"]').mistake
    assert 'lora.rank needs engine.name="plain" or "fsdp"' in llm_dist(*words, "engine.name=zero").mistake
