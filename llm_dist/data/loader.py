"""The rows of a step for one rank, prepared ahead in background threads.

`rows(step)` is the same whatever the number of threads and whichever steps were asked before, so seeking costs nothing
and a resume replays nothing. Threads, not processes: handing a batch from one process to another costs
more than making it. Knows no model, no engine and no torch.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

from llm_dist.data.prefetch import Prefetcher
from llm_dist.data.reading import Places, Reading
from llm_dist.rows import Rows

_ORDER_BLOCK_SEQUENCES = 1 << 13
"""Sequences whose places are computed in one call; the permutation is 50 times dearer in small calls."""
_FIRST_BLOCK_SEQUENCES = 1 << 10
"""The first call is smaller, so that the first batch comes at once."""
_READ_SEQUENCES = 64
"""Fewer are not read in one call: a step of few rows is read with the steps after it."""


class Loader:
    """One rank's rows of any step; `close` it, or use it as a context."""

    def __init__(self, reading: Reading, ranks: int, rank: int, *, workers: int, first_step: int) -> None:
        """`workers` threads stay ahead, from `first_step` on; 0 prepares rows when asked."""
        self._reading = reading
        self._rows = reading.rank_rows(ranks, rank)
        self._group_steps = max(1, _READ_SEQUENCES // max(1, len(self._rows)))
        self._ahead_groups = workers + 1
        self._block: tuple[range, Places, Places | None] | None = None
        self._group: tuple[int, Rows] | None = None
        """The group last asked for, by its first step."""
        self._coming: dict[int, Future[Rows]] = {}
        """Groups that threads read or have read, by their first steps."""
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="data.loader") if workers else None
        self._prefetcher = Prefetcher(reading, self._rows, first_step) if reading.is_remote else None
        self._start(first_step)

    def rows(self, step: int) -> Rows:
        """The rank's rows of the step that follows `step` finished steps; the following ones are prepared meanwhile.

        Raises:
            UserError: a block they lie in is damaged; an error of a background thread comes out here as it was.
        """
        if self._group is None or not 0 <= step - self._group[0] < self._group_steps:
            self._group = None  # its memory is free for the next
            self._group = self._take(step)
        first, group = self._group
        count = len(self._rows)
        return group.part((step - first) * count, count, self._rows.start)._replace(step=step)

    def close(self) -> None:
        """Wait for the threads and forget what they prepared; a second call does nothing."""
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)
        self._coming.clear()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take(self, step: int) -> tuple[int, Rows]:
        """The group that holds `step`, and its first step; the groups behind it are begun."""
        first = next((first for first in self._coming if 0 <= step - first < self._group_steps), step)
        self._start(first)
        if self._threads is None:
            return first, self._read(first)
        return first, self._coming.pop(first).result()

    def _start(self, first: int) -> None:
        """Let the threads read the group from `first` on and those behind it; forget all others."""
        if self._threads is not None:
            self._read_ahead(self._threads, first)
        if self._prefetcher is not None:
            self._prefetcher.advance(first)

    def _read_ahead(self, threads: ThreadPoolExecutor, first: int) -> None:
        wanted = range(first, first + self._ahead_groups * self._group_steps, self._group_steps)
        for stale in [known for known in self._coming if known not in wanted]:
            self._coming.pop(stale).cancel()
        for missing in wanted:
            if missing not in self._coming:
                self._coming[missing] = threads.submit(self._read, missing)

    def _read(self, first: int) -> Rows:
        steps, places, partners = self._places(first)
        within = slice(first - steps.start, first - steps.start + self._group_steps)
        rows = self._reading.read(*places.of(within))
        return rows if partners is None else self._reading.paired(rows, *partners.of(within))

    def _places(self, first: int) -> tuple[range, Places, Places | None]:
        """Places of the rank's rows in a block of steps that is computed together and holds the group at `first`."""
        block = self._block
        # Threads may compute a block twice at its border, which costs time and changes nothing.
        if block is None or first not in block[0] or first + self._group_steps > block[0].stop:
            sequences = _FIRST_BLOCK_SEQUENCES if block is None else _ORDER_BLOCK_SEQUENCES
            groups = max(1, sequences // max(1, len(self._rows) * self._group_steps))
            steps = range(first, first + groups * self._group_steps)
            own = self._rows
            block = self._block = steps, self._reading.places(steps, own), self._reading.partners(steps, own)
        return block
