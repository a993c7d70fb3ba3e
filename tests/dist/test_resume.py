"""Engine and store: a resumed run is the uninterrupted one bit for bit; any engine reads what any other wrote."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from llm_dist.checkpoint import layout
from llm_dist.checkpoint.layout import Facts
from llm_dist.checkpoint.store import Store
from llm_dist.config import Config
from llm_dist.engine.engine import Engine
from llm_dist.runtime import Runtime
from tests.dist import training
from tests.dist.ranks import Ranks
from tests.dist.training import ENGINES, Arrays, Trajectory, micro_batch

pytestmark = pytest.mark.dist
Group = Callable[[int], Ranks]

LAYOUTS = [(1, "plain"), *((2, name) for name in ENGINES if name != "hybrid"), (4, "plain"), (4, "hybrid")]
"""Sums of two do not depend on their order; with four ranks of DDP and hybrid, that of each bucket counts."""

HOPS = [
    *((2, "zero2"), (4, "fsdp"), (2, "zero3"), (1, "plain"), (4, "zero1"), (4, "hybrid")),
    *((4, "zero3"), (2, "zero0"), (1, "zero2"), (4, "plain")),
]
TRAINED_HOPS = 4

MATRIX = [(ranks, name) for ranks in (1, 2, 4) for name in ENGINES if name != "hybrid" or ranks == 4]
CONTINUED = (8, 11)
"""How far behind itself in the matrix are the layouts from whose checkpoint each one trains on: so chosen that engine and
number of ranks both change, the latter in each of the six ways."""
UNEVEN = (
    *("model.vocabulary_multiple=1", "model.tied_head=true", "model.qk_norm=true"),
    *("model.layers=1", "model.d_model=20", "model.heads=2", "model.kv_heads=1", "model.d_ff=27"),
    micro_batch(training.ROWS),
)
"""Hardly anything here can be divided by two, let alone by four."""


class Hop(NamedTuple):
    """What an engine found in a checkpoint and what it made of it."""

    state: Arrays
    optimizer_steps: int
    loss: float
    passed: Trajectory


def save(engine: Engine, here: Runtime, folder: Path, step: int) -> None:
    Store(folder, here.rank, here.ranks, attempt=1).save(step, engine.state(), Facts({}, {}, engine.optimizer_steps))
    here.barrier()


def load(run: Config, here: Runtime, folder: Path) -> Engine:
    engine = training.engine_of(run, here)
    read(engine, here, folder)
    return engine


def read(engine: Engine, here: Runtime, folder: Path) -> None:
    found = layout.latest(folder)
    assert found is not None
    manifest = Store(folder, here.rank, here.ranks, attempt=2).restore(found, engine.state())
    engine.state_was_written(manifest.optimizer_step)


def stopped_and_resumed(here: Runtime, folder: Path, *overrides: str) -> list[tuple[Trajectory, Arrays]]:
    """Two steps after a save: of the engine that went on, and of a fresh one that began from the checkpoint."""
    run = training.run_file("model.dropout=0.1", micro_batch(2), *overrides)
    engine = training.engine_of(run, here)
    training.train(engine, run, here, range(2))
    save(engine, here, folder, step=2)
    ends = []
    for fresh in (False, True):
        engine = load(run, here, folder) if fresh else engine
        ends.append((training.train(engine, run, here, range(2, 4)), training.whole_state(engine, here)))
        engine.close()
    return ends


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("ranks", "name"), LAYOUTS)
def test_resumed_is_uninterrupted_bit_for_bit(
    group_of: Group, tmp_path: Path, ranks: int, name: str, precision: str
) -> None:
    overrides = (*ENGINES[name], f"engine.precision={precision}")
    (passed, state), (passed_resumed, resumed) = group_of(ranks).run(stopped_and_resumed, tmp_path, *overrides)[0]

    assert passed_resumed == passed
    assert [key for key in state if not np.array_equal(state[key], resumed[key])] == []


def first_hop(here: Runtime, folder: Path, steps: int, *overrides: str) -> Hop:
    run = training.run_file(*overrides)
    engine = training.engine_of(run, here)
    training.train(engine, run, here, range(3))
    return _hop(engine, run, here, folder, steps)


def next_hop(here: Runtime, source: Path, folder: Path, steps: int, *overrides: str) -> Hop:
    run = training.run_file(*overrides)
    return _hop(load(run, here, source), run, here, folder, steps)


def _hop(engine: Engine, run: Config, here: Runtime, folder: Path, steps: int) -> Hop:
    state, optimizer_steps = training.whole_state(engine, here), engine.optimizer_steps
    save(engine, here, folder, step=3)
    batches, valid = training.micro_batches(run, here, step=3)
    nats = sum((engine.eval_step(batch).nats for batch in batches), torch.zeros(()))
    loss = float(here.sum(nats)) / valid
    passed = training.train(engine, run, here, range(3, 3 + steps))
    engine.close()
    return Hop(state, optimizer_steps, loss, passed)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_state_passes_through_engines_and_worlds_unchanged(group_of: Group, tmp_path: Path, precision: str) -> None:
    """A chain: each engine saves what it loaded, and the next one reads that."""
    chosen = [f"engine.precision={precision}", "model.vocabulary_multiple=1", "model.tied_head=true"]
    exact, drift = (1e-5, 1e-5) if precision == "fp32" else (1e-3, None)
    first: Hop | None = None
    for number, (ranks, name) in enumerate(HOPS):
        steps = 20 if drift and number < TRAINED_HOPS else 0
        where, folder = f"hop {number}, {name} on {ranks} ranks", tmp_path / str(number)
        group, overrides = group_of(ranks), (*chosen, *ENGINES[name])
        if first is None:
            first = group.run(first_hop, folder, steps, *overrides)[0]
            continue
        hop = group.run(next_hop, tmp_path / str(number - 1), folder, steps, *overrides)[0]
        assert hop.optimizer_steps == first.optimizer_steps == 3, where
        assert [key for key in first.state if not np.array_equal(first.state[key], hop.state[key])] == [], where
        assert hop.loss == pytest.approx(first.loss, abs=exact), where
        if steps:
            assert hop.passed.losses == pytest.approx(first.passed.losses, abs=drift), where


def first_of_pair(here: Runtime, folder: Path, *overrides: str) -> Trajectory:
    """Train, save, write down beside it what was saved, and go on: the losses a reader has to meet."""
    run = training.run_file(*UNEVEN, *overrides)
    engine = training.engine_of(run, here)
    training.train(engine, run, here, range(3))
    state = training.whole_state(engine, here)
    if here.is_first:
        np.savez(folder.with_suffix(".npz"), **state)
    save(engine, here, folder, step=3)
    uninterrupted = training.train(engine, run, here, range(3, 23))
    engine.close()
    return uninterrupted


def second_of_pairs(
    here: Runtime, folders: Sequence[Path], continued: Sequence[int], *overrides: str
) -> tuple[list[list[str]], list[Trajectory]]:
    """One engine reads each checkpoint in turn: which tensors differ, and what follows on the `continued` ones."""
    run = training.run_file(*UNEVEN, *overrides)
    engine = training.engine_of(run, here)
    differing, passed = [], {}
    for number, folder in enumerate(folders):
        read(engine, here, folder)
        found, saved = training.whole_state(engine, here), np.load(folder.with_suffix(".npz"))
        assert found.keys() == set(saved.files)
        differing.append([key for key in found if found[key].tobytes() != saved[key].tobytes()])
        assert engine.optimizer_steps == 3
        if number in continued:
            passed[number] = training.train(engine, run, here, range(3, 23))
    engine.close()
    return differing, [passed[number] for number in continued]


@pytest.fixture(scope="module")
def written(group_of: Group, tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Trajectory]:
    """A checkpoint by each layout of the matrix, each of a state of its own, and how its run went on."""
    folder = tmp_path_factory.mktemp("matrix")
    runs = {}
    for seed, (ranks, name) in enumerate(MATRIX):
        path = folder / f"{name}_{ranks}"
        runs[path] = group_of(ranks).run(first_of_pair, path, f"run.seed={seed}", *ENGINES[name])[0]
    return runs


@pytest.mark.parametrize(("ranks", "name"), MATRIX)
def test_any_layout_goes_on_from_the_checkpoint_of_any_other(
    group_of: Group, written: dict[Path, Trajectory], ranks: int, name: str
) -> None:
    own, folders = MATRIX.index((ranks, name)), list(written)
    continued = [(own - behind) % len(MATRIX) for behind in CONTINUED]
    differing, passed = group_of(ranks).run(second_of_pairs, folders, continued, *ENGINES[name])[0]

    assert {folder.name: keys for folder, keys in zip(folders, differing, strict=True) if keys} == {}
    for number, resumed in zip(continued, passed, strict=True):
        uninterrupted = written[folders[number]]
        assert resumed.losses == pytest.approx(uninterrupted.losses, abs=1e-5), folders[number].name
