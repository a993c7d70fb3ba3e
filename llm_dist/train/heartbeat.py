"""Signs of life: one small file for each rank in the run folder, replaced again and again; and how others read them.

A clock of another machine is not trusted: a rank is silent when its count stands still while somebody looks.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself."""

    rank: int
    attempt: int
    pid: int
    host: str
    time: float
    """Unix seconds."""
    count: int
    """One more each time."""
    step: int
    """Optimizer steps finished."""
    phase: str
    since: float
    """Unix seconds at which the phase began."""
    idle_seconds: float
    """How long nothing has gone on, while the process was awake."""
    line: str | None
    """The innermost line of this package that the main thread is in."""
    waits_in: str | None
    """The collective it waits in; empty where in none, None where not known."""


def path_of(folder: Path, rank: int) -> Path:
    """Where the heartbeat of a rank lies."""
    return folder / f"rank_{rank:05d}.json"


def write(path: Path, beat: Beat) -> None:
    """Replace the file, so that a reader sees the old one or the new."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(beat)), encoding="utf-8")
    temporary.replace(path)


def read(path: Path, attempt: int) -> Beat | None:
    """The heartbeat of a rank; None where there is none of this attempt."""
    try:
        beat = Beat(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return beat if beat.attempt == attempt else None


def innermost_line() -> str | None:
    """Where in this package the main thread is: `data/loader.py:92`."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(PACKAGE):
            return f"{file.relative_to(PACKAGE).as_posix()}:{frame.f_lineno}"
        frame = frame.f_back
    return None


class Others:
    """The other ranks, looked at again and again."""

    def __init__(self, folder: Path, attempt: int, window_seconds: float, clock: Callable[[], float]) -> None:
        """A rank whose count stands still for `window_seconds` of the `clock` is silent."""
        self._folder, self._attempt, self._window_seconds, self._clock = folder, attempt, window_seconds, clock
        self._seen: dict[int, _Count] = {}

    def forget(self) -> None:
        """Begin anew: nothing is suspicious any more."""
        self._seen.clear()

    def look(self, rank: int) -> Seen:
        """The last beat of a rank, and whether it is silent."""
        beat = read(path_of(self._folder, rank), self._attempt)
        count, now = beat.count if beat else None, self._clock()
        before = self._seen.get(rank)
        if before is None or before.count != count:
            has_moved = before is not None and count is not None
            before = self._seen[rank] = _Count(count, now, has_moved)
        is_silent = now - before.since >= self._window_seconds
        return Seen(rank, beat, is_silent if is_silent or before.has_moved else None)


@dataclass(frozen=True)
class Seen:
    """What is known of a rank."""

    rank: int
    beat: Beat | None
    """Its last one; None where it never came, or has left in order."""
    is_silent: bool | None
    """None where it has not been looked at for long enough."""


@dataclass(frozen=True)
class _Count:
    count: int | None
    since: float
    has_moved: bool
