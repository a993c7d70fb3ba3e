"""Asked to stop: a signal only raises a flag, and all ranks act on it together at the next place where they can.

Nothing is done inside a signal handler, because a checkpoint begun there would meet a half-updated model. Python runs
handlers in the main thread, which a collective or a compiler may hold for minutes: a thread of its own therefore hears
of the signal at once, and says what holds the run up before a scheduler loses patience. Imports nothing heavy: it
listens from the first line of the program on.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from llm_dist.checkpoint import layout
from llm_dist.errors import Exit

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SAY_AFTER_SECONDS = 20.0
"""Launchers and schedulers give 25 to 30 seconds."""


_PR_SET_PDEATHSIG = 1


class StoppedEarly(Exception):
    """All ranks have agreed to leave before the first step of this attempt; raised on all of them."""


@dataclass(frozen=True)
class Standing:
    """What a run that does not react would say of itself."""

    doing: str
    """Who does what, for example `rank 0: step 12, save`."""
    checkpoint: str
    """Which checkpoint stands."""
    is_all_saved: bool
    """Whether nothing is lost when the process ends now."""


def what_stands(checkpoints: Path) -> str:
    """The newest complete checkpoint, in words."""
    found = layout.latest(checkpoints)
    return "no complete checkpoint stands yet" if found is None else f"the checkpoint at step {found.step} stands"


class StopFlag:
    """Which signal arrived inside the context, if any; a second SIGINT interrupts at once."""

    def __init__(self, is_process_wide: bool = False) -> None:
        """`is_process_wide`: the process is a rank and nothing else, and may be ended where nothing is lost by it."""
        self.signal_name: str | None = None
        self.look: Callable[[], Standing] = lambda: Standing("starting", "no step is begun", is_all_saved=True)
        """Asked, from another thread, what the run is doing."""
        self.exit_code = Exit.STOPPED
        """How the process is to end."""
        self._is_process_wide = is_process_wide
        self._interrupts = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopFlag:
        hear, self._tell = os.pipe()
        os.set_blocking(self._tell, False)
        self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        self._told_before = signal.set_wakeup_fd(self._tell, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(hear,), name="stop", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._told_before)
        os.close(self._tell)

    @property
    def is_raised(self) -> bool:
        """Whether this rank was asked to stop."""
        return self.signal_name is not None

    def retire(self, exit_code: Exit) -> None:
        """Nothing is left to stop: no signal may change how the process ends any more."""
        self.exit_code = exit_code
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)  # an interpreter that ends restores every other handler

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name

    def _listen(self, hear: int) -> None:
        """The thread: Python's own handler writes each signal's number into the pipe, whatever the main thread does."""
        say_at: float | None = None
        has_said = False
        while True:
            seconds = None if say_at is None or has_said else max(0.0, say_at - time.monotonic())
            if select.select([hear], [], [], seconds)[0]:
                if not (numbers := os.read(hear, 64)):
                    break  # the context has ended
                asked = [signal.Signals(number).name for number in numbers if number in SIGNALS]
                if asked and say_at is None:
                    self.signal_name, say_at = asked[0], time.monotonic() + SAY_AFTER_SECONDS
            else:
                has_said = True
                self._lose_patience()
        os.close(hear)

    def _lose_patience(self) -> None:
        found = self.look()
        may_leave = self._is_process_wide and found.is_all_saved
        then = "nothing is lost: leaving" if may_leave else "saving as soon as that ends"
        held_up = f"asked to stop {SAY_AFTER_SECONDS:.0f} s ago ({self.signal_name}), still busy"
        print(f"{found.doing}: {held_up}; {found.checkpoint}; {then}", file=sys.stderr, flush=True)
        if may_leave:
            os._exit(self.exit_code)


_process: StopFlag | None = None


def listen() -> None:
    """Listen from now to the end of the process, which is a rank: its imports may take seconds."""
    global _process
    _process = StopFlag(is_process_wide=True)
    _process.__enter__()


def leave_with_parent() -> None:
    """Have the kernel tell us to stop when the process that started us is gone, however it went; Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)


@contextmanager
def stop_flag() -> Iterator[StopFlag]:
    """The flag of the process where it listens, else one for as long as the context lasts."""
    if _process is not None:
        yield _process
    else:
        with StopFlag() as flag:
            yield flag


def _forget() -> None:
    """In a forked child: it has its own life, and what it is told is not told to us."""
    if any(getattr(signal.getsignal(number), "__func__", None) is StopFlag._handle for number in SIGNALS):
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)


os.register_at_fork(after_in_child=_forget)
