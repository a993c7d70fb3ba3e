"""A small model trained on made-up rows, dealt to ranks as the trainer deals them: what the engine tests run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from llm_dist import config, optim
from llm_dist.batch import Batch
from llm_dist.data.order import rank_rows
from llm_dist.engine import select
from llm_dist.engine.engine import Engine
from llm_dist.model.init import initial_value
from llm_dist.model.transformer import Transformer
from llm_dist.objectives.causal import Causal
from llm_dist.objectives.objective import Trainee
from llm_dist.plan import num_micro_batches, rows_per_micro_batch
from llm_dist.rows import Rows
from llm_dist.runtime import Runtime

VOCABULARY = 101
SEQUENCE = 24
ROWS = 12

Arrays = dict[str, npt.NDArray[np.float32]]

ENGINES = {
    "plain": ("engine.name=plain",),
    **{f"zero{stage}": ("engine.name=zero", f"engine.zero_stage={stage}") for stage in range(4)},
    "fsdp": ("engine.name=fsdp",),
    "hybrid": ("engine.name=fsdp", "engine.shard_ranks=2"),
}
"""Overrides that choose each engine; hybrid needs an even number of ranks."""


class Trajectory(NamedTuple):
    """What a run went through, by step."""

    losses: list[float]
    grad_norms: list[float]


def run_file(*overrides: str) -> config.Config:
    table = {
        "run": {"name": "test", "steps": 50, "seed": 7},
        "model": {"layers": 2, "d_model": 32, "heads": 4, "kv_heads": 2, "d_ff": 64, "max_sequence_tokens": SEQUENCE},
        "data": {"train": "none", "sequence_tokens": SEQUENCE},
        "batch": {"tokens_per_step": ROWS * SEQUENCE, "sequences_per_micro_batch": 4},
        "optim": {"lr": 3e-3, "warmup_steps": 2},
        "engine": {"precision": "fp32", "compile": "off"},
    }
    return config.parse(table, overrides)


def rows_per_step(rows: int) -> str:
    return f"batch.tokens_per_step={rows * SEQUENCE}"


def micro_batch(rows: int) -> str:
    return f"batch.sequences_per_micro_batch={rows}"


def engine_of(run: config.Config, here: Runtime, remarks: list[str] | None = None) -> Engine:
    with torch.device(select.CONSTRUCTION_DEVICE[run.engine.name]):
        model = Transformer(run.model, VOCABULARY, torch.float32 if run.engine.precision == "fp32" else torch.bfloat16)
    trainee = Trainee(model, Causal(run.objective.z_loss))
    return select.build(
        trainee,
        lambda name, shape: first_value(run, name, shape),
        run,
        here,
        (lambda line: None) if remarks is None else remarks.append,
    )


def first_value(run: config.Config, name: str, shape: Iterable[int]) -> torch.Tensor:
    return initial_value(name, tuple(shape), run.model, run.init.std, run.run.seed)


def micro_batches(run: config.Config, here: Runtime, step: int) -> tuple[list[Batch], int]:
    """This rank's micro-batches of a step, rows scored in part, and the scored positions of the whole step."""
    rows = run.batch.tokens_per_step // SEQUENCE
    dealing = (rows, here.ranks, run.batch.sequences_per_micro_batch)
    count, size = num_micro_batches(*dealing), rows_per_micro_batch(*dealing)
    random = np.random.default_rng(1000 + step)
    walk = np.cumsum(random.integers(0, 3, (rows, SEQUENCE + 1)), axis=1) + random.integers(0, 50, (rows, 1))
    tokens = (walk % VOCABULARY).astype(np.int64)
    documents = np.cumsum(random.random((rows, SEQUENCE + 1)) < 0.1, axis=1).astype(np.int64)
    scored = random.integers(1, SEQUENCE + 1, rows)
    ids = documents[:, :-1] if run.data.document_mask else None
    whole = Rows(tokens[:, :-1], tokens[:, 1:], scored, ids)
    objective, own = Causal(run.objective.z_loss), rank_rows(rows, here.ranks, here.rank)
    own_rows = whole.part(own.start, len(own), own.start)
    batches = [
        objective.make_batch(own_rows.part(first, size, own.start + first), size).to(here.device)
        for first in range(0, count * size, size)
    ]
    return batches, int(scored.sum())


def train(engine: Engine, run: config.Config, here: Runtime, steps: range) -> Trajectory:
    """Train over `steps`; losses are means over all ranks."""
    losses, grad_norms = [], []
    for step in steps:
        batches, valid = micro_batches(run, here, step)
        result = engine.train_step(batches, valid, optim.learning_rate(run, step), step)
        losses.append(float(here.sum(result.nats)) / valid)
        grad_norms.append(float(result.grad_norm))
    return Trajectory(losses, grad_norms)


def whole_state(engine: Engine, here: Runtime) -> Arrays:
    """Every state tensor, gathered bit for bit; replicas of a partition must be equal. Collective."""
    state = engine.state()
    sizes = [int(np.prod(part.shape)) for part in state.values()]
    copies = torch.zeros(2, sum(sizes), dtype=torch.int32)  # a sum of floats would make 0.0 of -0.0
    for part, end in zip(state.values(), np.cumsum(sizes).tolist(), strict=True):
        first = end - int(np.prod(part.shape)) + part.start
        for copy, replica in enumerate((0, part.num_replicas - 1)):
            if part.replica == replica:
                copies[copy, first : first + part.values.numel()] = part.values.cpu().view(torch.int32)
    first_copies, last_copies = here.sum(copies)
    assert torch.equal(first_copies, last_copies), "replicas of the state differ"
    return {
        key: whole.view(torch.float32).view(part.shape).numpy().copy()
        for (key, part), whole in zip(state.items(), first_copies.split(sizes), strict=True)
    }
