"""A thread in every rank that shows its signs of life, and ends a run in which nothing goes on any more.

Under whatever launcher: ranks know of each other through files in the run folder alone. When a rank has been idle for
`watch.hang_seconds`, the lowest living rank judges (`verdict`), says it in one line and writes it down; every living
rank that finds the verdict leaves the stacks of its threads in its log and ends with `Exit.HANG`.

The same thread ends a rank whose run a newer attempt has taken over: stuck in a collective, it would never notice.

Only time in which this process was awake counts, so that a machine that slept or was stopped accuses nobody.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType

import psutil

from llm_dist.checkpoint.lease import Fence, Superseded
from llm_dist.errors import Exit
from llm_dist.runtime import COLLECTIVE_TIMEOUT, Runtime
from llm_dist.train import flight, heartbeat, verdict
from llm_dist.train.folder import RunFolder
from llm_dist.train.heartbeat import Beat, Others, Seen
from llm_dist.train.ledger import Ledger
from llm_dist.train.progress import say
from llm_dist.train.verdict import Verdict
from llm_dist.train.watch import BEFORE, Place, Watch

_RANKS_PER_SECOND = 50
"""Heartbeats that all ranks together may write."""
_MOST_SECONDS_BETWEEN_BEATS = 30.0
_BYTES_THAT_COUNT = 1 << 16
"""Less than this is written by heartbeats and logs, too."""
_MARGIN_SECONDS = 120.0
_JOIN_SECONDS = 10.0
_STANDARD_ERROR = 2


def beat_seconds(ranks: int, hang_seconds: float) -> float:
    """How often a rank shows a sign of life: once a second, rarer where there are many, oftener in a hurry."""
    seconds = min(_MOST_SECONDS_BETWEEN_BEATS, max(1.0, ranks / _RANKS_PER_SECOND))
    return min(seconds, hang_seconds / 10) if hang_seconds else seconds


def window_seconds(ranks: int, hang_seconds: float) -> float:
    """How long a rank's heartbeat must stand still before it is called silent."""
    return max(2.0, hang_seconds / 4, 3 * beat_seconds(ranks, hang_seconds))


def collective_timeout(hang_seconds: float) -> timedelta:
    """When a collective gives up by itself: late enough that a hang is judged before, and so has a name."""
    judged_by = verdict.LONG * hang_seconds + 2 * max(2.0, hang_seconds / 4)
    return max(COLLECTIVE_TIMEOUT, timedelta(seconds=judged_by + _MARGIN_SECONDS))


class Watchdog:
    """Runs beside the training of one rank for as long as the context lasts."""

    def __init__(
        self,
        watch: Watch,
        folder: RunFolder,
        here: Runtime,
        attempt: int,
        hang_seconds: float,
        ledger: Ledger | None = None,
        end: Callable[[int], object] = os._exit,
    ) -> None:
        """`ledger`: rank 0's. `hang_seconds` of 0: signs of life, and no judging. `end` ends the process."""
        self._watch, self._folder, self._here, self._attempt = watch, folder, here, attempt
        self._hang_seconds, self._ledger, self._end_process = hang_seconds, ledger, end
        self._others_seconds = beat_seconds(here.ranks, hang_seconds)
        # Rank 0 also speaks to `llm-launch status`.
        self._seconds = beat_seconds(1, hang_seconds) if here.is_first else self._others_seconds
        window = window_seconds(here.ranks, hang_seconds)
        self._fence = Fence(folder.checkpoints, attempt)
        self._others = Others(folder.heartbeats, attempt, window, lambda: self._awake)
        self._own_paths = [heartbeat.path_of(folder.heartbeats, here.rank)]
        self._own_paths += [folder.heartbeat] if here.is_first else []
        self._looked_at = time.monotonic()
        self._awake = self._idle = 0.0
        self._hung = (BEFORE, 0.0)
        self._moves = self._bytes = self._count = 0
        self._is_closing = self._is_ending = self._has_complained = False
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._show(self._beat(self._notice()))
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._is_closing = True
        self._watch.changed.set()
        self._thread.join(timeout=_JOIN_SECONDS)
        while self._is_ending:  # a neighbour has ended first and broken a collective; the thread ends this process
            time.sleep(0.1)
        if kind is not None and self._hang_seconds and (found := self._read_verdict()) is not None:
            self._end(found)
        with suppress(OSError):
            for path in self._own_paths:
                path.unlink(missing_ok=True)
            if self._ledger is not None:
                self._ledger.write("in order" if kind is None else kind.__name__)

    def _run(self) -> None:
        while True:
            self._watch.changed.wait(self._seconds)
            self._watch.changed.clear()
            if self._is_closing:
                return
            self.look()

    def look(self) -> None:
        """Show a sign of life, and see whether anything goes on, and whether it is still ours."""
        if (superseded := self._is_superseded()) is not None:
            self._leave(superseded)
            return
        own = self._beat(self._notice())
        self._show(own)
        if not self._hang_seconds:
            return
        found = self._read_verdict()
        if found is not None:
            self._end(found)
        elif (judged := self._judge(own)) is not None:
            is_mine = self._publish(judged)
            self._end(judged if is_mine else self._read_verdict() or judged, speaks=is_mine)

    def _is_superseded(self) -> Superseded | None:
        try:
            self._fence.check()
        except Superseded as error:
            return error
        except OSError as error:
            self._complain(f"cannot see whether a newer attempt has begun: {error}")
        return None

    def _leave(self, superseded: Superseded) -> None:
        """End the process at once: what it still holds belongs to nobody."""
        self._is_ending = True
        say(f"rank {self._here.rank}: {superseded}")
        self._end_process(Exit.SUPERSEDED)
        self._is_ending = False

    def _notice(self) -> Place:
        """Where the main thread is; the time it has been idle grows where it has not moved."""
        place, now = self._watch.place(), time.monotonic()
        awake = min(now - self._looked_at, 2 * self._seconds)
        self._looked_at = now
        self._awake += awake
        has_moved = place.moves != self._moves or self._has_transferred(place.phase)
        self._moves = place.moves
        self._idle = 0.0 if has_moved else self._idle + awake
        if self._is_idle:
            self._hung = (place.phase, self._idle)
        return place

    @property
    def _is_idle(self) -> bool:
        """Whether it is time to look closer."""
        return 0 < self._hang_seconds / 2 < self._idle

    def _has_transferred(self, phase: str) -> bool:
        """Whether bytes go to or come from files, in phases that consist of that."""
        if phase not in ("save", "restore"):
            return False
        try:
            counts = psutil.Process().io_counters()
        except (AttributeError, OSError, psutil.Error):
            return False  # not every system tells; then the patience of the phase is all there is
        before, self._bytes = self._bytes, counts.write_chars if phase == "save" else counts.read_chars
        return abs(self._bytes - before) > _BYTES_THAT_COUNT

    def _beat(self, place: Place) -> Beat:
        self._count += 1
        now = time.time()
        return Beat(
            rank=self._here.rank,
            attempt=self._attempt,
            pid=os.getpid(),
            host=socket.gethostname(),
            time=now,
            count=self._count,
            step=place.step,
            phase=place.phase,
            since=round(now - place.phase_seconds, 3),
            idle_seconds=round(self._idle, 3),
            line=heartbeat.innermost_line() if self._is_idle else None,
            waits_in=flight.pending() if self._is_idle else None,
        )

    def _show(self, beat: Beat) -> None:
        """Write the heartbeat; a file system that fails is no reason to stop, and is named once."""
        try:
            self._folder.heartbeats.mkdir(exist_ok=True)
            for path in self._own_paths:
                heartbeat.write(path, beat)
            if self._ledger is not None:
                self._ledger.write()
        except OSError as error:
            self._complain(f"its heartbeat cannot be written: {error}")

    def _complain(self, words: str) -> None:
        if not self._has_complained:
            say(f"rank {self._here.rank}: {words}")
        self._has_complained = True

    def _judge(self, own: Beat) -> Verdict | None:
        """The verdict, where it falls to this rank: all lower ones are silent."""
        if self._idle < self._hang_seconds:
            self._others.forget()
            return None
        seen: list[Seen] = []
        for rank in range(self._here.rank):
            seen.append(self._others.look(rank))
            if not seen[-1].is_silent:
                return None
        seen.append(Seen(own.rank, own, is_silent=False))
        seen += [self._others.look(rank) for rank in range(own.rank + 1, self._here.ranks)]
        return verdict.judge(seen, self._hang_seconds)

    @property
    def _verdict_path(self) -> Path:
        return self._folder.heartbeats / f"verdict_{self._attempt:04d}.json"

    def _publish(self, judged: Verdict) -> bool:
        """Write the verdict down, unless another rank has been faster."""
        try:
            with self._verdict_path.open("x", encoding="utf-8") as file:
                json.dump({**dataclasses.asdict(judged), "time": time.time()}, file)
        except FileExistsError:
            return False
        return True

    def _read_verdict(self) -> Verdict | None:
        try:
            table = json.loads(self._verdict_path.read_text(encoding="utf-8"))
            return Verdict(table["words"], tuple(table["ranks"]), table["step"])
        except (OSError, ValueError, KeyError):
            return None

    def _end(self, found: Verdict, speaks: bool = False) -> None:
        """Leave what a post-mortem needs, and end the process: its main thread will not."""
        self._is_ending = True
        if self._ledger is not None:
            with suppress(OSError):
                self._ledger.write("hang", self._hung)
        say(f"rank {self._here.rank}: the stacks of all threads, innermost call first:")
        faulthandler.dump_traceback(_STANDARD_ERROR, all_threads=True)
        with suppress(OSError, RuntimeError):
            flight.dump(self._folder.heartbeats / f"flight_{self._attempt:04d}", self._here.rank)
        if speaks:
            say(f"hang: {found.words}")
            time.sleep(2 * self._others_seconds)  # the others find the verdict meanwhile
        self._end_process(Exit.HANG)
        self._is_ending = False
