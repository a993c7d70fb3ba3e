"""Which phase this rank is in, whether it goes on, and where its seconds go. Writes nothing, judges nothing.

The main thread says what it does; other threads read it. Every instant belongs to exactly one phase, so that the
seconds of all phases are the whole.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

T = TypeVar("T")
P = ParamSpec("P")

BEFORE, BETWEEN = "start", "loop"
"""What is left over before training begins, and after."""
FIRST_STEP = "first_step"
_ONLY_ONCE = {"data", "agree", "step"}
"""Phases of a step that count as replayed where the step was finished before."""
_BRIEF = {*_ONLY_ONCE, "report", "replicas"}
"""Phases that nobody outside need hear of at once."""
_STEPS_REMEMBERED = 101


@dataclass(frozen=True)
class Place:
    """Where the main thread is."""

    step: int
    """Optimizer steps finished."""
    phase: str
    phase_seconds: float
    moves: int
    """How often it has gone on: to another phase, or within one."""


class Watch:
    """Times the phases of one attempt on this rank."""

    def __init__(self) -> None:
        self.changed = threading.Event()
        """Set where somebody outside should hear of a new phase before long."""
        self.first_step_is_replay = False
        self._lock = threading.Lock()
        self._phases = [BEFORE]
        self._booked_at = self._entered_at = self._taken_at = time.perf_counter()
        self._recent: defaultdict[str, float] = defaultdict(float)
        self._total: defaultdict[str, float] = defaultdict(float)
        self._step_seconds: deque[float] = deque(maxlen=_STEPS_REMEMBERED)
        self._has_stepped = False
        self._moves = 0
        self._step = self.furthest_step = 0

    @property
    def step(self) -> int:
        """Optimizer steps finished."""
        return self._step

    @step.setter
    def step(self, step: int) -> None:
        self._step = step
        self.furthest_step = max(self.furthest_step, step)
        self._moves += 1

    @property
    def doing(self) -> str:
        """The phase that runs."""
        return self._phases[-1]

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside as `name`."""
        began = self._book(lambda: self._phases.append(name))
        if name not in _BRIEF:
            self.changed.set()
        try:
            yield
        finally:
            ended = self._book(self._phases.pop)
            if name == "step":
                self._step_seconds.append(ended - began)

    def stepping(self) -> AbstractContextManager[None]:
        """The phase of a step; the first one of an attempt, in which things are compiled, is a phase of its own."""
        if self._has_stepped:
            return self.phase("step")
        self._has_stepped = True
        self.first_step_is_replay = self._step < self.furthest_step
        return self.phase(FIRST_STEP)

    def begin(self) -> None:
        """Training begins: what came before is no part of its speed."""
        self._book(lambda: self._phases.__setitem__(0, BETWEEN))
        self.take()

    def mark(self) -> None:
        """Say that the phase goes on: what takes long, but moves, is no hang."""
        self._moves += 1

    def marking(self, items: Iterable[T]) -> list[T]:
        """A list of `items` that marks each time one is taken from it."""
        return _Marking(self.mark, items)

    def marked(self, action: Callable[P, T]) -> Callable[P, T]:
        """`action`, marking each time it is called."""

        def run(*args: P.args, **words: P.kwargs) -> T:
            self.mark()
            return action(*args, **words)

        return run

    def place(self) -> Place:
        """Where the main thread is now."""
        with self._lock:
            return Place(self._step, self._phases[-1], time.perf_counter() - self._entered_at, self._moves)

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call; "other" is what no phase claimed, "all" the whole."""
        now = self._book()
        whole, self._taken_at = now - self._taken_at, now
        other = sum(self._recent.pop(name, 0.0) for name in (BEFORE, BETWEEN))
        if FIRST_STEP in self._recent:
            self._recent["step"] += self._recent.pop(FIRST_STEP)
        taken = {name: round(seconds, 4) for name, seconds in sorted(self._recent.items())}
        self._recent.clear()
        return {**taken, "other": round(other, 4), "all": round(whole, 4)}

    def totals(self) -> dict[str, float]:
        """Seconds by phase since this was made; those of steps that were finished before are "replayed"."""
        self._book()
        with self._lock:
            return dict(self._total)

    def median_step_seconds(self) -> float:
        """Median of the last steps but the first; 0 before there are any."""
        with self._lock:
            return statistics.median(self._step_seconds or [0.0])

    def _book(self, change: Callable[[], object] | None = None) -> float:
        """Give the time since the last call to the phase that ran, then make the `change`; returns the time."""
        with self._lock:
            now = time.perf_counter()
            name, seconds = self._phases[-1], now - self._booked_at
            is_replay = name in _ONLY_ONCE and self._step < self.furthest_step
            self._recent[name] += seconds
            self._total["replayed" if is_replay else name] += seconds
            self._booked_at = now
            if change is not None:
                change()
                self._entered_at = now
                self._moves += 1
            return now


class _Marking(list[T]):
    def __init__(self, mark: Callable[[], None], items: Iterable[T]) -> None:
        super().__init__(items)
        self._mark = mark

    def __iter__(self) -> Iterator[T]:
        for item in super().__iter__():
            self._mark()
            yield item
