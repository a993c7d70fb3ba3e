"""`llm-dist` with a fault planted in one rank; FAULT says which: nan:7,12 or flip:8 or spike:30, for example.

nan and spike spoil the loss of these steps on the last rank, whenever they are computed; flip turns a bit of a weight
of rank 1 before this step, once (FAULT_MARK is the file that remembers it).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from llm_dist.cli import main
from llm_dist.engine.engine import Engine
from llm_dist.objectives.causal import Causal

FACTOR = {"nan": float("nan"), "spike": 3.0}


@contextmanager
def planted(fault: str) -> Iterator[None]:
    """Within the context, steps of this process have the fault."""
    kind, _, steps = fault.partition(":")
    at = set(map(int, steps.split(",")))
    sound_step, sound_loss = Engine.train_step, Causal.loss

    def spoilt_loss(self, model, batch):
        loss = sound_loss(self, model, batch)
        return loss._replace(nats=loss.nats * FACTOR[kind])

    def train_step(self, micro_batches, valid_tokens, lr, step, *accepts):
        is_hit = step + 1 in at
        if is_hit and kind == "flip" and self.runtime.rank == 1:
            flip(self)
        if is_hit and kind in FACTOR and self.runtime.rank == self.runtime.ranks - 1:
            Causal.loss = spoilt_loss
        try:
            return sound_step(self, micro_batches, valid_tokens, lr, step, *accepts)
        finally:
            Causal.loss = sound_loss

    Engine.train_step = train_step
    try:
        yield
    finally:
        Engine.train_step = sound_step


def flip(engine: Engine) -> None:
    mark = Path(os.environ["FAULT_MARK"])
    if not mark.exists():
        mark.touch()
        first = next(engine.trainee.parameters())
        with torch.no_grad():
            first.view(-1).view(torch.int32)[3] ^= 1 << 28


if __name__ == "__main__":
    with planted(os.environ["FAULT"]):
        main()
