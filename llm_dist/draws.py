"""Random numbers as a pure function of what they are for: 64-bit hashes, the only source of randomness in the data.

Order, masks and pairs are drawn here, so that a resumed run, or one on other ranks, draws the same. Knows no torch.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]

WORD = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def mix(words: Words) -> Words:
    """Finaliser of splitmix64 (Steele, Lea, Flood 2014): every input bit reaches every output bit."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def keys(*parts: int | Words) -> Words:
    """64-bit hashes of integers, the only source of randomness here; arrays among `parts` give one hash per element."""
    state = np.array([GOLDEN], np.uint64)
    for part in parts:
        words = np.array([part & WORD], np.uint64) if isinstance(part, int) else part
        state = mix(state ^ (words * np.uint64(GOLDEN) + np.uint64(1)))
    return state


def fractions(words: Words) -> npt.NDArray[np.float64]:
    """Hashes as numbers in [0, 1), each of 53 bits."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
