"""What travels from data to objective: rows of tokens as they stand in the text, and where documents begin.

The only thing the two know of each other. Knows no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

TokenArray = npt.NDArray[np.integer[Any]]


NOT_LABELLED = -100
"""Target of an input that has no label."""
HELD_OUT = -1
"""Step of held-out rows, which belong to none: what is drawn for them is drawn once."""


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
    step: int = HELD_OUT
    """Steps finished before the one whose rows these are."""
    row_stride: int = 1
    """From one row's index to the next one's."""
    targets: TokenArray | None = None
    """[n], a label of each row's document, or [n, T], of each input; None where nothing is labelled."""
    partners: TokenArray | None = None
    """[n, T]: text of another document, for objectives that pair texts; None for others."""
    num_partner_tokens: TokenArray | None = None
    """[n]: how many tokens of `partners` are text; 0 where no other document was found."""

    num_context: TokenArray | None = None
    """[n]: the first so many positions of a row are scored elsewhere; None: none of them."""

    @property
    def num_rows(self) -> int:
        """How many there are, n."""
        return len(self.inputs)

    @property
    def numbers(self) -> npt.NDArray[np.int64]:
        """[n]: index of each row in the step's global set, or among held-out rows."""
        return self.first_row + self.row_stride * np.arange(self.num_rows)

    def part(self, first: int, count: int, first_row: int) -> Rows:
        """`count` rows from `first` on, the first of them being row `first_row` of its step's set; not copied."""
        chosen = slice(first, first + count)
        fields = zip(self._fields, self, strict=True)
        arrays: dict[str, Any] = {name: value[chosen] for name, value in fields if isinstance(value, np.ndarray)}
        return self._replace(**arrays, first_row=first_row)

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
        targets=None if first.targets is None else together([rows.targets for _, rows in parts]),  # type: ignore[misc]
    )
