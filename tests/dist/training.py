"""A small model trained on made-up rows, dealt to ranks as the trainer deals them: what the engine tests run."""

from __future__ import annotations

import numpy as np
import torch

from llm_dist import config, optim
from llm_dist.batch import NOT_SCORED, Batch
from llm_dist.data.order import rank_rows
from llm_dist.engine import select
from llm_dist.engine.engine import Engine
from llm_dist.model.init import initial_value
from llm_dist.model.transformer import Transformer
from llm_dist.objectives import Trainee, build
from llm_dist.plan import num_micro_batches
from llm_dist.runtime import Runtime

VOCABULARY = 101
SEQUENCE = 24
ROWS = 12


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


def engine_of(run: config.Config, here: Runtime) -> Engine:
    model = Transformer(run.model, VOCABULARY, torch.float32 if run.engine.precision == "fp32" else torch.bfloat16)
    trainee = Trainee(model, build(run.objective))
    return select.build(
        trainee,
        lambda name, shape: initial_value(name, shape, run.model, run.init.std, run.run.seed),
        run,
        here,
        lambda line: None,
    )


def micro_batches(run: config.Config, here: Runtime, step: int, uneven: bool = True) -> tuple[list[Batch], int]:
    """This rank's micro-batches of a step and the step's scored positions; `uneven`: rows are scored in part."""
    random = np.random.default_rng(1000 + step)
    walk = np.cumsum(random.integers(0, 3, (ROWS, SEQUENCE + 1)), axis=1) + random.integers(0, 50, (ROWS, 1))
    tokens = (walk % VOCABULARY).astype(np.int64)
    scored = random.integers(1, SEQUENCE + 1, ROWS) if uneven else np.full(ROWS, SEQUENCE)
    objective, size = build(run.objective), run.batch.sequences_per_micro_batch
    own = rank_rows(ROWS, here.ranks, here.rank)
    batches = []
    for index in range(num_micro_batches(ROWS, here.ranks, size)):
        rows = own[index * size : (index + 1) * size]
        batch = objective.make_batch(tokens[rows.start : rows.stop], None, size)
        for position, row in enumerate(rows):
            batch.labels[position, scored[row] :] = NOT_SCORED
        batches.append(batch)
    return batches, int(scored.sum())


def losses(engine: Engine, run: config.Config, here: Runtime, steps: range) -> list[float]:
    """Train over `steps` and return each step's mean loss over all ranks."""
    found = []
    for step in steps:
        batches, valid = micro_batches(run, here, step)
        result = engine.train_step(batches, valid, optim.learning_rate(run, step), step)
        found.append(float(here.sum(result.nats)) / valid)
    return found


def parameters(engine: Engine, here: Runtime) -> dict[str, torch.Tensor]:
    """Every full parameter, gathered."""
    full = {}
    for key, part in engine.state().items():
        whole = torch.zeros(int(np.prod(part.shape)))
        if part.replica == 0:
            whole[part.start : part.start + part.values.numel()] = part.values.float()
        full[key] = here.sum(whole).view(part.shape).clone()
    return full
