"""Which tokens are hidden, and what stands for them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_dist.objectives.hiding import Hiding
from llm_dist.tokenizer import MASK, SPECIAL_TOKENS

NUM_SPECIAL = len(SPECIAL_TOKENS)


def rows_of(tokenizer, num_rows, num_tokens, seed=0):
    draw = np.random.default_rng(seed)
    return draw.integers(NUM_SPECIAL, tokenizer.vocabulary_tokens, (num_rows, num_tokens))


def hidden(run_of, tokenizer, ids, *, step=3, numbers=None, is_text=None, **objective):
    run = run_of(**{f"objective__{key}": value for key, value in objective.items()})
    hiding = Hiding(run.objective, tokenizer, run.run.seed, ids.shape[1])
    numbers = np.arange(len(ids)) if numbers is None else np.asarray(numbers)
    return hiding.hide(ids, np.ones(ids.shape, np.bool_) if is_text is None else is_text, step, numbers)


def marked(result):
    """[n, T]: which tokens were hidden."""
    flags = np.zeros(result.inputs.shape, np.bool_)
    for row, (places, tokens) in enumerate(zip(result.places, result.tokens, strict=True)):
        flags[row, places[tokens >= 0]] = True
    return flags


@pytest.mark.parametrize("fraction", [0.05, 0.15, 0.4])
@pytest.mark.parametrize("unit", ["token", "word", "span"])
def test_the_share_is_hidden_and_no_more(run_of, wordpiece, fraction, unit):
    ids = rows_of(wordpiece, 200, 64)
    count = marked(hidden(run_of, wordpiece, ids, mask_fraction=fraction, mask_unit=unit)).sum(axis=1)
    budget = round(fraction * 64)
    assert count.max() <= budget and count.min() >= 1
    assert (count == budget).all() if unit == "token" else count.mean() > 0.85 * budget


def test_labels_are_what_was_hidden_and_nothing_else_changes(run_of, wordpiece):
    ids = rows_of(wordpiece, 50, 64)
    result = hidden(run_of, wordpiece, ids)
    is_hidden = marked(result)
    for row in range(len(ids)):
        is_there = result.tokens[row] >= 0
        np.testing.assert_array_equal(ids[row, result.places[row, is_there]], result.tokens[row, is_there])
        assert (np.diff(result.places[row, is_there]) > 0).all()
    np.testing.assert_array_equal(result.inputs[~is_hidden], ids[~is_hidden])


def test_fates_have_their_shares(run_of, wordpiece):
    ids = rows_of(wordpiece, 2000, 64)
    result = hidden(run_of, wordpiece, ids, mask_token_fraction=0.7, random_token_fraction=0.2)
    is_hidden, mask_id = marked(result), wordpiece.special_ids[MASK]
    became, was = result.inputs[is_hidden], ids[is_hidden]
    assert (became == mask_id).mean() == pytest.approx(0.7, abs=0.01)
    others = became[(became != mask_id) & (became != was)]
    assert len(others) / len(was) == pytest.approx(0.2, abs=0.012)  # a drawn token may be the very one
    assert others.min() >= NUM_SPECIAL
    counts = np.bincount(others, minlength=wordpiece.vocabulary_tokens)[NUM_SPECIAL:]
    assert counts.std() / counts.mean() < 0.2, "every token is drawn alike"


def test_every_place_is_hidden_alike_over_the_steps(run_of, wordpiece):
    ids = rows_of(wordpiece, 50, 20)
    total = sum(marked(hidden(run_of, wordpiece, ids, step=step)).sum(axis=0) for step in range(100))
    assert total / 5000 == pytest.approx(3 / 20, abs=0.02)


@settings(max_examples=30, deadline=None)
@given(
    first=st.integers(0, 40),
    count=st.integers(1, 5),
    step=st.integers(0, 2**40),
    unit=st.sampled_from(["token", "word", "span"]),
)
def test_rows_are_hidden_alike_whoever_computes_them(run_of, wordpiece, first, count, step, unit):
    ids = rows_of(wordpiece, 48, 24)
    whole = hidden(run_of, wordpiece, ids, step=step, mask_unit=unit)
    chosen = slice(first, first + count)
    part = hidden(run_of, wordpiece, ids[chosen], step=step, numbers=np.arange(48)[chosen], mask_unit=unit)
    for ours, theirs in zip(part, whole, strict=True):
        np.testing.assert_array_equal(ours, theirs[chosen])


def test_steps_rows_and_seeds_hide_otherwise(run_of, wordpiece):
    ids = np.repeat(rows_of(wordpiece, 1, 64), 2, axis=0)
    one = hidden(run_of, wordpiece, ids)
    assert (one.places[0] != one.places[1]).any()
    assert (one.places != hidden(run_of, wordpiece, ids, step=4).places).any()


def test_special_tokens_and_what_is_no_text_stay(run_of, wordpiece):
    ids = rows_of(wordpiece, 40, 64)
    ids[:, ::5] = np.arange(len(ids))[:, None] % NUM_SPECIAL
    is_text = np.broadcast_to(np.arange(64) < 30, ids.shape)
    is_hidden = marked(hidden(run_of, wordpiece, ids, is_text=is_text, mask_fraction=0.5))
    assert not is_hidden[:, ::5].any() and not is_hidden[:, 30:].any() and is_hidden.any(axis=1).all()


def test_a_row_without_text_hides_nothing(run_of, wordpiece):
    ids = np.zeros((2, 64), np.int64)
    result = hidden(run_of, wordpiece, ids)
    assert (result.tokens == -1).all()
    np.testing.assert_array_equal(result.inputs, ids)


def test_words_are_hidden_whole(run_of, wordpiece):
    ids = np.array([wordpiece.encode("the unbelievable foxtrots, nobody reading the jumps over lazy brown dog")] * 300)
    tokens = [wordpiece.id_to_token(id_) for id_ in ids[0]]
    words = np.cumsum([not token.startswith("##") for token in tokens])
    assert max(np.bincount(words)) > 1, "some word has several pieces"
    is_hidden = marked(hidden(run_of, wordpiece, ids, mask_unit="word", mask_fraction=0.3))
    for row in is_hidden:
        for word in np.unique(words):
            assert row[words == word].all() or not row[words == word].any()


def test_spans_are_longer_than_words(run_of, wordpiece):
    ids = np.array(
        [wordpiece.encode("the dog jumps over the fox and the lazy dog jumps over the brown fox " * 3)] * 200
    )

    def mean_run(unit):
        is_hidden = marked(hidden(run_of, wordpiece, ids, mask_unit=unit, mask_fraction=0.3, span_words=4.0))
        begins = is_hidden & ~np.pad(is_hidden, ((0, 0), (1, 0)))[:, :-1]
        return is_hidden.sum() / begins.sum()

    assert mean_run("span") > 1.3 * mean_run("word")
