"""Which rows of a step lend one another their text."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_dist.data.pairs import NONE, partners


@settings(max_examples=100, deadline=None)
@given(
    documents=st.lists(st.integers(0, 3), min_size=1, max_size=12), first=st.integers(0, 2**40), seed=st.integers(0, 99)
)
def test_partners_are_other_documents_of_the_same_step(documents, first, seed):
    of_steps = np.array([documents, documents[::-1]])
    steps, rows = range(first, first + 2), range(len(documents))
    found = partners(seed, steps, rows, of_steps)
    for step in range(2):
        for row, partner in enumerate(found[step].tolist()):
            assert partner == NONE or of_steps[step, partner] != of_steps[step, row]
    if len(set(documents)) == 1:
        assert (found == NONE).all()


@given(start=st.integers(0, 9), stop=st.integers(10, 20), step=st.integers(0, 1000))
def test_any_rows_of_any_steps_are_paired_as_all_of_them_are(start, stop, step):
    documents = np.arange(60).reshape(3, 20)
    whole = partners(1, range(step, step + 3), range(20), documents)
    part = partners(1, range(step + 1, step + 3), range(start, stop), documents[1:])
    np.testing.assert_array_equal(part, whole[1:, start:stop])


def test_every_other_row_is_drawn_alike():
    documents = np.arange(8)[None].repeat(4000, axis=0)
    found = partners(1, range(4000), range(8), documents)
    assert (found != NONE).all()
    counts = np.bincount(found[:, 3], minlength=8)
    assert counts[3] == 0 and np.delete(counts, 3).min() > 0.85 * 4000 / 7
