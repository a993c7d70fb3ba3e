"""Engine and store: a resumed run is the uninterrupted one bit for bit; any engine reads what any other wrote."""

from __future__ import annotations

from collections.abc import Callable
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
    engine, found = training.engine_of(run, here), layout.latest(folder)
    assert found is not None
    manifest = Store(folder, here.rank, here.ranks, attempt=2).restore(found, engine.state())
    engine.state_was_written(manifest.optimizer_step)
    return engine


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
