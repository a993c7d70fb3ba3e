"""Held-out text as windows in which every token is scored exactly once.

The stream of n tokens is a circle that starts with a separator. Window i has the T inputs from token i T on; their
targets are the tokens one further. So the targets of all ceil(n / T) windows are tokens 1 .. n - 1 and, as the last
one, the separator at the stream's start, which closes the last document:

    scored tokens = n = tokens of text + documents (each document's end counts, its own separator does not)

The last window has n - (windows - 1) T scored positions; behind them stand separators that are not scored. Bits per
byte = nats / ln 2 / num_bytes, num_bytes being the UTF-8 bytes of the text. Knows no model and no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llm_dist.data.index import ShardSet
from llm_dist.data.loader import document_ids


@dataclass(frozen=True)
class HoldoutWindow:
    """One row of held-out text."""

    tokens: npt.NDArray[np.int64]
    """[T + 1]: T inputs and the token after them."""
    document_ids: npt.NDArray[np.int64] | None
    """[T + 1], counted up at every separator; None without a document mask."""
    num_scored: int
    """The first so many of the T positions are scored."""


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

    def window(self, index: int) -> HoldoutWindow:
        """Window `index` of `num_windows`.

        Raises:
            UserError: a chunk it lies in is damaged.
        """
        start, num_scored = int(self._starts[index]), int(self._num_scored[index])
        # Past the last scored target the circle goes on with the stream's start, which is another window's to score.
        tokens = np.full(self.sequence_tokens + 1, self._shards.tokens(start + num_scored, 1)[0], np.int64)
        tokens[:num_scored] = self._shards.tokens(start, num_scored)
        documents = None
        if self.document_mask:
            documents = document_ids(self._shards, self._starts[index : index + 1], self.sequence_tokens + 1)[0]
            documents[num_scored:] = documents[num_scored]
        return HoldoutWindow(tokens, documents, num_scored)
