"""An interpolated, modified Kneser-Ney n-gram over token ids: the bar that a trained model has to clear.

It reads the same token ids as the model, so that both are compared in nats over the same tokens. It knows nothing
of the project: no torch, no shards.

Document borders are treated as the model sees them. A separator opens each document: it may be the oldest token of
a history, never a newer one, so that no history reaches back past it; the separator itself is predicted from the end
of the document before it.

Source: Chen and Goodman, "An Empirical Study of Smoothing Techniques for Language Modeling" (1998), section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

UNSEEN = -1
LOWEST_DISCOUNT = 0.1
"""Above zero, so that every context leaves some mass to what never followed it."""
USUAL_DISCOUNTS = (0.5, 1.0, 1.5)
"""For an order with too few n-grams to estimate its own."""


@dataclass(frozen=True)
class Level:
    """All n-grams of one length k, N of them, sorted by (context, last token)."""

    keys: Ints
    """[N] `context * vocabulary + last token`; a context is named by its row among the (k-1)-grams."""
    discounted: Floats
    """[N] count less its discount, over the count of its context."""
    left_over: Floats
    """[(k-1)-grams] the share of a context's mass that goes to the next lower order; 1 where nothing followed it."""

    def find(self, contexts: Ints, tokens: Ints, vocabulary: int) -> Ints:
        """Row of each (context, token), `UNSEEN` where there is none."""
        wanted = contexts * vocabulary + tokens
        rows = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        return np.where((contexts != UNSEEN) & (self.keys[rows] == wanted), rows, UNSEEN)


class KneserNey:
    """Interpolated modified Kneser-Ney: three discounts per order, estimated from counts of counts."""

    def __init__(self, levels: Sequence[Level], vocabulary: int, separator: int) -> None:
        self._levels = levels
        self._vocabulary = vocabulary
        self._separator = separator

    @classmethod
    def fit(cls, ids: NDArray[Any], order: int = 5, *, vocabulary: int, separator: int = 0) -> Self:
        """Count the stream `ids` [tokens] of ids below `vocabulary`."""
        tokens = _checked(ids, vocabulary)
        num_history = _history_lengths(tokens, separator, order)
        levels: list[Level] = []
        rows = np.zeros(len(tokens), np.int64)  # the n-gram that ends at each position; of length 0 there is one
        counts, num_contexts = np.zeros(0), 1
        keys = np.zeros(0, np.int64)
        for length in range(1, order + 1):
            ends = np.flatnonzero(num_history >= length - 1)
            contexts = rows[ends - 1] if length > 1 else rows[ends]
            longer, first, inverse, raw = np.unique(
                contexts * vocabulary + tokens[ends], return_index=True, return_inverse=True, return_counts=True
            )
            if length > 1:
                levels.append(_level(keys, _kept_or_extensions(counts, rows[ends[first]]), num_contexts, vocabulary))
                num_contexts = len(keys)
            keys = longer
            rows = np.full(len(tokens), UNSEEN)
            rows[ends] = inverse
            opens_document = (tokens[ends[first] - length + 1] == separator) & (length > 1)
            counts = np.where(opens_document | (length == order), raw, 0)
        levels.append(_level(keys, counts, num_contexts, vocabulary))
        return cls(levels, vocabulary, separator)

    def nats(self, ids: NDArray[Any]) -> float:
        """Negative log-likelihood of the stream `ids` [tokens], every token scored once."""
        return float(self.nats_per_token(ids).sum())

    def nats_per_token(self, ids: NDArray[Any]) -> Floats:
        """[tokens] negative log-likelihood of each token; the first of the stream has no history."""
        tokens = _checked(ids, self._vocabulary)
        num_history = _history_lengths(tokens, self._separator, len(self._levels))
        probability = np.full(len(tokens), 1 / self._vocabulary)
        contexts = np.zeros(len(tokens), np.int64)
        for length, level in enumerate(self._levels, start=1):
            contexts = np.where(num_history >= length - 1, contexts, UNSEEN)
            rows = level.find(contexts, tokens, self._vocabulary)
            probability *= np.where(contexts == UNSEEN, 1, level.left_over[contexts])
            probability += np.where(rows == UNSEEN, 0, level.discounted[rows])
            contexts = np.roll(rows, 1)
        nats: Floats = -np.log(probability)
        return nats

    def next_token(self, history: Sequence[int]) -> Floats:
        """[vocabulary] probability of each token after `history`, of which the part in reach counts."""
        probability = np.full(self._vocabulary, 1 / self._vocabulary)
        reach = _reach(history, self._separator, len(self._levels))
        for length, level in enumerate(self._levels[: len(reach) + 1], start=1):
            context = self._row_of(reach[len(reach) - length + 1 :])
            if context == UNSEEN:
                break
            first, last = np.searchsorted(level.keys, np.array([context, context + 1]) * self._vocabulary)
            probability *= level.left_over[context]
            probability[level.keys[first:last] % self._vocabulary] += level.discounted[first:last]
        return probability

    def _row_of(self, ngram: Sequence[int]) -> int:
        row = np.zeros(1, np.int64)
        for level, token in zip(self._levels, ngram, strict=False):
            row = level.find(row, np.array([token]), self._vocabulary)
        return int(row[0])


def _checked(ids: NDArray[Any], vocabulary: int) -> Ints:
    tokens = np.asarray(ids).astype(np.int64)
    assert tokens.ndim == 1 and len(tokens) and tokens.min() >= 0 and tokens.max() < vocabulary
    return tokens


def _history_lengths(tokens: Ints, separator: int, order: int) -> Ints:
    """[tokens] how many tokens before each one it may look at: back to its document's separator, at most order - 1."""
    positions = np.arange(len(tokens))
    newest_separator = np.maximum.accumulate(np.where(tokens == separator, positions, 0))
    document_start = np.concatenate(([0], newest_separator[:-1]))
    return np.minimum(positions - document_start, order - 1)


def _reach(history: Sequence[int], separator: int, order: int) -> list[int]:
    reach: list[int] = []
    for token in reversed(history):
        if len(reach) == order - 1:
            break
        reach.insert(0, token)
        if token == separator:
            break
    return reach


def _kept_or_extensions(kept: NDArray[Any], suffixes: Ints) -> NDArray[Any]:
    """Counts of a lower order: in how many distinct longer n-grams each one ends.

    An n-gram that opens a document cannot be extended to the left; it keeps how often it occurred (`kept` above 0).
    """
    return np.where(kept > 0, kept, np.bincount(suffixes, minlength=len(kept)))


def _level(keys: Ints, counts: NDArray[Any], num_contexts: int, vocabulary: int) -> Level:
    contexts = keys // vocabulary
    class_of = np.minimum(counts, 3).astype(np.int64)
    discounts = np.array([0.0, *_discounts(counts)])[class_of]
    mass = np.bincount(contexts, weights=counts, minlength=num_contexts)
    taken = np.bincount(contexts, weights=discounts, minlength=num_contexts)
    followed = np.where(mass > 0, mass, 1)
    return Level(
        keys=keys,
        discounted=(counts - discounts) / followed[contexts],
        left_over=np.where(mass > 0, taken / followed, 1.0),
    )


def _discounts(counts: NDArray[Any]) -> tuple[float, ...]:
    """What is taken from a count of 1, of 2, and of 3 or more (Chen and Goodman 1998, equation 26)."""
    n1, n2, n3, n4 = (int((counts == count).sum()) for count in (1, 2, 3, 4))
    if not n1 * n2 * n3:
        return USUAL_DISCOUNTS
    y = n1 / (n1 + 2 * n2)
    estimated = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
    return tuple(min(max(discount, LOWEST_DISCOUNT), count) for count, discount in enumerate(estimated, start=1))
