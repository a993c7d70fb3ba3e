"""What may change between two starts of one run, and the past of a mixture, which may not."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from llm_dist import config
from llm_dist.config_resume import check_resume
from llm_dist.errors import ResumeRefused

Weights = Mapping[str, float]


def run_of(*overrides: str, **data: Any) -> config.Config:
    table = {
        "run": {"name": "tiny", "steps": 10},
        "model": {"layers": 1, "d_model": 8, "heads": 2},
        "data": {"train": "shards", "sequence_tokens": 8, **data},
        "batch": {"tokens_per_step": 16},
        "optim": {"total_steps": 10},
    }
    return config.parse(table, overrides)


def mixed(*segments: tuple[int, Weights], sources: str = "abcd") -> config.Config:
    mixture = [{"from_step": first, "weights": dict(weights)} for first, weights in segments]
    return run_of(train={name: f"shards/{name}" for name in sources}, mixture=mixture)


def refusal(before: config.Config, now: config.Config, step: int, accepted: tuple[str, ...] = ()) -> str:
    with pytest.raises(ResumeRefused) as caught:
        check_resume(before, now, accepted, step)
    (line,) = str(caught.value).splitlines()
    return line


ACCEPT = ("data.mixture",)


def test_what_may_change_on_resume() -> None:
    before = run_of()

    def check(*overrides: str, accepted: tuple[str, ...] = ()) -> list[str]:
        return check_resume(before, run_of(*overrides), accepted, step=4)

    assert check("run.steps=99", "engine.name=fsdp", "log.every_steps=1", "data.train=moved") == []
    assert check("data.cache=/tmp", "data.tokenizer=t", "data.workers=3", 'data.holdout=["x"]') == []
    assert check("optim.lr=1", "optim.eps=1", accepted=("optim.lr", "optim.eps")) == ["optim.lr", "optim.eps"]
    with pytest.raises(ResumeRefused) as caught:
        check("model.layers=2", "optim.lr=1", "run.seed=1", "data.packing=best_fit", accepted=("model.layers",))
    assert str(caught.value).splitlines() == [
        "run.seed was 0 and is now 1: that is another run; choose another run.name",
        "model.layers was 1 and is now 2: that is another run; choose another run.name",
        "data.packing was 'concatenate' and is now 'best_fit': that is another run; choose another run.name",
        "optim.lr was 0.0003 and is now 1.0; add --accept optim.lr to change it from here on",
    ]


@pytest.mark.parametrize("step", [0, 1, 50, 60])
def test_a_segment_from_the_current_step_on_is_accepted_by_name(step: int) -> None:
    before = mixed((0, {"a": 1, "b": 2}))
    now = mixed((0, {"a": 1, "b": 2}), (60, {"a": 1}))
    assert refusal(before, now, step).endswith("; add --accept data.mixture to change it from here on")
    assert check_resume(before, now, ACCEPT, step) == ["data.mixture"]
    assert check_resume(now, now, (), step) == []


@pytest.mark.parametrize(
    "now",
    [
        mixed((0, {"a": 1, "b": 2}), (49, {"a": 1})),
        mixed((0, {"a": 1, "b": 3})),
        mixed((0, {"a": 1, "b": 2, "c": 0.001})),
        mixed((0, {"a": 1, "b": 2}), (20, {"a": 2, "b": 1}), (40, {"a": 1, "b": 2})),
        mixed(),
    ],
    ids=["too early a segment", "other weights", "another source", "a segment put between", "by size"],
)
def test_another_past_is_refused_whatever_is_accepted(now: config.Config) -> None:
    line = refusal(mixed((0, {"a": 1, "b": 2})), now, 50, ACCEPT)
    assert line.startswith("data.mixture: 50 steps are finished, and its segments before that were ")
    assert line.endswith("; keep them as they were and add a segment from the current step on")


def test_what_has_not_begun_may_still_change() -> None:
    before = mixed((0, {"a": 1}), (50, {"b": 1}), (80, {"c": 1}))
    for now in (mixed((0, {"a": 1})), mixed((0, {"a": 1}), (50, {"d": 1})), mixed((0, {"a": 1}), (51, {"b": 1}))):
        assert check_resume(before, now, ACCEPT, 50) == ["data.mixture"]
        assert "segments before that were" in refusal(before, now, 51, ACCEPT)
    assert check_resume(before, mixed((0, {"d": 1})), ACCEPT, 0) == ["data.mixture"], "nothing was read yet"


def test_weights_that_mean_the_same_are_the_same_past() -> None:
    before = mixed((0, {"a": 0.1, "b": 0.2, "c": 0.3}))
    for same in ({"a": 1, "b": 2, "c": 3}, {"c": 0.3, "b": 0.2, "a": 0.1}, {"a": 0.1, "b": 0.2, "c": 0.3, "d": 0}):
        assert check_resume(before, mixed((0, same), (60, {"d": 1})), ACCEPT, 50) == ["data.mixture"]


@given(weights=st.lists(st.sampled_from([0, 0.1, 0.2, 0.3, 0.7, 1, 3, 1e-3]), min_size=4, max_size=4), data=st.data())
def test_weights_may_be_written_in_any_order(weights: list[float], data: st.DataObject) -> None:
    assume(sum(weights))
    written = data.draw(st.permutations(list(zip("abcd", weights, strict=True))))
    before, now = (mixed((0, dict(each)), *more) for each, more in ((sorted(written), []), (written, [(9, {"a": 1})])))
    assert check_resume(before, now, ACCEPT, 5) == ["data.mixture"]


def test_a_single_source_becomes_the_first_of_a_mixture() -> None:
    before, sources = run_of(), {"train": "elsewhere", "b": "shards/b"}
    begins = {"from_step": 0, "weights": {"train": 1.0}}
    now = run_of(train=sources, mixture=[begins, {"from_step": 50, "weights": {"train": 3, "b": 1}}])
    assert check_resume(before, now, ACCEPT, 50) == ["data.mixture"]
    assert "--accept data.mixture" in refusal(before, now, 50)
    assert "segments before that were" in refusal(before, now, 51, ACCEPT)
    assert "segments before that were" in refusal(before, run_of(train=sources), 50, ACCEPT)


def test_a_source_that_joins_a_mixture_by_size_changes_its_past() -> None:
    """Weights by size are those of all sources: with one more, every step would have read other sequences."""
    two, three = (mixed(sources=names) for names in ("ab", "abc"))
    assert check_resume(two, two, (), 50) == []
    assert "data.mixture" in refusal(two, three, 50, ACCEPT)
    assert check_resume(two, three, ACCEPT, 0) in ([], ["data.mixture"])


STEPS = st.integers(0, 30)
WEIGHTS = st.dictionaries(st.sampled_from("abcd"), st.sampled_from([1, 2, 0.5]), min_size=1)


@given(history=st.lists(st.tuples(STEPS, WEIGHTS), min_size=1, max_size=5), step=STEPS, data=st.data())
def test_a_change_is_refused_if_and_only_if_a_finished_step_would_have_read_otherwise(history, step, data) -> None:
    """By brute force: the shares that ruled each finished step."""
    firsts = sorted({first for first, _ in history} | {0})
    before = [(first, weights) for first, (_, weights) in zip(firsts, itertools.cycle(history), strict=False)]
    number = data.draw(st.integers(0, len(before) - 1))
    now = [*before[:number], (before[number][0], data.draw(WEIGHTS)), *before[number + 1 :]]
    if data.draw(st.booleans()):
        now.append((now[-1][0] + data.draw(st.integers(1, 9)), data.draw(WEIGHTS)))
    is_equal = [shares(before, each) == shares(now, each) for each in range(step)]
    if before == now:
        assert check_resume(mixed(*before), mixed(*now), (), step) == []
    elif all(is_equal) and [f for f, _ in before if f < step] == [f for f, _ in now if f < step]:
        assert check_resume(mixed(*before), mixed(*now), ACCEPT, step) == ["data.mixture"]
    elif not all(is_equal):
        assert "segments before that were" in refusal(mixed(*before), mixed(*now), step, ACCEPT)


def shares(segments: list[tuple[int, Weights]], step: int) -> Weights:
    (weights,) = [each for first, each in segments if first <= step][-1:]
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}
