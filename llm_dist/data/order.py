"""In which order the windows of a source are read: a pure function of (seed, number of windows, sequence id).

Sequences of one source are numbered without end: id g belongs to epoch g // N and has position g % N in it, N being
the windows of the source. Every epoch reads each window once, and any position is found without replaying another:
permutations are Feistel networks, which need no memory.

So that a shard folder behind a network, or on a disk that seeks, is read in large pieces, an epoch is dealt to LANES.
Position p is in lane p mod LANES. A lane reads *cells*, runs of neighbouring windows, in an order of its own; the
windows of POOL_CELLS cells are mixed. Each lane has whole cells, equally many; the windows left over (all of them
where there are fewer than LANES cells) come last, permuted one by one. Ranks take neighbouring lanes, so a cell is
read by one of them. Knows no torch, no files and no tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from llm_dist.draws import GOLDEN, WORD, Words, keys, mix

Indices = npt.NDArray[np.int64]

LANES = 64
POOL_CELLS = 4
CELL_TOKENS = 1 << 19
"""A cell is about so many tokens: 1 or 2 MB, which one request over a network brings as fast as its link allows."""

_ROUNDS = 8
_SMALLEST_DOMAIN_BITS = 4
_CELL, _POOL, _REST, _PHASE = 1, 2, 3, 4
"""What a key is for; these numbers and those above are part of the order and never change."""


def permute(positions: Indices, size: int, secrets: Words) -> Indices:
    """Images of `positions` [n] under bijections of [0, size); `secrets` [1] or [n] choose the bijection.

    A Feistel network with cycle walking (Black and Rogaway 2002): permute the next power of two and walk on while the
    image lies outside, at most twice on average. 0.1 microseconds per position in large calls, 20 in calls of 16.
    """
    bits = max(_SMALLEST_DOMAIN_BITS, (size - 1).bit_length())
    left_bits = bits // 2
    masks = [np.uint64((1 << left_bits) - 1), np.uint64((1 << (bits - left_bits)) - 1)]
    shifts = [np.uint64(bits - left_bits), np.uint64(left_bits)]
    common = keys(secrets)  # of all rounds: keys(secrets, number) is one step further
    rounds = [mix(common ^ np.uint64((number * GOLDEN + 1) & WORD)) for number in range(_ROUNDS)]

    def encrypt(words: Words, secrets_of_rounds: list[Words]) -> Words:
        for number, secret in enumerate(secrets_of_rounds):
            # The halves may differ by a bit; they change places every round, so the widths alternate.
            low = words & masks[1 - number % 2]
            high = words >> shifts[number % 2]
            words = (low << shifts[1 - number % 2]) | (high ^ (mix(low ^ secret) & masks[number % 2]))
        return words

    images = encrypt(positions.astype(np.uint64), rounds)
    walking = np.flatnonzero(images >= np.uint64(size))
    while len(walking):
        own = rounds if len(secrets) == 1 else [secret[walking] for secret in rounds]
        words = encrypt(images[walking], own)
        images[walking] = words
        walking = walking[words >= np.uint64(size)]
    return images.astype(np.int64)


class Order:
    """The order of one source: sequence id -> window."""

    def __init__(self, num_windows: int, cell_windows: int, seed: int) -> None:
        """`cell_windows`: neighbouring windows that are read at about the same time."""
        assert num_windows > 0 and cell_windows > 0
        self.num_windows = num_windows
        self.cell_windows = cell_windows
        self._seed = seed
        self._lane_cells = num_windows // (LANES * cell_windows)
        self._body = self._lane_cells * LANES * cell_windows
        """Windows that lie in the lanes' cells; the others are left over."""

    def epochs(self, sequence_ids: Indices) -> Indices:
        """Epoch of each of `sequence_ids` [n]."""
        return sequence_ids // self.num_windows

    def lanes(self, sequence_ids: Indices) -> Indices:
        """Lane of each of `sequence_ids` [n]."""
        return sequence_ids % self.num_windows % LANES

    def windows(self, sequence_ids: Indices) -> Indices:
        """Window of each of `sequence_ids` [n], any ids in any order; 0.3 microseconds each in large calls."""
        epochs, positions = np.divmod(sequence_ids, self.num_windows)
        windows = np.empty(len(positions), np.int64)
        in_body = positions < self._body
        if in_body.any():
            windows[in_body] = self._in_cells(epochs[in_body], positions[in_body])
        if not in_body.all():
            rest = ~in_body
            secrets = _by_value(epochs[rest], lambda epoch: keys(self._seed, epoch, _REST))
            windows[rest] = self._body + permute(positions[rest] - self._body, self.num_windows - self._body, secrets)
        return windows

    def _in_cells(self, epochs: Indices, positions: Indices) -> Indices:
        """Windows at positions of the lanes' cells: mixed within a pool, whose cells come from all over the source."""
        within_lane, lanes = np.divmod(positions, LANES)
        pools, within_pool = np.divmod(within_lane, POOL_CELLS * self.cell_windows)
        mixed = self._mix_pools(epochs, lanes, pools, within_pool)
        cell_of_pool, within_cell = np.divmod(mixed, self.cell_windows)
        slots = (pools * POOL_CELLS + cell_of_pool) * LANES + lanes
        secrets = _by_value(epochs, lambda epoch: keys(self._seed, epoch, _CELL))
        return permute(slots, self._lane_cells * LANES, secrets) * self.cell_windows + within_cell

    def _mix_pools(self, epochs: Indices, lanes: Indices, pools: Indices, within: Indices) -> Indices:
        secrets = keys(self._seed, epochs.astype(np.uint64), _POOL, lanes.astype(np.uint64), pools.astype(np.uint64))
        last, last_cells = divmod(self._lane_cells, POOL_CELLS)
        if last_cells == 0 or not (is_last := pools == last).any():
            return permute(within, POOL_CELLS * self.cell_windows, secrets)
        mixed = np.empty_like(within)
        for chosen, cells in ((is_last, last_cells), (~is_last, POOL_CELLS)):
            mixed[chosen] = permute(within[chosen], cells * self.cell_windows, secrets[chosen])
        return mixed


def phases(seed: int, epochs: Indices, num_tokens: int) -> Indices:
    """Where window 0 of each epoch begins, anywhere in a stream of `num_tokens`.

    The remainder of num_tokens / sequence_tokens is not read in an epoch. With a phase below sequence_tokens it would
    always lie about the stream's end; drawn from the whole stream it falls on every token equally often.
    """
    drawn = _by_value(epochs, lambda epoch: keys(seed, epoch, _PHASE))
    return (drawn % np.uint64(num_tokens)).astype(np.int64)


def _by_value(values: Indices, key_of: Callable[[Words], Words]) -> Words:
    """A key per value, computed once where all are alike: [1], else [n]."""
    if not len(values) or values[0] == values[-1] == values.max() == values.min():
        return key_of(values[:1].astype(np.uint64))
    distinct, place = np.unique(values, return_inverse=True)
    return key_of(distinct.astype(np.uint64))[place]


def rank_rows(sequences_per_step: int, ranks: int, rank: int) -> range:
    """The rows of a step's set that `rank` computes; ranks differ by at most one row and may have none."""
    return range(sequences_per_step * rank // ranks, sequences_per_step * (rank + 1) // ranks)
