"""What a rank holds of one full-precision state tensor: the one form in which every engine shows its state.

Knows neither the engine that holds the values nor the store that reads and writes them.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Partition:
    """A contiguous range of the C-order elements of one state tensor.

    Every rank lists every tensor of the state, with no values where it holds nothing of it, so that a tensor that
    is missing is noticed by name on each rank.

    Attributes:
        values: 1-D contiguous fp32 view of live storage (length may be 0); writing to it changes the engine's state.
        start: index of the first element held, counted in the C order of the whole tensor.
        shape: shape of the whole tensor.
        replica: which copy of this range this is, 0 <= replica < num_replicas.
        num_replicas: how many ranks hold exactly this range.
    """

    values: Tensor
    start: int
    shape: tuple[int, ...]
    replica: int = 0
    num_replicas: int = 1
