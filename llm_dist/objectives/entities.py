"""Entities that a sequence of tags spells, and how many of them were found.

As conlleval reads tags: an I or E that no entity of its kind stands before begins one. Knows BIO and BIOES. A test
holds it against seqeval, which reports after training.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

OUTSIDE = "O"


class Entity(NamedTuple):
    """A run of words."""

    kind: str
    first: int
    end: int
    """The word behind its last."""


def entities(tags: Sequence[str]) -> list[Entity]:
    """The entities of a sentence, in order."""
    found: list[Entity] = []
    first, kind, before = -1, "", OUTSIDE
    for place, tag in enumerate([*tags, OUTSIDE]):
        prefix, _, name = tag.partition("-")
        if first >= 0 and (prefix in (OUTSIDE, "B", "S") or before in ("E", "S") or name != kind):
            found.append(Entity(kind, first, place))
            first = -1
        if first < 0 and prefix != OUTSIDE:
            first, kind = place, name
        before = prefix
    return found


class Found(NamedTuple):
    """Entities of many sentences: found rightly, found, and there."""

    right: int
    found: int
    there: int


def count_found(pairs: Iterable[tuple[Sequence[str], Sequence[str]]]) -> Found:
    """Counts over (true tags, predicted tags) of sentences."""
    right = found = there = 0
    for true, predicted in pairs:
        of_true, of_predicted = set(entities(true)), set(entities(predicted))
        right, found, there = right + len(of_true & of_predicted), found + len(of_predicted), there + len(of_true)
    return Found(right, found, there)
