"""Documents in bins: nothing lost, nothing over, and as full as best fit, longest first, makes them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_dist.data.bins import BinPlan, plan_bins

LENGTHS = st.lists(st.integers(1, 90), min_size=1, max_size=60)
BIN_TOKENS = st.integers(1, 40)


def plan_of(lengths: list[int], bin_tokens: int) -> BinPlan:
    return plan_bins(np.cumsum(lengths).astype(np.uint32), bin_tokens)


def bins_of(plan: BinPlan) -> list[list[tuple[int, int]]]:
    return [plan.pieces(number) for number in range(len(plan.ends))]


@given(lengths=LENGTHS, bin_tokens=BIN_TOKENS)
def test_every_token_once_and_no_bin_over(lengths: list[int], bin_tokens: int) -> None:
    bins = bins_of(plan_of(lengths, bin_tokens))
    assert all(0 < sum(size for _, size in pieces) <= bin_tokens for pieces in bins)
    tokens = [first + token for pieces in bins for first, size in pieces for token in range(size)]
    assert sorted(tokens) == list(range(sum(lengths)))


@given(lengths=LENGTHS, bin_tokens=BIN_TOKENS)
def test_only_documents_longer_than_a_bin_are_cut(lengths: list[int], bin_tokens: int) -> None:
    firsts = np.cumsum([0, *lengths]).tolist()
    pieces = {first: size for pieces in bins_of(plan_of(lengths, bin_tokens)) for first, size in pieces}
    wanted = {}
    for first, length in zip(firsts, lengths, strict=False):
        for done in range(0, length, bin_tokens):
            wanted[first + done] = min(bin_tokens, length - done)
    assert pieces == wanted


def naive_best_fit(sizes: list[int], bin_tokens: int) -> list[int]:
    """Rooms left in each bin: every piece, longest first, into the fullest bin that holds it."""
    rooms: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [number for number, room in enumerate(rooms) if room >= size]
        if fitting:
            rooms[min(fitting, key=rooms.__getitem__)] -= size
        else:
            rooms.append(bin_tokens - size)
    return rooms


@given(lengths=LENGTHS, bin_tokens=BIN_TOKENS)
def test_bins_are_as_full_as_a_naive_best_fit_makes_them(lengths: list[int], bin_tokens: int) -> None:
    whole = sum(length // bin_tokens for length in lengths)
    rooms = naive_best_fit([rest for length in lengths if (rest := length % bin_tokens)], bin_tokens)
    found = [bin_tokens - sum(size for _, size in pieces) for pieces in bins_of(plan_of(lengths, bin_tokens))]
    assert found[:whole] == [0] * whole, "whole bins of long documents come first"
    assert sorted(found[whole:]) == sorted(rooms)


@given(lengths=LENGTHS, bin_tokens=BIN_TOKENS)
def test_pieces_of_a_bin_stand_longest_first(lengths: list[int], bin_tokens: int) -> None:
    for pieces in bins_of(plan_of(lengths, bin_tokens)):
        sizes = [size for _, size in pieces]
        assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(
    ("lengths", "bin_tokens", "bins"),
    [
        ([8], 8, [[(0, 8)]]),
        ([8, 8], 8, [[(0, 8)], [(8, 8)]]),
        ([3], 8, [[(0, 3)]]),
        ([19], 8, [[(0, 8)], [(8, 8)], [(16, 3)]]),
        ([16], 8, [[(0, 8)], [(8, 8)]]),
        ([3, 21, 5], 8, [[(3, 8)], [(11, 8)], [(19, 5)], [(24, 5), (0, 3)]]),  # of equally full bins the latest
        ([1, 1, 1], 1, [[(0, 1)], [(1, 1)], [(2, 1)]]),
        ([4, 5, 3, 2], 8, [[(4, 5), (9, 3)], [(0, 4), (12, 2)]]),
    ],
)
def test_golden_plans(lengths: list[int], bin_tokens: int, bins: list[list[tuple[int, int]]]) -> None:
    """They belong to the order: a run that is resumed by a later version must read what it would have read."""
    assert bins_of(plan_of(lengths, bin_tokens)) == bins


def test_a_million_tokens_of_documents_leave_little_room() -> None:
    lengths = np.random.default_rng(0).lognormal(6, 1, 1500).astype(int) + 1
    plan = plan_of(lengths.tolist(), 2048)
    assert lengths.sum() / (len(plan.ends) * 2048) > 0.99
