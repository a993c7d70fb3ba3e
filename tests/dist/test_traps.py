"""What vendors do silently, each guarded: clipping, rounded masters, hidden steps, another layout than asked."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from llm_dist.engine import blocks
from llm_dist.errors import UserError
from llm_dist.runtime import Runtime
from tests.dist import training
from tests.dist.ranks import Ranks
from tests.dist.test_engines import first_gradients, trajectory
from tests.dist.training import ENGINES, Arrays, micro_batch

pytestmark = pytest.mark.dist
Group = Callable[[int], Ranks]
PRECISIONS = ("fp32", "bf16")
SHARDED = ("zero1", "zero2", "zero3", "fsdp")
AT_TWO = [name for name in ENGINES if name != "hybrid"]


def beginnings(here: Runtime) -> dict[tuple[str, str], tuple[Arrays, int, int]]:
    """State, optimizer steps and elements held by this rank of each engine that was just built."""
    found = {}
    for name in AT_TWO:
        for precision in PRECISIONS:
            engine = training.engine_of(training.run_file(*ENGINES[name], f"engine.precision={precision}"), here)
            held = sum(part.values.numel() for part in engine.state().values())
            found[name, precision] = (training.whole_state(engine, here), engine.optimizer_steps, held)
            engine.close()
    return found


@pytest.fixture(scope="module")
def begun(group_of: Group) -> list[dict[tuple[str, str], tuple[Arrays, int, int]]]:
    return group_of(2).run(beginnings)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", AT_TWO)
def test_training_begins_from_full_precision_weights_and_no_earlier_step(
    begun: list[dict[tuple[str, str], tuple[Arrays, int, int]]], name: str, precision: str
) -> None:
    """DeepSpeed would round the masters to bf16, and at stage 0 take a step that nobody asked for."""
    state, optimizer_steps, _ = begun[0][name, precision]
    run = training.run_file()

    assert optimizer_steps == 0
    for key, values in state.items():
        kind, parameter = key.split("/")
        first = training.first_value(run, parameter, values.shape).numpy() if kind == "param" else np.zeros(1)
        assert np.array_equal(values, np.broadcast_to(first, values.shape)), key


@pytest.mark.parametrize("name", AT_TWO)
def test_ranks_hold_their_share_and_no_more(
    begun: list[dict[tuple[str, str], tuple[Arrays, int, int]]], name: str
) -> None:
    """Vendors fall back to whole copies without a word."""
    elements = sum(values.size for values in begun[0][name, "fp32"][0].values())
    held = [rank[name, "fp32"][2] for rank in begun]

    if name in SHARDED:
        assert sum(held) == elements
        assert max(held) <= 0.51 * elements
    else:
        assert held == [elements, elements]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", [name for name in ENGINES if name.startswith("zero")])
def test_clip_of_zero_does_not_clip(group_of: Group, name: str, precision: str) -> None:
    """DeepSpeed's default is 1.0, and some of its classes read 0 as that."""
    steep = (*ENGINES[name], f"engine.precision={precision}", "init.std=0.3")
    gradients, norm = group_of(2).run(first_gradients, *steep)[0]

    assert norm > 2
    assert np.sqrt(sum(np.square(each, dtype=np.float64).sum() for each in gradients.values())) == pytest.approx(norm)


@pytest.fixture
def group_without_compiler(tmp_path: Path) -> Iterator[Ranks]:
    """Two ranks whose PATH has a Python and nothing else, and nothing compiled earlier to fall back on."""
    only_python = tmp_path / "bin"
    only_python.mkdir()
    (only_python / "python").symlink_to(sys.executable)
    caches = {name: str(tmp_path / name) for name in ("TORCH_EXTENSIONS_DIR", "TORCHINDUCTOR_CACHE_DIR", "HOME")}
    group = Ranks(2, {"PATH": str(only_python), "CXX": None, "CC": None, **caches})
    yield group
    group.close()


def trained_without_compiler(here: Runtime) -> dict[str, tuple[bool, list[str], str]]:
    found = {}
    for name in AT_TWO:
        remarks: list[str] = []
        run = training.run_file(*ENGINES[name], "engine.precision=bf16", "engine.compile=auto")
        engine = training.engine_of(run, here, remarks)
        losses = training.train(engine, run, here, range(2)).losses
        engine.close()
        insisting = training.run_file(*ENGINES[name], "engine.compile=on")
        found[name] = (bool(np.isfinite(losses).all()), remarks, _refusal(insisting, here))
    return found


def _refusal(run: training.config.Config, here: Runtime) -> str:
    try:
        training.engine_of(run, here).close()
    except UserError as error:
        return str(error)
    return ""


def test_every_engine_trains_without_a_compiler(group_without_compiler: Ranks, tmp_path: Path) -> None:
    for found in group_without_compiler.run(trained_without_compiler):
        for name, (is_finite, remarks, refusal) in found.items():
            assert is_finite, name
            assert len(remarks) == 1 and remarks[0].startswith("engine.compile: off"), (name, remarks)
            assert ("C++ compiler" in refusal) == (name != "zero3"), (name, refusal)
    assert not list((tmp_path / "TORCH_EXTENSIONS_DIR").glob("**/*.so"))


def test_compiled_blocks_lose_the_same(group_of: Group) -> None:
    if not blocks.has_compiler("cpu"):
        pytest.skip(f"torch.compile needs {blocks.COMPILER}")
    for name in ("plain", "fsdp"):
        eager, _ = group_of(1).run(trajectory, 4, *ENGINES[name], micro_batch(6))[0]
        compiled, _ = group_of(1).run(trajectory, 4, *ENGINES[name], micro_batch(6), "engine.compile=on")[0]
        assert compiled.losses == pytest.approx(eager.losses, abs=1e-5), name
        assert compiled.losses != eager.losses or compiled.grad_norms != eager.grad_norms, "was anything compiled?"
