"""Tell shards behind a network which cells the coming steps read, early enough that no step waits for them.

Lanes begin their pools at the same step, many cells at once; what is asked for PREFETCH_SEQUENCES ahead spreads these
requests over the steps before. Knows no network.
"""

from __future__ import annotations

from llm_dist.data.reading import Reading

PREFETCH_SEQUENCES = 1 << 12
"""Of one rank."""
_TELL_SEQUENCES = 1 << 9
"""Told at once: fewer make the permutation dear, more come too early."""
_CELLS_REMEMBERED = 1 << 12


class Prefetcher:
    """Follows one rank's steps."""

    def __init__(self, reading: Reading, rows: range, first_step: int) -> None:
        self._reading = reading
        self._rows = rows
        self._told_until = first_step
        self._ahead_steps = -(-PREFETCH_SEQUENCES // max(1, len(rows)))
        self._tell_steps = max(1, _TELL_SEQUENCES // max(1, len(rows)))
        self._told: dict[tuple[int, int, int], None] = {}

    def advance(self, step: int) -> None:
        """Tell what steps until PREFETCH_SEQUENCES behind `step` read, the nearest first."""
        if not self._told_until - 2 * self._ahead_steps <= step <= self._told_until:
            self._told_until = step  # somebody jumped
        while self._told_until < step + self._ahead_steps:
            steps = range(self._told_until, self._told_until + self._tell_steps)
            self._tell(steps)
            self._told_until = steps.stop

    def _tell(self, steps: range) -> None:
        places = self._reading.places(steps, self._rows)
        each = zip(*(array.ravel().tolist() for array in places), strict=True)
        for number, epoch, window in each:
            source = self._reading.sources[number]
            cell = number, epoch, window // source.packing.cell_windows
            if cell not in self._told:
                self._told[cell] = None
                source.shards.prefetch(*source.packing.cell(epoch, cell[2]))
        while len(self._told) > _CELLS_REMEMBERED:
            del self._told[next(iter(self._told))]
