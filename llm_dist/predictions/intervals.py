"""Bootstrap over examples (Efron 1979): what a score would be on another draw of such examples. Numpy alone.

A score is a function of sums over examples, so that a resample is one row of counts times the examples' numbers; the
same counts for several models make their differences paired.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float64]
Score = Callable[[Numbers], Numbers]
"""From sums [..., k] to scores [...]."""

LEVEL = 0.95
_DRAWS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Interval:
    """A number and where 95 % of its resamples lie (percentiles)."""

    value: float
    low: float
    high: float


def resampled_sums(numbers: Sequence[Numbers], num_samples: int, seed: int) -> list[Numbers]:
    """Sums over resamples of the examples: of each model's [n, k] the [num_samples, k], all from the same draws."""
    num_examples = len(numbers[0])
    assert all(len(each) == num_examples for each in numbers), "models are compared on the same examples"
    together = np.concatenate(numbers, axis=1)
    bounds = np.cumsum([each.shape[1] for each in numbers])[:-1]
    generator = np.random.default_rng(seed)
    at_once = max(1, _DRAWS_AT_ONCE // num_examples)
    sums = []
    for first in range(0, num_samples, at_once):
        count = min(at_once, num_samples - first)
        drawn = generator.integers(0, num_examples, (count, num_examples))
        drawn += np.arange(count)[:, None] * num_examples
        counts = np.bincount(drawn.ravel(), minlength=count * num_examples).reshape(count, num_examples)
        sums.append(counts.astype(np.float64) @ together)
    return np.split(np.concatenate(sums), bounds, axis=1)


def interval(value: float, resampled: Numbers) -> Interval:
    """Of a score and its resamples [samples]."""
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail]).tolist()
    return Interval(value, low, high)
