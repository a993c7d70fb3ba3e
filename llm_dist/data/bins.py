"""A chunk's documents in bins of a sequence's length, packed or each alone: a pure function of their lengths.

A document longer than a bin is cut into whole bins and a rest. What is shorter than a bin goes, longest first, into the
fullest bin that still holds it (best-fit decreasing; Ding et al. 2024, arXiv 2404.10830, pack so to avoid truncation).
Knows lengths only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

BINS_VERSION = 1
"""Of the rule below: what was counted by another one is counted again."""


@dataclass(frozen=True)
class BinPlan:
    """Which pieces of a chunk make up each bin."""

    firsts: npt.NDArray[np.int32]
    """[pieces]: first token inside the chunk; the pieces of bin 0, then those of bin 1, and so on."""
    sizes: npt.NDArray[np.int32]
    """[pieces]: tokens."""
    ends: npt.NDArray[np.int32]
    """[bins]: number of the piece behind a bin's last."""

    def pieces(self, number: int) -> list[tuple[int, int]]:
        """First token and size of each piece of bin `number`."""
        first = int(self.ends[number - 1]) if number else 0
        chosen = slice(first, int(self.ends[number]))
        return list(zip(self.firsts[chosen].tolist(), self.sizes[chosen].tolist(), strict=True))


def plan_bins(document_ends: npt.NDArray[np.uint32], bin_tokens: int) -> BinPlan:
    """Pack the documents that end at `document_ends` [n], the first beginning at 0."""
    ends = document_ends.astype(np.int64)
    firsts = np.concatenate([[0], ends[:-1]])
    sizes = ends - firsts
    whole = sizes // bin_tokens
    # A document's whole bins stand side by side; number them within it by counting from the document's first.
    within = np.arange(int(whole.sum())) - np.repeat(np.cumsum(whole) - whole, whole)
    whole_firsts = np.repeat(firsts, whole) + within * bin_tokens
    rests = sizes % bin_tokens
    has_rest = rests > 0
    rest_firsts, rests = (firsts + whole * bin_tokens)[has_rest], rests[has_rest]
    longest_first = np.argsort(-rests, kind="stable")
    bins = _best_fit(rests[longest_first].tolist(), bin_tokens)
    by_bin = np.argsort(bins, kind="stable")
    chosen = longest_first[by_bin]
    pieces_of_bin = np.bincount(bins) if len(bins) else np.empty(0, np.int64)
    return BinPlan(
        np.concatenate([whole_firsts, rest_firsts[chosen]]).astype(np.int32),
        np.concatenate([np.full(len(whole_firsts), bin_tokens), rests[chosen]]).astype(np.int32),
        np.concatenate([np.arange(1, len(whole_firsts) + 1), len(whole_firsts) + np.cumsum(pieces_of_bin)]).astype(
            np.int32
        ),
    )


def separate_bins(document_ends: npt.NDArray[np.uint32], bin_tokens: int) -> BinPlan:
    """A bin for each document that ends at `document_ends` [n], in their order, and more for what is longer."""
    ends = document_ends.astype(np.int64)
    firsts = np.concatenate([[0], ends[:-1]])
    num_bins = -(-(ends - firsts) // bin_tokens)
    within = np.arange(int(num_bins.sum())) - np.repeat(np.cumsum(num_bins) - num_bins, num_bins)
    bin_firsts = np.repeat(firsts, num_bins) + within * bin_tokens
    sizes = np.minimum(np.repeat(ends, num_bins) - bin_firsts, bin_tokens)
    pieces = np.arange(1, len(sizes) + 1)
    return BinPlan(bin_firsts.astype(np.int32), sizes.astype(np.int32), pieces.astype(np.int32))


def single_bins(document_ends: npt.NDArray[np.uint32], bin_tokens: int) -> BinPlan:
    """A bin for each document that ends at `document_ends` [n], in their order; what is longer is cut off."""
    ends = document_ends.astype(np.int64)
    firsts = np.concatenate([[0], ends[:-1]])
    sizes = np.minimum(ends - firsts, bin_tokens)
    pieces = np.arange(1, len(sizes) + 1)
    return BinPlan(firsts.astype(np.int32), sizes.astype(np.int32), pieces.astype(np.int32))


def _best_fit(sizes: list[int], bin_tokens: int) -> npt.NDArray[np.int64]:
    """Bin of each piece; of equally full bins, the one that became so last."""
    by_room: list[list[int]] = [[] for _ in range(bin_tokens)]
    rooms = 0  # bit r: some bin has room for exactly r tokens
    num_bins = 0
    bins = np.empty(len(sizes), np.int64)
    for number, size in enumerate(sizes):
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            chosen = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, chosen = bin_tokens, num_bins
            num_bins += 1
        bins[number] = chosen
        if left := room - size:
            by_room[left].append(chosen)
            rooms |= 1 << left
    return bins
