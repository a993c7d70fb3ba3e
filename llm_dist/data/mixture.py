"""How many sequences a step takes from each source: exact arithmetic of weights, no drawing.

Of a segment's first n sequences the first source gives its share, rounded; the second its share, among those after the
first, of what is left, rounded; and so on. Each is a count that never falls as n grows, they sum to n, and any n is
reached at once. With K sources none is further than (1 + ln K) / 2 sequences from its share. Sources continue their own
sequence numbers over segments, so nothing is lost or repeated when weights change. Knows no tokens and no files.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Segment:
    """Weights from a step on, until the next segment."""

    from_step: int
    """The first step it rules is the one after so many finished steps."""
    weights: Mapping[str, Fraction]
    """By source; what is absent gives nothing. They need not sum to 1."""


def exact(weight: float) -> Fraction:
    """The number as it is written: 0.1 is a tenth."""
    return Fraction(str(weight))


class Mixture:
    """Which sequences of which source a step reads."""

    def __init__(self, names: Sequence[str], segments: Sequence[Segment], sequences_per_step: int) -> None:
        """Segments in the order of their steps, the first from step 0 on."""
        assert segments and segments[0].from_step == 0
        self.names = list(names)
        self.sequences_per_step = sequences_per_step
        self._from_steps = [segment.from_step for segment in segments]
        assert self._from_steps == sorted(set(self._from_steps))
        self._shares = [_shares_of_what_is_left(self.names, segment) for segment in segments]
        self._before = [[0] * len(self.names)]
        for number, until in enumerate(self._from_steps[1:]):
            self._before.append(self._counts_in(number, until, until + 1)[0].tolist())

    def counts(self, step: int) -> list[int]:
        """Sequences that each source has given when `step` steps are finished."""
        counts: list[int] = self.counts_after(range(step, step))[0].tolist()
        return counts

    def counts_after(self, steps: range) -> npt.NDArray[np.int64]:
        """`counts` before the first of `steps` and after each: [steps + 1, sources]."""
        counts = np.empty((len(steps) + 1, len(self.names)), np.int64)
        first = steps.start
        while first <= steps.stop:
            number = bisect_right(self._from_steps, first) - 1
            end = min([steps.stop + 1, *self._from_steps[number + 1 : number + 2]])
            counts[first - steps.start : end - steps.start] = self._counts_in(number, first, end)
            first = end
        return counts

    def _counts_in(self, number: int, first: int, end: int) -> npt.NDArray[np.int64]:
        """Counts when `first` to `end` - 1 steps are finished, by the arithmetic of one segment."""
        left = (np.arange(first, end) - self._from_steps[number]) * self.sequences_per_step
        counts = np.empty((end - first, len(self.names)), np.int64)
        for place, (before, share) in enumerate(zip(self._before[number], self._shares[number], strict=True)):
            given = _rounded(share, left)
            counts[:, place] = before + given
            left = left - given
        return counts


def _shares_of_what_is_left(names: Sequence[str], segment: Segment) -> list[tuple[int, int]]:
    """Weight of each source over the sum of it and those after it, as numerator and denominator."""
    weights = [segment.weights.get(name, Fraction(0)) for name in names]
    assert min(weights) >= 0 and sum(weights) > 0 and segment.weights.keys() <= set(names)
    sums = list(accumulate(reversed(weights)))[::-1]
    return [
        (weight / total if total else weight).as_integer_ratio() for weight, total in zip(weights, sums, strict=True)
    ]


def _rounded(share: tuple[int, int], counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """`share` of each of `counts` [n], to the nearest whole number, halves upwards; the last source's share is 1."""
    numerator, denominator = share
    largest = 2 * numerator * int(counts.max(initial=0)) + 2 * denominator
    # Python's integers where 64 bits are too few.
    exact_counts = counts if largest < 1 << 63 else counts.astype(object)
    return ((2 * numerator * exact_counts + denominator) // (2 * denominator)).astype(np.int64)
