"""Bootstrap intervals hold what they should, as often as they should."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_dist.predictions import intervals
from llm_dist.predictions.comparison import difference
from llm_dist.predictions.intervals import interval, resampled_sums
from llm_dist.predictions.metrics import METRICS

ACCURACY = METRICS["accuracy"].score


def decisions(right):
    """Numbers of examples with one label each."""
    right = np.asarray(right, np.float64)
    return np.stack([right, np.ones_like(right)], axis=1)


def test_equal_models_differ_by_nothing_at_all():
    right = decisions(np.random.default_rng(0).random(200) < 0.7)
    first, second = (ACCURACY(sums) for sums in resampled_sums([right, right.copy()], 1000, 0))
    found = difference(0.0, second - first)
    assert (found.low, found.high, found.share_above_0) == (0, 0, 0)
    assert interval(0.7, first).low < 0.7 < interval(0.7, first).high


def test_a_planted_difference_is_found_because_it_is_paired():
    draw = np.random.default_rng(0)
    hard = draw.random(300) < 0.5
    worse, better = ~hard, ~hard | (hard & (draw.random(300) < 0.1))
    sums = resampled_sums([decisions(worse), decisions(better)], 2000, 1)
    scores = [ACCURACY(each) for each in sums]
    apart = better.mean() - worse.mean()
    found = difference(apart, scores[1] - scores[0])
    assert 0 < found.low < apart < found.high and found.share_above_0 == 1
    alone = [interval(0, each) for each in scores]
    assert alone[0].high > alone[1].low, "each model's own interval could not tell"


def test_the_same_seed_draws_the_same_whatever_is_drawn_at_once(monkeypatch):
    numbers = [decisions(np.arange(50) % 3 == 0)]
    once, again, other = (resampled_sums(numbers, 40, seed)[0] for seed in (3, 3, 4))
    np.testing.assert_array_equal(once, again)
    assert not np.array_equal(once, other)
    assert (once[:, 1] == 50).all()
    monkeypatch.setattr(intervals, "_DRAWS_AT_ONCE", 120)
    np.testing.assert_array_equal(resampled_sums(numbers, 40, 3)[0], once)


@pytest.mark.parametrize("name", ["accuracy", "loss"])
def test_intervals_hold_the_truth_about_95_times_in_100(name):
    draw = np.random.default_rng(5)
    held = 0
    trials = 1000
    for trial in range(trials):
        values = draw.random(120) < 0.6 if name == "accuracy" else draw.exponential(0.6, 120)
        numbers = np.stack([values.astype(np.float64), np.ones(120)], axis=1)
        (sums,) = resampled_sums([numbers], 400, trial)
        found = interval(0, METRICS[name].score(sums))
        held += found.low <= 0.6 <= found.high
    assert 0.91 <= held / trials <= 0.98


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40))
def test_macro_f1_from_sums_is_scikit_learn_s(pairs):
    metrics = pytest.importorskip("sklearn.metrics")
    true, predicted = map(list, zip(*pairs, strict=True))
    counts = [np.bincount(ids, minlength=4) for ids in (true, predicted)]
    right = np.bincount([a for a, b in pairs if a == b], minlength=4)
    sums = np.concatenate([right, counts[0] + counts[1]]).astype(np.float64)
    expected = metrics.f1_score(true, predicted, average="macro", zero_division=0)
    assert float(METRICS["macro_f1"].score(sums)) == pytest.approx(expected)
