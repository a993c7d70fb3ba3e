"""Held-out text as windows in which every token is scored exactly once.

The stream of n tokens is a circle that starts with a separator. Window i has the T inputs from token i T on; their
targets are the tokens one further. So the targets of all ceil(n / T) windows are tokens 1 .. n - 1 and, as the last
one, the separator at the stream's start, which closes the last document:

    scored tokens = n = tokens of text + documents (each document's end counts, its first separator does not)

The last window has n - (windows - 1) T scored positions; behind them stand separators that are not scored. Bits per
byte = nats / ln 2 / num_bytes, num_bytes being the UTF-8 bytes of the text. Knows no model and no torch.
"""

from __future__ import annotations

import numpy as np

from llm_dist.data.index import ShardSet
from llm_dist.data.loader import Rows, document_ids
from llm_dist.data.order import Indices


def windows(
    shards: ShardSet, sequence_tokens: int, document_mask: bool = False, max_sequences: int | None = None
) -> Windows:
    """The windows of a held-out folder; `max_sequences` takes that many, spread evenly over the stream."""
    num_windows = -(-shards.num_tokens // sequence_tokens)
    num_taken = num_windows if max_sequences is None else min(max_sequences, num_windows)
    # Rounded down, so all windows are taken when none must go; the last and partial one only then.
    chosen = np.arange(num_taken, dtype=np.int64) * num_windows // max(1, num_taken)
    return Windows(shards, sequence_tokens, document_mask, chosen)


class Windows:
    """A fixed list of windows, read in any order; `windows` makes it."""

    def __init__(self, shards: ShardSet, sequence_tokens: int, document_mask: bool, chosen: Indices) -> None:
        self._shards = shards
        self._sequence_tokens = sequence_tokens
        self._document_mask = document_mask
        self._starts = chosen * sequence_tokens
        self._num_scored = np.minimum(sequence_tokens, shards.num_tokens - self._starts)

    def __len__(self) -> int:
        return len(self._starts)

    @property
    def num_scored_tokens(self) -> int:
        """Targets scored over all windows; the folder's number of tokens unless `max_sequences` cut it short."""
        return int(self._num_scored.sum())

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the text the scored tokens stand for.

        Exact for the whole folder. When it is cut short, the folder's bytes times the share of tokens scored: the
        windows are then taken to have the folder's bytes per token.
        """
        return round(self._shards.num_bytes * self.num_scored_tokens / self._shards.num_tokens)

    def rows(self, wanted: range) -> Rows:
        """Windows `wanted` (contiguous positions in this list) as rows [n, T + 1] with their `num_scored`.

        Raises:
            UserError: a chunk they lie in is damaged.
        """
        starts = self._starts[wanted.start : wanted.stop]
        num_scored = self._num_scored[wanted.start : wanted.stop]
        count = self._sequence_tokens + 1
        tokens = np.empty((len(starts), count), np.int64)
        self._shards.gather(starts, count, tokens)
        ids = document_ids(self._shards, starts, count) if self._document_mask else None
        for row in np.flatnonzero(num_scored < self._sequence_tokens).tolist():
            end = int(num_scored[row])
            # The circle goes on with the stream's start; only its separator belongs to this window.
            tokens[row, end:] = tokens[row, end]
            if ids is not None:
                ids[row, end:] = ids[row, end]
        return Rows(wanted.start, tokens, ids, num_scored)
