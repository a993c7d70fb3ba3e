"""The training step of one rank: tokens per second, share of the matmul rate measured in the same run, peak memory.

Each case is measured in rounds that take turns with the others, so that a noisy machine disturbs all alike.
"""

from __future__ import annotations

import resource
import statistics
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from llm_dist import config, optim, runtime
from llm_dist.batch import Batch
from llm_dist.engine import select
from llm_dist.engine.engine import Engine
from llm_dist.model.init import initial_value
from llm_dist.model.size import flops_per_token
from llm_dist.model.transformer import Transformer
from llm_dist.objectives.causal import Causal
from llm_dist.objectives.objective import Trainee
from llm_dist.probe import matmul_flops_per_second
from llm_dist.rows import Rows
from llm_dist.runtime import Runtime

VOCABULARY = 32_000
CPU_CASES = (
    ("6M fp32", (), ("engine.precision=fp32",)),
    ("6M bf16", (), ("engine.precision=bf16",)),
    ("6M bf16, fsdp", (), ("engine.precision=bf16", "engine.name=fsdp")),
    ("6M bf16, full recompute", (), ("engine.precision=bf16", "engine.recompute=full")),
)
GPU_CASES = (
    ("1.3B plain", ("configs/1b.toml",), ("engine.name=plain",)),
    ("1.3B fsdp", ("configs/1b.toml",), ("engine.name=fsdp",)),
    ("1.3B fsdp, selective", ("configs/1b.toml",), ("engine.name=fsdp", "engine.recompute=selective")),
)
SMALL = {
    "run": {"name": "bench", "steps": 1000},
    "model": {"layers": 4, "d_model": 256, "heads": 4, "max_sequence_tokens": 256},
    "data": {"train": "none", "sequence_tokens": 256},
    "batch": {"tokens_per_step": 1024, "sequences_per_micro_batch": 4},
    "engine": {"compile": "off"},
}


@dataclass
class Case:
    """One engine, ready to step, and the rates of its rounds."""

    name: str
    run: config.Config
    engine: Engine
    batch: Batch
    seconds: list[float]

    def step(self) -> None:
        """One optimizer step over one micro-batch, waited for."""
        began = time.perf_counter()
        tokens = self.batch.input_ids.numel()
        self.engine.train_step([self.batch], tokens, optim.learning_rate(self.run, 1), 1)
        if self.batch.input_ids.is_cuda:
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - began)


def measure(on_gpu: bool, rounds: int = 7) -> list[dict[str, Any]]:
    """One row per case. On GPU the cases are measured one after another, for they do not fit together."""
    here = runtime.start()
    rows = []
    if on_gpu:
        for name, files, overrides in GPU_CASES:
            case = _case(name, config.load(files[0], [*overrides]), here)
            rows.append(_row(_stepped([case], rounds)[0], here))
            case.engine.close()
            del case
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    else:
        tables = [(name, config.parse({k: dict(v) for k, v in SMALL.items()}, o)) for name, _, o in CPU_CASES]
        rows = [_row(case, here) for case in _stepped([_case(name, run, here) for name, run in tables], rounds)]
    runtime.stop()
    return rows


def _case(name: str, run: config.Config, here: Runtime) -> Case:
    dtype = torch.bfloat16 if run.engine.precision == "bf16" else torch.float32
    objective = Causal(run.objective.z_loss)
    with torch.device(select.CONSTRUCTION_DEVICE[run.engine.name]):
        trainee = Trainee(Transformer(run.model, VOCABULARY, dtype), objective)
    engine = select.build(
        trainee, lambda n, shape: initial_value(n, tuple(shape), run.model, run.init.std, 0), run, here, print
    )
    rows = run.batch.sequences_per_micro_batch
    tokens = np.random.default_rng(0).integers(8, VOCABULARY, (rows, run.data.sequence_tokens + 1))
    batch = objective.make_batch(Rows(tokens[:, :-1], tokens[:, 1:]), rows)
    return Case(name, run, engine, batch.to(here.device), [])


def _stepped(cases: list[Case], rounds: int) -> list[Case]:
    for case in cases:
        case.step()  # warm-up: compilation, first allocations
        case.seconds.clear()
    for _ in range(rounds):
        for case in cases:
            case.step()
    return cases


def _row(case: Case, here: Runtime) -> dict[str, Any]:
    run, tokens = case.run, case.batch.input_ids.numel()
    median = statistics.median(case.seconds)
    dtype = torch.bfloat16 if run.engine.precision == "bf16" else torch.float32
    limit = matmul_flops_per_second(here.device, dtype, tokens, run.model.d_model)
    flops = flops_per_token(run.model, VOCABULARY, run.data.sequence_tokens)
    peak = torch.cuda.max_memory_allocated() if here.device.type == "cuda" else 1024 * resource.getrusage(0).ru_maxrss
    return {
        "case": case.name,
        "tokens/s": tokens / median,
        "spread": (max(case.seconds) - min(case.seconds)) / median,
        "matmul TFLOP/s": limit / 1e12,
        "MFU (6N+12LDT)": flops.full * tokens / median / limit,
        "MFU (causal)": flops.causal * tokens / median / limit,
        "peak GB": peak / 1e9,
    }
