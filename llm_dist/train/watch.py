"""What the run tells the outside while it runs: a heartbeat file, and where the seconds went."""

from __future__ import annotations

import json
import os
import socket
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MIN_SECONDS_BETWEEN_BEATS = 1.0


class Watch:
    """Times the phases of a run and leaves a heartbeat beside it (rank 0 only, when `path` is given)."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._last_beat = 0.0
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._since = time.perf_counter()
        self.step = 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside as `name`."""
        began = time.perf_counter()
        self._beat(name, is_due=name != "step")
        yield
        self._seconds[name] += time.perf_counter() - began

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call; "other" is what no phase claimed, "all" the whole."""
        now = time.perf_counter()
        whole, self._since = now - self._since, now
        taken = {name: round(seconds, 4) for name, seconds in sorted(self._seconds.items())}
        taken["other"] = round(max(0.0, whole - sum(self._seconds.values())), 4)
        taken["all"] = round(whole, 4)
        self._seconds.clear()
        return taken

    def close(self) -> None:
        """Take the heartbeat away: this attempt left in order."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _beat(self, phase: str, is_due: bool) -> None:
        now = time.time()
        if self._path is None or (now - self._last_beat < MIN_SECONDS_BETWEEN_BEATS and not is_due):
            return
        self._last_beat = now
        beat = {"pid": os.getpid(), "host": socket.gethostname(), "time": now, "step": self.step, "phase": phase}
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(beat), encoding="utf-8")
        temporary.replace(self._path)
