"""Asked to stop: a signal only raises a flag, and all ranks act on it together at the next step.

Nothing is done inside a signal handler, because a checkpoint begun there would meet a half-updated model.
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopFlag:
    """Which signal arrived inside the context, if any; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopFlag:
        self._before = {number: signal.signal(number, self._raise_flag) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _raise_flag(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal_name == "SIGINT":
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name

    @property
    def is_raised(self) -> bool:
        """Whether this rank was asked to stop."""
        return self.signal_name is not None
