"""How many sequences a step takes from each source: exact arithmetic of weights, no drawing.

Within a segment, source k has given floor(W_k n) - floor(W_(k-1) n) of its first n sequences, W_k being the sum of the
shares up to k. So after every step each source is within one sequence of its share, sources continue their own
sequence numbers over segments, and nothing is lost or repeated when weights change. Knows no tokens and no files.
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
        self._bounds = [_bounds(self.names, segment) for segment in segments]
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
        num_sequences = (np.arange(first, end) - self._from_steps[number]) * self.sequences_per_step
        counts = np.empty((end - first, len(self.names)), np.int64)
        floor = np.zeros(end - first, np.int64)
        for place, (before, (share, whole)) in enumerate(zip(self._before[number], self._bounds[number], strict=True)):
            # Python's integers where 64 bits are too few for the product.
            fits = share * int(num_sequences[-1]) < 1 << 63
            exact_sequences = num_sequences if fits else num_sequences.astype(object)
            last, floor = floor, (share * exact_sequences // whole).astype(np.int64)
            counts[:, place] = before + floor - last
        return counts


def _bounds(names: Sequence[str], segment: Segment) -> list[tuple[int, int]]:
    """Sums of the shares up to each source, as numerator and denominator; the last is 1."""
    weights = [segment.weights.get(name, Fraction(0)) for name in names]
    assert min(weights) >= 0 and sum(weights) > 0 and segment.weights.keys() <= set(names)
    return [(total / sum(weights)).as_integer_ratio() for total in accumulate(weights)]
