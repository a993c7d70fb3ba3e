"""The rows of a step for one rank, prepared ahead in background threads.

`rows(step)` is the same whatever the number of threads and whichever steps were asked before, so seeking costs nothing
and a resume replays nothing. Threads, not processes: handing a batch from one process to another costs
more than making it. Knows no model, no engine and no torch.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llm_dist.data.index import ShardSet
from llm_dist.data.order import Indices, Order, rank_rows

_ORDER_BLOCK_SEQUENCES = 1 << 15
"""Sequences whose places are computed in one call; the permutation is 100 times dearer in small calls."""


@dataclass(frozen=True)
class Rows:
    """Rows of tokens as they stand in the stream; an objective makes inputs and labels of them."""

    first_row: int
    """Index of the first row in the step's global set."""
    tokens: npt.NDArray[np.int64]
    """[n, T + 1]: T inputs and the token after them."""
    document_ids: npt.NDArray[np.int64] | None = None
    """[n, T + 1], counted up in each row at every separator, which belongs to the document it opens; None: no mask."""


def document_ids(shards: ShardSet, starts: Indices, count: int) -> npt.NDArray[np.int64]:
    """For rows of `count` tokens from `starts` [n] on: how many documents have begun in the row up to each token."""
    ids = shards.document_marks(starts, count)
    return np.cumsum(ids, axis=1, out=ids)


class Loader:
    """One rank's rows of any step; `close` it, or use it as a context."""

    def __init__(
        self,
        shards: ShardSet,
        order: Order,
        sequences_per_step: int,
        ranks: int,
        rank: int,
        *,
        document_mask: bool,
        workers: int,
        first_step: int,
    ) -> None:
        """`workers` threads stay up to `workers` + 1 steps ahead, from `first_step` on; 0 prepares rows when asked."""
        self._shards = shards
        self._order = order
        self._sequences_per_step = sequences_per_step
        self._rows = rank_rows(sequences_per_step, ranks, rank)
        self._document_mask = document_mask
        self._block_steps = max(1, _ORDER_BLOCK_SEQUENCES // max(1, len(self._rows)))
        self._block: tuple[int, Indices] | None = None
        self._ahead_steps = workers + 1
        self._prepared: dict[int, Future[Rows]] = {}
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="data.loader") if workers else None
        self._prefetch(first_step)

    def rows(self, step: int) -> Rows:
        """The rank's rows of the step that follows `step` finished steps; the following ones are prepared meanwhile.

        Raises:
            UserError: a chunk they lie in is damaged; an error of a background thread comes out here as it was.
        """
        if self._threads is None:
            return self._read(step)
        self._prefetch(step)
        return self._prepared.pop(step).result()

    def close(self) -> None:
        """Wait for the threads and forget what they prepared; a second call does nothing."""
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)
        self._prepared.clear()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _prefetch(self, step: int) -> None:
        if self._threads is None:
            return
        wanted = range(step, step + self._ahead_steps)
        for stale in [known for known in self._prepared if known not in wanted]:
            self._prepared.pop(stale).cancel()
        for missing in wanted:
            if missing not in self._prepared:
                self._prepared[missing] = self._threads.submit(self._read, missing)

    def _read(self, step: int) -> Rows:
        starts = self._starts(step)
        count = self._order.sequence_tokens + 1
        tokens = np.empty((len(starts), count), np.int64)
        self._shards.gather(starts, count, tokens)
        ids = document_ids(self._shards, starts, count) if self._document_mask else None
        return Rows(self._rows.start, tokens, ids)

    def _starts(self, step: int) -> Indices:
        """First tokens of the rank's rows, out of a block of steps whose order is computed together."""
        number, within = divmod(step, self._block_steps)
        block = self._block
        # Threads may compute a block twice at its border, which costs time and changes nothing.
        if block is None or block[0] != number:
            steps = np.arange(number * self._block_steps, (number + 1) * self._block_steps, dtype=np.int64)
            ids = steps[:, None] * self._sequences_per_step + np.arange(self._rows.start, self._rows.stop)
            block = self._block = number, self._order.starts(ids.reshape(-1))[1].reshape(ids.shape)
        starts: Indices = block[1][within]
        return starts
