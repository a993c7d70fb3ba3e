"""Tell shards behind a network which cells the coming steps read, early enough that no step waits for them.

Lanes begin their pools at the same step, many cells at once; what is asked for PREFETCH_SEQUENCES ahead spreads these
requests over the steps before. Knows no network.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

from llm_dist.data.reading import Reading

PREFETCH_SEQUENCES = 1 << 12
"""Of one rank."""
_TELL_SEQUENCES = 1 << 9
"""Whose places are computed at once: fewer make the permutation dear, more come too early."""
_TELLS = 2
"""At each advance, so that the first one keeps nobody waiting and the next ones catch up."""
_FIRST_SEQUENCES = 1 << 6
"""Read at the start, before anything could be told."""
_READERS = 32
_CELLS_REMEMBERED = 1 << 12


class Prefetcher:
    """Follows one rank's steps."""

    def __init__(self, reading: Reading, rows: range, first_step: int) -> None:
        self._reading = reading
        self._rows = rows
        self._has_begun, self._told_until = False, first_step
        self._ahead_steps = -(-PREFETCH_SEQUENCES // max(1, len(rows)))
        self._tell_steps = max(1, _TELL_SEQUENCES // max(1, len(rows)))
        self._told: dict[tuple[int, int, int], None] = {}

    def advance(self, step: int) -> None:
        """Tell what more of the steps until PREFETCH_SEQUENCES behind `step` read, the nearest first."""
        if not self._has_begun or not self._told_until - 2 * self._ahead_steps <= step <= self._told_until:
            self._has_begun, self._told_until = True, step  # or somebody jumped
            self._read_rows(range(step, step + max(1, _FIRST_SEQUENCES // max(1, len(self._rows)))))
        for _ in range(_TELLS):
            if self._told_until >= step + self._ahead_steps:
                return
            steps = range(self._told_until, self._told_until + self._tell_steps)
            self._tell_cells(steps)
            self._told_until = steps.stop

    def _read_rows(self, steps: range) -> None:
        """Read what somebody waits for already, all at once; what goes wrong comes out where it is read again."""
        threads = ThreadPoolExecutor(_READERS, "data.first")
        for place in islice(self._windows(steps), _FIRST_SEQUENCES):
            threads.submit(self._read_row, *place)
        threads.shutdown(wait=False)

    def _read_row(self, number: int, epoch: int, window: int) -> None:
        source = self._reading.sources[number]
        for _, start, num_tokens in source.packing.spans(epoch, window):
            source.shards.tokens(start, num_tokens + 1)
            if self._reading.document_mask:
                source.shards.document_starts(start, num_tokens)

    def _tell_cells(self, steps: range) -> None:
        for number, epoch, window in self._windows(steps):
            source = self._reading.sources[number]
            cell = number, epoch, window // source.packing.cell_windows
            if cell not in self._told:
                self._told[cell] = None
                source.shards.prefetch(*source.packing.cell(epoch, cell[2]))
        while len(self._told) > _CELLS_REMEMBERED:
            del self._told[next(iter(self._told))]

    def _windows(self, steps: range) -> Iterator[tuple[int, int, int]]:
        """Source, epoch and window of each row."""
        places = self._reading.places(steps, self._rows)
        return zip(*(array.ravel().tolist() for array in places), strict=True)
