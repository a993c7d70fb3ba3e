"""Where the hours of a run went, over all its attempts: rank 0 keeps the account beside its heartbeat.

Each attempt has a file of its own, which begins with what the ones before it came to, and is replaced again and again:
whenever the process is killed, the account of all but its last second stands. `launcher/goodput.py` reads it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from llm_dist.train.watch import BEFORE, Watch

_CATEGORY = {
    BEFORE: "start_up",
    "build": "start_up",
    "restore": "start_up",
    "data": "data",
    "agree": "data",  # rank 0 waits there for the rank whose rows come last
    "step": "step",
    "replayed": "replayed",
    "save": "save",
    "eval": "eval",
}
CATEGORIES = ("step", "data", "save", "compile", "eval", "replayed", "start_up", "down", "other")
"""`step` alone is what the run is for."""


@dataclass(frozen=True)
class Account:
    """What a ledger's file says."""

    attempt: int
    run_started: float
    """Unix time at which the process of the first attempt began."""
    time: float
    """Until when this holds."""
    furthest_step: int
    """Last step that was ever finished, here or in an earlier attempt."""
    seconds: dict[str, float]
    """By category, since `run_started`; their sum is the time between."""
    ended: str | None = None
    """How the attempt ended; None while it runs, and where it was killed."""


class Ledger:
    """The account of a run, kept by rank 0 of its newest attempt."""

    def __init__(self, folder: Path, attempt: int, watch: Watch, started: float) -> None:
        """`started`: unix time at which this process began."""
        self._path = folder / f"attempt_{attempt:04d}.json"
        self._attempt, self._watch = attempt, watch
        self._begun, self._from = time.time(), sum(watch.totals().values())
        before = _newest(folder, attempt)
        if before is None:
            self._run_started, self._before = started, dict.fromkeys(CATEGORIES, 0.0)
        else:
            started = max(started, before.time)
            self._run_started, self._before = before.run_started, {**before.seconds}
            self._before["down"] += started - before.time
            watch.furthest_step = max(watch.furthest_step, before.furthest_step)
        self._before["start_up"] += max(0.0, self._begun - started) - self._from
        folder.mkdir(exist_ok=True)
        self.write()

    def account(self, ended: str | None = None, hung: tuple[str, float] = (BEFORE, 0.0)) -> Account:
        """What it comes to now; `hung`: the phase in which nothing went on, and how many of its seconds are lost."""
        own = self._watch.totals()
        until = self._begun + sum(own.values()) - self._from
        seconds = dict(self._before)
        for category, each in _by_category(own, self._watch).items():
            seconds[category] += each
        category = _CATEGORY.get(hung[0], "other")
        lost = min(hung[1], seconds[category])
        seconds[category] -= lost
        seconds["down"] += lost
        seconds = {name: round(each, 4) for name, each in seconds.items()}
        return Account(self._attempt, self._run_started, until, self._watch.furthest_step, seconds, ended)

    def fractions(self) -> dict[str, float]:
        """Share of each category in the time since the run began."""
        seconds = self.account().seconds
        whole = max(1e-9, sum(seconds.values()))
        return {name: round(each / whole, 5) for name, each in seconds.items()}

    def write(self, ended: str | None = None, hung: tuple[str, float] = (BEFORE, 0.0)) -> None:
        """Replace the file; arguments as of `account`."""
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(self.account(ended, hung))), encoding="utf-8")
        temporary.replace(self._path)


def process_started() -> float:
    """Unix time at which this process began, its imports included; where it can, finer than psutil's whole seconds."""
    now = time.time()
    try:
        ticks = int(Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        age = now - psutil.Process().create_time()
    return now - max(0.0, age)


def _by_category(total: Mapping[str, float], watch: Watch) -> dict[str, float]:
    """Compiling is what the first step takes beyond the median of the others."""
    seconds = dict.fromkeys(CATEGORIES, 0.0)
    for phase, each in total.items():
        if phase == "first_step":
            usual = min(each, watch.median_step_seconds())
            seconds["replayed" if watch.first_step_is_replay else "step"] += usual
            seconds["compile"] += each - usual
        else:
            seconds[_CATEGORY.get(phase, "other")] += each
    return seconds


def _newest(folder: Path, attempt: int) -> Account | None:
    """The account of the last attempt before this one that left one."""
    for number in range(attempt - 1, 0, -1):
        try:
            return Account(**json.loads((folder / f"attempt_{number:04d}.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            continue
    return None
