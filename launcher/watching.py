"""The ranks of one attempt on this machine, from their start to the end of the last: who failed first, and how.

Knows nothing of starting again: that is `local`'s on one machine and `slurm.supervise`'s on many.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from launcher.attempts import hang_verdict
from launcher.ranks import Ranks
from llm_dist.errors import Exit

HANG_GRACE_SECONDS = 5.0
"""How long ranks may take to leave their stacks in their logs after one has found that the run hangs."""
SAVE_GRACE_SECONDS = 25.0
"""How long ranks may take to save and leave where they were asked to stop."""
FAILURE_GRACE_SECONDS = 5.0
"""How long ranks may take to leave after another has died: they can finish no collective, and so no step."""
_POLL_SECONDS = 0.1
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_WAS_STOPPED = tuple(-number for number in _STOP_SIGNALS)
"""How a rank ends that is asked to stop before it listens, in the first moments of its process."""


@dataclass(frozen=True)
class Failure:
    """The rank that failed first, and how."""

    rank: int
    code: int
    last_lines: tuple[str, ...]
    while_stopping: bool = False
    """Another rank had left before, because it was asked to stop."""
    verdict: str | None = None
    """Who was at fault, where the ranks found that nothing went on any more."""

    @property
    def cause(self) -> str:
        """Code or signal in words."""
        if self.verdict is not None:
            return f"hang: {self.verdict}"
        return f"killed by {signal.Signals(-self.code).name}" if self.code < 0 else f"exit code {self.code}"


class StopRequests:
    """Remembers signals to the launcher, so that they are passed on to the ranks once and between two polls."""

    def __init__(self) -> None:
        self.is_wanted = False
        self.interrupts = 0
        self._passed_on = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequests:
        self._before = {number: signal.signal(number, self._remember) for number in _STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self.interrupts += number == signal.SIGINT and self.is_wanted
        self.is_wanted = True

    def pass_on(self, ranks: Ranks) -> None:
        """Ask the ranks to save and leave; kill them when the user insists."""
        if self.is_wanted and not self._passed_on:
            self._passed_on = True
            say("asked to stop: the ranks save and leave (Ctrl-C again kills them)")
            ranks.send(signal.SIGTERM)
        if self.interrupts:
            ranks.kill()


class Follower:
    """Shows what a log gains."""

    def __init__(self, path: Path, from_bytes: int, to: TextIO | None = None) -> None:
        """`to`: standard error when None."""
        self._to = to or sys.stderr
        self._file = path.open("rb")
        self._file.seek(from_bytes)

    def show(self) -> None:
        """Copy what is new."""
        if new := self._file.read():
            self._to.write(new.decode("utf-8", errors="replace"))
            self._to.flush()

    def close(self) -> None:
        """Show the rest and let go of the file."""
        self.show()
        self._file.close()


def watch(ranks: Ranks, stop: StopRequests, run: Path, show: Callable[[], None]) -> Exit | Failure:
    """See the ranks of one attempt to their end, passing on that they are to stop; `show` is called often."""
    leave_by: float | None = None
    while True:
        stop.pass_on(ranks)
        show()
        codes = ranks.codes()
        if failed := [number for number, code in codes.items() if not _is_in_order(code, stop)]:
            is_stopping = stop.is_wanted or Exit.STOPPED in codes.values()
            grace_seconds = SAVE_GRACE_SECONDS if is_stopping else FAILURE_GRACE_SECONDS
            return _end_others(ranks, _first_of(failed, codes), codes, show, run, grace_seconds)
        if any(code in _WAS_STOPPED for code in codes.values()):  # no rank has begun to train, and none can
            ranks.terminate(_POLL_SECONDS, show)
            return Exit.STOPPED
        if len(codes) == len(ranks.members):
            break
        if leave_by is None and any(code != Exit.DONE for code in codes.values()):
            leave_by = time.monotonic() + SAVE_GRACE_SECONDS
        if leave_by is not None and time.monotonic() > leave_by:
            say(
                f"rank {_missing(ranks, codes)} did not leave with the others within {SAVE_GRACE_SECONDS:.0f} s: killed"
            )
            ranks.kill()
            return Exit.STOPPED
        time.sleep(_POLL_SECONDS)
    return Exit.DONE if not any(codes.values()) else Exit.STOPPED


def _is_in_order(code: int, stop: StopRequests) -> bool:
    return code in (Exit.DONE, Exit.STOPPED, *_WAS_STOPPED) or (code == -signal.SIGKILL and stop.interrupts > 0)


def _first_of(failed: Sequence[int], codes: dict[int, int]) -> int:
    return min(failed, key=lambda number: (precedence(codes[number]), number))


def precedence(code: int) -> int:
    """Of several ranks that fail together the one with the lowest explains most; lost connections only follow."""
    if code in (Exit.USER_ERROR, Exit.SUPERSEDED):
        return 0
    if code == Exit.LOST_CONTACT:
        return 3
    return 1 if code < 0 else 2


def _end_others(
    ranks: Ranks, number: int, codes: dict[int, int], show: Callable[[], None], run: Path, grace_seconds: float
) -> Failure:
    code = codes[number]
    if code == Exit.USER_ERROR:  # the others come to the same conclusion, and rank 0 says it best
        ranks.wait(2.0, show)
        lowest = ranks.members[0]
        number = lowest.number if lowest.poll() == Exit.USER_ERROR else number
    if code == Exit.HANG:  # nobody can save, and a rank that is stopped hears no SIGTERM
        ranks.wait(HANG_GRACE_SECONDS, show)
        ranks.kill()
        return Failure(number, code, tuple(ranks.rank(number).last_lines(8)), verdict=hang_verdict(run))
    ranks.terminate(grace_seconds, show)
    while_stopping = Exit.STOPPED in codes.values()
    return Failure(number, code, tuple(ranks.rank(number).last_lines(8)), while_stopping)


def _missing(ranks: Ranks, codes: dict[int, int]) -> str:
    return ", ".join(str(rank.number) for rank in ranks.members if rank.number not in codes)


def say(text: str) -> None:
    """One line of the launcher's own."""
    print(f"llm-launch: {text}", file=sys.stderr, flush=True)
