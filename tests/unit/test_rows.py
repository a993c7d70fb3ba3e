"""Rows: parts of them, and many readings as one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_dist.rows import Rows, merge


def rows_of(count: int, seed: int = 0, *, is_padded: bool = True, is_masked: bool = True) -> Rows:
    draw = np.random.default_rng(seed)
    inputs, following = draw.integers(0, 99, (2, count, 5))
    ids = draw.integers(0, 3, (count, 5), np.int32) if is_masked else None
    return Rows(inputs, following, draw.integers(0, 6, count) if is_padded else None, ids)


def test_a_part_is_a_view_that_says_where_it_stands() -> None:
    rows = rows_of(7)._replace(first_row=20, sources=np.arange(7), step=3, targets=np.arange(7) + 10)
    part = rows.part(2, 3, 22)
    assert (part.num_rows, part.first_row) == (3, 22)
    for ours, whole in zip(part[:4], rows[:4], strict=True):
        np.testing.assert_array_equal(ours, whole[2:5])
        assert np.shares_memory(ours, whole)
    assert part.sources.tolist() == [2, 3, 4] and part.targets.tolist() == [12, 13, 14]
    assert part.step == 3 and part.numbers.tolist() == [22, 23, 24]
    assert rows._replace(row_stride=4).numbers.tolist() == list(range(20, 48, 4))
    assert rows.part(6, 3, 26).num_rows == 1
    assert rows.part(7, 3, 27).num_rows == 0
    bare = rows_of(7, is_padded=False, is_masked=False).part(0, 2, 0)
    assert bare[2:6] == (None, None, 0, None) and bare.targets is None and bare.partners is None


def test_without_padding_every_position_is_scored() -> None:
    assert rows_of(3, is_padded=False).scored_tokens().tolist() == [5, 5, 5]
    assert Rows(*rows_of(2)[:2], np.array([4, 0])).scored_tokens().tolist() == [4, 0]


@given(dealt=st.lists(st.integers(0, 3), min_size=1, max_size=20), is_padded=st.booleans(), is_masked=st.booleans())
def test_merged_rows_stand_at_their_places(dealt: list[int], is_padded: bool, is_masked: bool) -> None:
    whole = rows_of(len(dealt), is_padded=is_padded, is_masked=is_masked)
    places = [np.flatnonzero(np.array(dealt) == number) for number in range(4)]
    parts = [(own, Rows(*(None if array is None else array[own] for array in whole[:4]))) for own in places if len(own)]
    merged = merge(parts, len(dealt))
    for ours, theirs in zip(merged[:4], whole[:4], strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("num_parts", [1, 3])
def test_merged_rows_are_copies(num_parts: int) -> None:
    parts = [(np.array([number]), rows_of(1, seed=number)) for number in range(num_parts)]
    merged = merge(parts, num_parts)
    assert not np.shares_memory(merged.inputs, parts[0][1].inputs)
    assert merged.first_row == 0 and merged.sources is None
