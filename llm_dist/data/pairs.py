"""Which rows of a step lend one another their text, for objectives that pair texts of different documents.

A partner is another row of the same step, so that pairs read nothing that is not read anyway. Pure functions of
(seed, step, row); knows no tokens and no torch.
"""

from __future__ import annotations

import numpy as np

from llm_dist.data.order import Indices
from llm_dist.draws import keys

NONE = -1
_TRIES = 8
_PARTNER = 5
"""What a key is for, beside those of `order`."""


def partners(seed: int, steps: range, rows: range, documents: Indices) -> Indices:
    """The partner of each of `rows` in each step: [steps, rows]; NONE where no draw met another document.

    `documents` [steps, S] says of which document each row of the steps' global sets is.
    """
    num_rows = documents.shape[1]
    shape = len(steps), len(rows)
    if num_rows < 2:
        return np.full(shape, NONE, np.int64)
    own = np.broadcast_to(np.arange(rows.start, rows.stop), shape)
    step_of = np.broadcast_to(np.arange(steps.start, steps.stop)[:, None], shape)
    in_step = np.arange(len(steps))[:, None]
    found = np.full(shape, NONE, np.int64)
    for number in range(_TRIES):
        drawn = keys(seed, _PARTNER, step_of.ravel().astype(np.uint64), own.ravel().astype(np.uint64), number)
        others = (own + 1 + (drawn % np.uint64(num_rows - 1)).astype(np.int64).reshape(shape)) % num_rows
        is_other = documents[in_step, others] != documents[in_step, own]
        found = np.where((found == NONE) & is_other, others, found)
    return found
