"""Speed and time left, as numbers for the metrics and as lines for a person."""

from __future__ import annotations

import sys
import time
from typing import Any

from llm_dist import config

MFU_CONVENTION = "(6N + 12LDT) x tokens/s / measured matmul rate of all ranks"


class Progress:
    """Counts tokens between reports; says lines on rank 0 only."""

    def __init__(self, run: config.Config, flops_per_token: float, matmul_flops: float, speaks: bool) -> None:
        """`matmul_flops`: FLOP/s of all ranks together, the denominator of the utilisation."""
        self._run = run
        self._flops_per_token = flops_per_token
        self._matmul_flops = matmul_flops
        self._speaks = speaks
        self._tokens = self._steps = 0
        self._tokens_per_second = self._steps_per_second = 0.0

    def count(self, tokens: int) -> None:
        """Tokens of one more step."""
        self._tokens += tokens
        self._steps += 1

    def numbers(self, seconds: dict[str, float]) -> dict[str, Any]:
        """Speed since the last call, given where the seconds went."""
        self._tokens_per_second = self._tokens / max(1e-9, seconds["all"])
        self._steps_per_second = self._steps / max(1e-9, seconds["all"])
        self._tokens = self._steps = 0
        return {
            "tokens_per_second": round(self._tokens_per_second, 1),
            "mfu": round(self._flops_per_token * self._tokens_per_second / self._matmul_flops, 4),
            "mfu_convention": MFU_CONVENTION,
            "seconds": seconds,
        }

    def show(self, step: int, loss_nats: float | None) -> None:
        """One line: where the run is, how fast, how long still."""
        steps = self._run.run.steps
        left = duration((steps - step) / max(1e-9, self._steps_per_second))
        loss = "left out" if loss_nats is None else f"loss {loss_nats:.4f}"
        self.say(
            f"step {step:>{len(str(steps))}}/{steps}  {loss}  {self._tokens_per_second:,.0f} tokens/s  {left} left"
        )

    def say(self, line: str) -> None:
        """A line on standard error, with the time of day."""
        say(line, self._speaks)


def say(line: str, speaks: bool = True) -> None:
    """Print a line on standard error with the time of day, where this rank speaks for all."""
    if speaks:
        print(f"{time.strftime('%H:%M:%S')}  {line}", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds as people read them: 1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
