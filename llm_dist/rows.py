"""What travels from data to objective: rows of tokens as they stand in the text, and where documents begin.

The only thing the two know of each other. Knows no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

TokenArray = npt.NDArray[np.integer[Any]]


class Rows(NamedTuple):
    """Some rows of a step's global set, or of held-out text."""

    inputs: TokenArray
    """[n, T]."""
    following: TokenArray
    """[n, T]: the token that follows each input in its document's text; a document is followed by a separator."""
    num_scored: TokenArray | None = None
    """[n]: only the first so many positions of a row are scored, the rest is padding; None: all of them."""
    document_ids: TokenArray | None = None
    """[n, T]: counted up in each row at every document that begins there; None without a document mask."""
    first_row: int = 0
    """Index of the first row in the step's global set."""
    sources: TokenArray | None = None
    """[n]: which source each row is from; None where there are no sources."""

    @property
    def num_rows(self) -> int:
        """How many there are, n."""
        return len(self.inputs)

    def part(self, first: int, count: int, first_row: int) -> Rows:
        """`count` rows from `first` on, the first of them being row `first_row` of its step's set; not copied."""
        chosen = slice(first, first + count)
        return Rows(
            self.inputs[chosen],
            self.following[chosen],
            None if self.num_scored is None else self.num_scored[chosen],
            None if self.document_ids is None else self.document_ids[chosen],
            first_row,
            None if self.sources is None else self.sources[chosen],
        )

    def scored_tokens(self) -> TokenArray:
        """Scored positions of each row: [n]."""
        if self.num_scored is None:
            return np.full(self.num_rows, self.inputs.shape[1], np.int64)
        return self.num_scored


def merge(parts: Sequence[tuple[TokenArray, Rows]], num_rows: int) -> Rows:
    """Rows of several readings as one: each part [n] goes to the places [n] beside it, which make up `num_rows`."""

    def together(arrays: Sequence[TokenArray]) -> TokenArray:
        whole = np.empty((num_rows, *arrays[0].shape[1:]), arrays[0].dtype)
        for (places, _), array in zip(parts, arrays, strict=True):
            whole[places] = array
        return whole

    _, first = parts[0]
    return Rows(
        together([rows.inputs for _, rows in parts]),
        together([rows.following for _, rows in parts]),
        None if first.num_scored is None else together([rows.scored_tokens() for _, rows in parts]),
        None if first.document_ids is None else together([rows.document_ids for _, rows in parts]),  # type: ignore[misc]
    )
