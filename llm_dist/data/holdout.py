"""Held-out text as windows: every token scored exactly once, or every document on its own.

For language modelling the stream of n tokens is a circle that starts with a separator. Window i has the T inputs from
token i T on; their targets are the tokens one further. So the targets of all ceil(n / T) windows are tokens 1 .. n - 1
and, as the last one, the separator at the stream's start, which closes the last document:

    scored tokens = n = tokens of text + documents (each document's end counts, its own separator does not)

The last window has n - (windows - 1) T scored positions; behind them stand separators that are not scored. Bits per
byte = nats / ln 2 / num_bytes, num_bytes being the UTF-8 bytes of the text.

With a stride N < T windows begin at every N-th token, and all but the first score only their last N positions: every
token is still scored once, with at least T - N tokens of context as soon as there are so many before it.

Where documents are read one by one (`data.packing="separate"`, labelled data), so they are here, in their order.
Knows no model and no torch.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from llm_dist.data import pairs
from llm_dist.data.index import ShardSet
from llm_dist.data.order import Indices
from llm_dist.data.packing import Separate
from llm_dist.rows import HELD_OUT, Rows


class Windows(Protocol):
    """Held-out text, cut into rows."""

    @property
    def num_windows(self) -> int:
        """How many there are."""

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the text that they hold."""

    def rows(self, chosen: range) -> Rows:
        """The windows of these numbers, of `num_windows`.

        Raises:
            UserError: a block they lie in is damaged.
        """


class SeparateWindows:
    """Each document on its own, or in pieces where it is longer than a sequence."""

    def __init__(
        self,
        packing: Separate,
        num_bytes: int,
        max_sequences: int | None = None,
        pair_seed: int | None = None,
    ) -> None:
        """`num_bytes` of text lie in all windows; with a `pair_seed`, each row comes with text of another document."""
        self._packing, self._pair_seed = packing, pair_seed
        self._chosen = _spread(self._packing.num_windows, max_sequences)
        self.num_windows = len(self._chosen)
        self.num_bytes = round(num_bytes * self.num_windows / self._packing.num_windows)

    def rows(self, chosen: range) -> Rows:
        """The windows of these numbers, of `num_windows`."""
        rows = self._read(self._chosen[chosen.start : chosen.stop : chosen.step])
        rows = rows._replace(first_row=chosen.start, row_stride=chosen.step)
        if self._pair_seed is None:
            return rows
        documents = self._packing.documents(self._chosen)[None]
        others = pairs.partners(self._pair_seed, range(HELD_OUT, HELD_OUT + 1), range(self.num_windows), documents)[0]
        own = others[chosen.start : chosen.stop : chosen.step]
        has_partner = own != pairs.NONE
        text = self._read(self._chosen[np.where(has_partner, own, 0)])
        return rows._replace(partners=text.inputs, num_partner_tokens=np.where(has_partner, text.scored_tokens(), 0))

    def _read(self, windows: Indices) -> Rows:
        return self._packing.rows(np.zeros_like(windows), windows, document_mask=False)


def _spread(num_all: int, most: int | None) -> Indices:
    """At most `most` of `num_all` windows, spread evenly: [n]."""
    num_chosen = min(num_all, most or num_all)
    return np.arange(num_chosen, dtype=np.int64) * num_all // num_chosen


class HoldoutWindows:
    """The windows of a held-out folder, read in any order."""

    def __init__(
        self,
        shards: ShardSet,
        sequence_tokens: int,
        document_mask: bool = False,
        max_sequences: int | None = None,
        stride_tokens: int | None = None,
    ) -> None:
        """`max_sequences` takes at most that many windows, spread evenly over the stream; T is the default stride."""
        assert max_sequences is None or max_sequences > 0
        stride_tokens = stride_tokens or sequence_tokens
        assert stride_tokens <= sequence_tokens
        self._shards = shards
        self.sequence_tokens = sequence_tokens
        self.document_mask = document_mask
        num_all = 1 + -(-max(0, shards.num_tokens - sequence_tokens) // stride_tokens)
        self._starts = _spread(num_all, max_sequences) * stride_tokens
        self._num_scored = np.minimum(sequence_tokens, shards.num_tokens - self._starts)
        self._num_context = np.where(self._starts > 0, sequence_tokens - stride_tokens, 0)

    @property
    def num_windows(self) -> int:
        """How many windows there are."""
        return len(self._starts)

    @property
    def num_scored_tokens(self) -> int:
        """Targets scored over all windows; the folder's number of tokens unless `max_sequences` cut it short."""
        return int((self._num_scored - self._num_context).sum())

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
        return Rows(
            tokens[:, :-1],
            tokens[:, 1:],
            num_scored,
            ids,
            chosen.start,
            row_stride=chosen.step,
            num_context=self._num_context[picked],
        )
