"""The same claims on one CUDA device that the CPU tests make on gloo: mathematics, engines, checkpoint, generation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llm_dist import runtime
from llm_dist.checkpoint.layout import Facts, latest
from llm_dist.checkpoint.store import Store
from llm_dist.runtime import Runtime
from tests.dist import training

pytestmark = pytest.mark.gpu

ENGINES = [
    ("engine.name=plain",),
    ("engine.name=fsdp",),
    ("engine.name=zero", "engine.zero_stage=1"),
    ("engine.name=zero", "engine.zero_stage=2"),
    ("engine.name=zero", "engine.zero_stage=3"),
]


@pytest.fixture(scope="module")
def here():
    started = runtime.start()
    yield started
    runtime.stop()


def losses(here: Runtime, *overrides: str, steps: int = 10) -> list[float]:
    run = training.run_file(*overrides)
    engine = training.engine_of(run, here)
    try:
        return training.losses(engine, run, here, range(steps))
    finally:
        engine.close()


@pytest.mark.parametrize("engine", ENGINES, ids=" ".join)
def test_engines_agree_with_plain_in_fp32(here, engine):
    assert losses(here, *engine) == pytest.approx(losses(here, "engine.name=plain"), abs=1e-4)


@pytest.mark.parametrize("engine", ENGINES, ids=" ".join)
def test_engines_agree_with_plain_in_bf16(here, engine):
    expected = losses(here, "engine.name=plain", "engine.precision=bf16", steps=50)
    assert losses(here, *engine, "engine.precision=bf16", steps=50) == pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize("engine", ENGINES, ids=" ".join)
def test_resume_is_bitwise_with_deterministic_kernels(engine, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    here = Runtime(0, 1, 0, torch.device("cuda", 0))
    try:
        run = training.run_file(*engine, "engine.precision=bf16", "model.dropout=0.1", "engine.deterministic=true")
        whole = training.engine_of(run, here)
        before = training.losses(whole, run, here, range(5))
        store = Store(tmp_path, 0, 1, 1)
        store.save(5, whole.state(), Facts({}, {}, whole.optimizer_steps))
        after = training.losses(whole, run, here, range(5, 10))
        whole.close()
        resumed = training.engine_of(run, here)
        found = latest(tmp_path)
        assert found is not None
        resumed.state_was_written(store.restore(found, resumed.state()).optimizer_step)
        assert training.losses(resumed, run, here, range(5, 10)) == after
        assert before != after
        resumed.close()
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_step_waits_for_the_device_only_when_numbers_are_read(here):
    run = training.run_file("engine.name=plain")
    engine = training.engine_of(run, here)
    batches, valid = training.micro_batches(run, here, 0)
    engine.train_step(batches, valid, 1e-3, 0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine.train_step(batches, valid, 1e-3, 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    engine.close()
