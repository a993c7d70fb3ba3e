"""Sequences of each source by exact arithmetic, whatever the weights and however far the run."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from llm_dist.data.mixture import Mixture, Segment, exact

WRITTEN = st.one_of(
    st.integers(0, 9).map(float),
    st.sampled_from([0.1, 0.2, 0.3, 1e-3, 1e-9, 1 / 3, 2 / 3, 0.0012345678901234567, 1e-20, 1e20, 123456.789]),
    st.floats(0, 1e6, allow_subnormal=False),
)
"""Weights as people and machines write them."""


@st.composite
def mixtures(draw: st.DrawFn, most_segments: int = 4) -> tuple[list[str], list[Segment], int]:
    names = draw(st.sampled_from([["a"], ["a", "b"], ["a", "b", "c"], ["a", "b", "c", "d", "e"]]))
    segments = []
    for first in [0, *sorted(draw(st.sets(st.integers(1, 30), max_size=most_segments - 1)))]:
        weights = draw(st.dictionaries(st.sampled_from(names), WRITTEN, min_size=1))
        assume(sum(weights.values()) > 0)
        segments.append(Segment(first, {name: exact(weight) for name, weight in weights.items()}))
    return names, segments, draw(st.integers(1, 40))


def counts_by_definition(names: list[str], segments: list[Segment], sequences_per_step: int, step: int) -> list[int]:
    """What the sources have given, segment by segment, in fractions."""
    counts = [0] * len(names)
    ends = [segment.from_step for segment in segments[1:]] + [step]
    for segment, end in zip(segments, ends, strict=True):
        num_sequences = max(0, min(end, step) - segment.from_step) * sequences_per_step
        whole, upto, floor = sum(segment.weights.values()), Fraction(0), 0
        for number, name in enumerate(names):
            upto += segment.weights.get(name, 0) / whole
            counts[number] += math.floor(upto * num_sequences) - floor
            floor = math.floor(upto * num_sequences)
    return counts


@given(
    mixture=mixtures(), steps=st.lists(st.one_of(st.integers(0, 60), st.integers(0, 10**14)), min_size=1, max_size=8)
)
def test_counts_are_floors_of_exact_sums_at_any_step(mixture, steps) -> None:
    names, segments, sequences_per_step = mixture
    made = Mixture(names, segments, sequences_per_step)
    for step in steps:
        assert made.counts(step) == counts_by_definition(names, segments, sequences_per_step, step)


@given(mixture=mixtures(), first=st.one_of(st.integers(0, 40), st.integers(0, 10**12)), num_steps=st.integers(0, 40))
def test_many_steps_at_once_are_each_of_them(mixture, first, num_steps) -> None:
    made = Mixture(*mixture)
    counts = made.counts_after(range(first, first + num_steps))
    assert (counts.dtype, counts.shape) == (np.int64, (num_steps + 1, len(made.names)))
    assert counts.tolist() == [made.counts(step) for step in range(first, first + num_steps + 1)]


@given(mixture=mixtures())
def test_every_step_is_full_and_nothing_is_given_back(mixture) -> None:
    """So a source's sequences are a run of ids without gap or repetition, over all segments."""
    made = Mixture(*mixture)
    counts = made.counts_after(range(60))
    assert not counts[0].any()
    given_in_step = np.diff(counts, axis=0)
    assert (given_in_step >= 0).all()
    assert (given_in_step.sum(axis=1) == made.sequences_per_step).all()


@given(mixture=mixtures())
def test_each_source_is_within_one_sequence_of_its_share_after_every_step(mixture) -> None:
    names, segments, sequences_per_step = mixture
    made = Mixture(*mixture)
    ends = [segment.from_step for segment in segments[1:]] + [40]
    for segment, end in zip(segments, ends, strict=True):
        before = made.counts(segment.from_step)
        whole = sum(segment.weights.values())
        for step in range(segment.from_step, end):
            for name, count, base in zip(names, made.counts(step), before, strict=True):
                share = segment.weights.get(name, Fraction(0)) / whole
                assert abs(count - base - share * (step - segment.from_step) * sequences_per_step) < 1
                assert share or count == base, "a source that is left out gives nothing"


@given(mixture=mixtures(), data=st.data())
def test_a_segment_that_is_added_changes_nothing_before_it(mixture, data) -> None:
    names, segments, sequences_per_step = mixture
    first = segments[-1].from_step + data.draw(st.integers(1, 30))
    joined = [*names, "new"]
    added = Segment(first, {"new": Fraction(1), names[0]: exact(data.draw(st.sampled_from([0.1, 2.0])))})
    before, after = (
        Mixture(names, segments, sequences_per_step),
        Mixture(joined, [*segments, added], sequences_per_step),
    )
    for step in range(first + 1):
        assert after.counts(step) == [*before.counts(step), 0]
    gone_on = zip(after.counts(first + 1), before.counts(first), strict=False)
    assert all(count >= base for count, base in gone_on), "its sources go on from where they are"


def test_a_tenth_is_a_tenth() -> None:
    assert exact(0.1) == Fraction(1, 10)
    made = Mixture(["a", "b"], [Segment(0, {"a": exact(0.1), "b": exact(0.9)})], 10)
    assert made.counts_after(range(1000)).tolist() == [[step, 9 * step] for step in range(1001)]
    three = Mixture(["a", "b", "c"], [Segment(0, {name: exact(0.1) for name in "abc"})], 3)
    assert three.counts_after(range(1000)).tolist() == [[step] * 3 for step in range(1001)]


@pytest.mark.parametrize("weights", [(0.1, 0.2, 0.7), (1.0, 1e-9, 3.3333333333333335e-06), (1 / 3, 1 / 7, 1e6)])
def test_a_trillion_sequences_are_counted_exactly(weights: tuple[float, ...]) -> None:
    shares = [exact(weight) / sum(map(exact, weights)) for weight in weights]
    made = Mixture(["a", "b", "c"], [Segment(0, dict(zip("abc", map(exact, weights), strict=True)))], 1000)
    for step in (10**9 - 1, 10**9, 10**12 + 7):
        floors = [math.floor(sum(shares[:number]) * step * 1000) for number in range(4)]
        assert made.counts(step) == [end - first for first, end in zip(floors[:-1], floors[1:], strict=True)]
    around = made.counts_after(range(10**9 - 2, 10**9 + 2))
    assert (np.diff(around, axis=0).sum(axis=1) == 1000).all()
