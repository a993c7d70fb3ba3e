"""Small sources whose every token says where it stands, and readings of them in cells small enough to be many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llm_dist.data.index import ShardSet, open_shards
from llm_dist.data.mixture import Segment
from llm_dist.data.order import Order
from llm_dist.data.packing import BestFit, Concatenated, Packing, Separate
from llm_dist.data.reading import Reading, Source
from llm_dist.rows import Rows
from tests.unit.data.tiny_shards import write_shards

SEPARATOR = 0


class Stream(NamedTuple):
    """What a shard folder holds, told from outside."""

    tokens: np.ndarray
    """Token p is p + 1, but for separators."""
    is_start: np.ndarray
    """Whether a document begins at each token."""


def write_source(folder: Path, tokenizer: Path, lengths: Sequence[int], chunk_tokens: int = 64) -> Stream:
    """Documents of `lengths` tokens behind their separators."""
    firsts = np.cumsum([0, *(length + 1 for length in lengths)])[:-1]
    documents = [range(first + 2, first + 2 + length) for first, length in zip(firsts.tolist(), lengths, strict=True)]
    stream = write_shards(folder, documents, tokenizer, chunk_tokens=chunk_tokens)
    is_start = np.zeros(len(stream), np.bool_)
    is_start[firsts] = True
    return Stream(stream, is_start)


def packed(shards: ShardSet, packing: str, sequence_tokens: int, seed: int, cache: Path) -> Packing:
    """As `data.packing` names it."""
    if packing == "separate":
        return Separate(shards, sequence_tokens, cache)
    if packing == "best_fit":
        return BestFit(shards, sequence_tokens, cache)
    return Concatenated(shards, sequence_tokens, seed)


class Sources:
    """Opened folders by name."""

    def __init__(self, folders: Mapping[str, Path]) -> None:
        self.cache = next(iter(folders.values())).parent / "cache"
        self.shards = {name: open_shards(folder) for name, folder in folders.items()}

    def reading(
        self,
        packing: str,
        segments: Sequence[tuple[int, Mapping[str, float]]],
        *,
        names: str = "abc",
        sequences_per_step: int = 7,
        sequence_tokens: int = 20,
        cell_windows: int = 1,
        seed: int = 4,
        document_mask: bool = True,
        pair_seed: int | None = None,
    ) -> Reading:
        """A mixture of the sources `names`."""
        sources = []
        for name in names:
            packing_of = packed(self.shards[name], packing, sequence_tokens, seed, self.cache)
            order = Order(packing_of.num_windows, cell_windows, seed)
            sources.append(Source(name, self.shards[name], packing_of, order))
        exact = [
            Segment(first, {name: Fraction(str(weight)) for name, weight in weights.items()})
            for first, weights in segments
        ]
        return Reading(
            sources, exact, sequences_per_step, sequence_tokens, document_mask=document_mask, pair_seed=pair_seed
        )

    def close(self) -> None:
        for shards in self.shards.values():
            shards.close()


def assert_same(rows: Rows, other: Rows) -> None:
    """Equal in every field."""
    assert rows.first_row == other.first_row
    for field, ours, theirs in zip(Rows._fields, rows, other, strict=True):
        assert (ours is None) == (theirs is None), field
        np.testing.assert_array_equal(ours, theirs, field)


def laid_together(parts: Sequence[Rows]) -> Rows:
    """The ranks' rows, or a rank's micro-batches, as one; each begins where the one before ended."""
    first_row = parts[0].first_row
    counts = [part.num_rows for part in parts]
    assert [part.first_row - first_row for part in parts] == np.cumsum([0, *counts[:-1]]).tolist()

    def together(field: str) -> np.ndarray:
        return np.concatenate([getattr(part, field) for part in parts])

    arrays = [name for name, value in zip(Rows._fields, parts[0], strict=True) if isinstance(value, np.ndarray)]
    return parts[0]._replace(**{name: together(name) for name in arrays})
