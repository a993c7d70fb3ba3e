"""The baseline must be a fair bar: proper probabilities, and the numbers of a plain reading of the equations."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.kneser_ney import KneserNey, _discounts

VOCABULARY = 12
SEPARATOR = 0


def stream(seed: int, num_documents: int = 20, tokens_per_document: int = 40) -> np.ndarray:
    """Documents of a skewed, correlated source; some ids never occur."""
    rng = np.random.default_rng(seed)
    ids = []
    for _ in range(num_documents):
        ids.append(SEPARATOR)
        token = 1
        for _ in range(rng.integers(1, tokens_per_document)):
            token = 1 + (token + int(rng.geometric(0.5))) % (VOCABULARY - 3)
            ids.append(token)
    return np.array(ids, np.uint16)


class Slow:
    """Kneser-Ney by dictionaries of tuples, straight from the equations."""

    def __init__(self, ids: np.ndarray, order: int) -> None:
        self.order = order
        raw = {k: Counter(g for i in range(len(ids)) if (g := self.ngram(ids, i, k))) for k in range(1, order + 1)}
        self.count: dict[int, dict[tuple[int, ...], int]] = {order: dict(raw[order])}
        for k in range(1, order):
            extended = Counter(g[1:] for g in raw[k + 1])
            self.count[k] = {g: n if k > 1 and g[0] == SEPARATOR else extended[g] for g, n in raw[k].items()}
        self.discount = {k: (0.0, *_discounts(np.array(list(self.count[k].values())))) for k in self.count}

    @staticmethod
    def ngram(ids: np.ndarray, end: int, length: int) -> tuple[int, ...] | None:
        gram = tuple(int(token) for token in ids[max(end - length + 1, 0) : end + 1])
        return gram if len(gram) == length and SEPARATOR not in gram[1:-1] else None

    def probability(self, token: int, history: tuple[int, ...], k: int) -> float:
        if k == 0:
            return 1 / VOCABULARY
        context = history[len(history) - k + 1 :] if k > 1 else ()
        lower = self.probability(token, history, k - 1)
        followers = {g[-1]: n for g, n in self.count[k].items() if g[:-1] == context}
        total = sum(followers.values())
        if not total:
            return lower
        taken = [self.discount[k][min(n, 3)] for n in followers.values()]
        count = followers.get(token, 0)
        return (count - self.discount[k][min(count, 3)] + sum(taken) * lower) / total

    def nats(self, ids: np.ndarray) -> float:
        total = 0.0
        for i, token in enumerate(ids):
            k = max(k for k in range(1, self.order + 1) if self.ngram(ids, i, k))
            total -= math.log(self.probability(int(token), tuple(int(t) for t in ids[i - k + 1 : i]), k))
        return total


@pytest.mark.parametrize("order", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", [0, 1])
def test_nats_are_those_of_the_equations(order: int, seed: int) -> None:
    train, held_out = stream(seed), stream(seed + 100, num_documents=4)
    held_out[7] = VOCABULARY - 1  # a token never seen in training
    fast = KneserNey.fit(train, order, vocabulary=VOCABULARY)
    assert fast.nats(held_out) == pytest.approx(Slow(train, order).nats(held_out), rel=1e-12)


def test_a_stream_may_begin_inside_a_document() -> None:
    train, held_out = stream(3)[5:], stream(4, num_documents=3)[2:]
    fast = KneserNey.fit(train, 4, vocabulary=VOCABULARY)
    assert fast.nats(held_out) == pytest.approx(Slow(train, 4).nats(held_out), rel=1e-12)


@given(history=st.lists(st.integers(0, VOCABULARY - 1), max_size=7), seed=st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_probabilities_of_the_next_token_sum_to_one(history: list[int], seed: int) -> None:
    model = KneserNey.fit(stream(seed), 5, vocabulary=VOCABULARY)
    probabilities = model.next_token(history)
    assert probabilities.sum() == pytest.approx(1, abs=1e-12)
    assert (probabilities > 0).all()


def test_scores_are_the_probabilities_of_the_next_token() -> None:
    model = KneserNey.fit(stream(0), 5, vocabulary=VOCABULARY)
    held_out = stream(9, num_documents=3)
    one_by_one = [-math.log(model.next_token(held_out[:i].tolist())[token]) for i, token in enumerate(held_out)]
    np.testing.assert_allclose(model.nats_per_token(held_out), one_by_one, rtol=1e-12)


def test_no_history_reaches_past_a_separator() -> None:
    model = KneserNey.fit(stream(0), 5, vocabulary=VOCABULARY)
    np.testing.assert_array_equal(model.next_token([5, 6, SEPARATOR, 2]), model.next_token([SEPARATOR, 2]))
    assert not np.array_equal(model.next_token([5, 6, 2]), model.next_token([2]))


def test_longer_histories_predict_a_patterned_text_better() -> None:
    text = np.tile(np.array([0, 1, 2, 1, 3, 1, 2, 1, 4]), 200)
    nats = [KneserNey.fit(text[:900], order, vocabulary=VOCABULARY).nats(text[900:]) for order in (1, 2, 3, 5)]
    assert nats == sorted(nats, reverse=True)
    assert nats[3] < nats[0] / 10
