"""Held-out text as windows in which every token is scored exactly once.

The stream of n tokens is a circle that starts with a separator. Window i has the T inputs from token i T on; their
targets are the tokens one further. So the targets of all ceil(n / T) windows are tokens 1 .. n - 1 and, as the last
one, the separator at the stream's start, which closes the last document:

    scored tokens = n = tokens of text + documents (each document's end counts, its own separator does not)

The last window has n - (windows - 1) T scored positions; behind them stand separators that are not scored. Bits per
byte = nats / ln 2 / num_bytes, num_bytes being the UTF-8 bytes of the text. Knows no model and no torch.
"""

from __future__ import annotations

import numpy as np

from llm_dist.data.index import ShardSet
from llm_dist.rows import Rows


class HoldoutWindows:
    """The windows of a held-out folder, read in any order."""

    def __init__(
        self,
        shards: ShardSet,
        sequence_tokens: int,
        document_mask: bool = False,
        max_sequences: int | None = None,
    ) -> None:
        """`max_sequences` takes at most that many windows, spread evenly over the stream."""
        assert max_sequences is None or max_sequences > 0
        self._shards = shards
        self.sequence_tokens = sequence_tokens
        self.document_mask = document_mask
        num_all = -(-shards.num_tokens // sequence_tokens)
        num_windows = min(num_all, max_sequences or num_all)
        self._starts = np.arange(num_windows, dtype=np.int64) * num_all // num_windows * sequence_tokens
        self._num_scored = np.minimum(sequence_tokens, shards.num_tokens - self._starts)

    @property
    def num_windows(self) -> int:
        """How many windows there are."""
        return len(self._starts)

    @property
    def num_scored_tokens(self) -> int:
        """Targets scored over all windows; the folder's number of tokens unless `max_sequences` cut it short."""
        return int(self._num_scored.sum())

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the text that the scored tokens stand for.

        Exact for the whole folder. When it is cut short, the folder's bytes times the share of its tokens scored: the
        windows are then taken to have the folder's bytes per token.
        """
        return round(self._shards.num_bytes * self.num_scored_tokens / self._shards.num_tokens)

    def rows(self, chosen: range) -> Rows:
        """The windows of these numbers, of `num_windows`.

        Raises:
            UserError: a block they lie in is damaged.
        """
        width = self.sequence_tokens + 1
        picked = slice(chosen.start, chosen.stop, chosen.step)
        starts, num_scored = self._starts[picked], self._num_scored[picked]
        tokens = np.empty((len(chosen), width), np.int64)
        self._shards.gather(starts, width, tokens)
        ids = self._shards.document_ids(starts, self.sequence_tokens) if self.document_mask else None
        for row in np.flatnonzero(num_scored < self.sequence_tokens).tolist():
            # Past the last scored target the circle goes on with the stream's start: another window's to score.
            end = int(num_scored[row])
            tokens[row, end + 1 :] = tokens[row, end]
            if ids is not None:
                ids[row, end:] = ids[row, end]
        return Rows(tokens[:, :-1], tokens[:, 1:], num_scored, ids)
