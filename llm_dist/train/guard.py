"""Numbers that cannot be right: whether a step's are, on all ranks alike, and which steps are left out for it.

A step left out is a finished step without an update: its rows are consumed, and learning rate and data stay functions
of the step. Which steps these are is durable in the run folder before work goes on, and is an input to any replay.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from xxhash import xxh3_64_digest

from llm_dist import config
from llm_dist.engine.partition import Partition
from llm_dist.runtime import Runtime

FEWEST_LOSSES = 20
_NORMAL = 1.4826
"""Median absolute deviation -> standard deviation, of normal values."""
_LEAST_DEVIATION = 1e-3
"""Of the median: losses that hardly differ would make every loss a spike."""


@dataclass(frozen=True)
class Numbers:
    """What a step came to, over all ranks."""

    loss_nats: float
    grad_norm: float
    fault: str | None
    """Why it cannot be right; None where it can."""


def judge(loss_nats: float, grad_norm: float, before: list[float], guard: config.Guard) -> Numbers:
    """Look at a step's loss and gradient norm beside the losses `before` it, newest last."""
    if not (math.isfinite(loss_nats) and math.isfinite(grad_norm)):
        return Numbers(loss_nats, grad_norm, f"the loss is {loss_nats:.4g}, the gradient norm {grad_norm:.4g}")
    window = before[-guard.spike_window_steps :]
    if guard.spike_z is None or len(window) < FEWEST_LOSSES:
        return Numbers(loss_nats, grad_norm, None)
    median = statistics.median(window)
    deviation = _NORMAL * statistics.median(abs(loss - median) for loss in window)
    z = (loss_nats - median) / max(deviation, _LEAST_DEVIATION * abs(median), 1e-12)
    if z <= guard.spike_z:
        return Numbers(loss_nats, grad_norm, None)
    fault = f"the loss {loss_nats:.4f} lies {z:.1f} deviations above {median:.4f}, the median of {len(window)} steps"
    return Numbers(loss_nats, grad_norm, fault)


class ReplicasDiffer(RuntimeError):
    """Ranks hold different values of what they should hold alike: a flipped bit, or a defect."""


class SkippedSteps:
    """The steps of a run that are left out, as its folder records them."""

    def __init__(self, path: Path) -> None:
        """Every rank reads `path`; rank 0 alone adds to it."""
        self._path = path
        self._steps: dict[int, str] = {}
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                # A line that a crash cut short was never acted upon.
                if line.endswith("}"):
                    record = json.loads(line)
                    self._steps[record["step"]] = record["why"]

    def __contains__(self, step: int) -> bool:
        return step in self._steps

    def within(self, steps: range) -> int:
        """How many of `steps` are left out."""
        return sum(step in steps for step in self._steps)

    def add(self, step: int, why: str, *, record: Mapping[str, Any] | None) -> None:
        """Leave out `step`; with a `record` (rank 0) it is written, and durable when this returns."""
        self._steps[step] = why
        if record is None:
            return
        with self._path.open("ab+") as file:
            if file.tell() and (file.seek(-1, os.SEEK_END), file.read())[1] != b"\n":
                file.write(b"\n")
            file.write(json.dumps({"step": step, "why": why, **record}).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def checksum(values: Tensor) -> int:
    """64 bits, as a signed number, that change with any bit of a flat fp32 tensor; alike on devices of one kind."""
    if values.is_cuda:
        return int(values.view(torch.int32).sum(dtype=torch.int64))
    # On a CPU torch's sum takes fifty times as long, and longer than a disk takes to write the values.
    digest = xxh3_64_digest(values.numpy().data.cast("B"))
    return int.from_bytes(digest, signed=True)


def differing_replica(state: Mapping[str, Partition], runtime: Runtime) -> str | None:
    """Which rank holds another value than its replicas, and of what; None where all hold the same. Collective.

    Compared are checksums of the values' bits: a flipped bit changes them, whichever it is.
    """
    shared = [key for key, partition in state.items() if partition.num_replicas > 1]
    # Which tensors have replicas is a matter of the engine, and so the same on every rank.
    own = torch.zeros(runtime.ranks, 2, len(shared), dtype=torch.int64)
    for place, key in enumerate(shared):
        partition = state[key]
        own[runtime.rank, 0, place] = partition.start
        own[runtime.rank, 1, place] = checksum(partition.values)
    if not shared:
        return None
    starts, sums = runtime.sum(own).unbind(dim=1)
    for place, key in enumerate(shared):
        for start in sorted(set(starts[:, place].tolist())):
            ranks = (starts[:, place] == start).nonzero()[:, 0].tolist()
            values = [int(sums[rank, place]) for rank in ranks]
            if len(set(values)) > 1:
                return _who(key, ranks, values)
    return None


def _who(key: str, ranks: list[int], values: list[int]) -> str:
    most = statistics.mode(values)
    if values.count(most) * 2 > len(values):
        odd = [rank for rank, value in zip(ranks, values, strict=True) if value != most]
        return f"rank {', '.join(map(str, odd))} holds other values of {key} than the other ranks"
    return f"ranks {', '.join(map(str, ranks))} hold different values of {key}"
