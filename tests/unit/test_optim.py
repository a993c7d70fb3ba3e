"""Who decays, and the rate of each step."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_dist import config, optim
from llm_dist.model.transformer import Transformer


def run_file(**keys: object) -> config.Config:
    table = {
        "run": {"name": "test", "steps": keys.pop("steps", 100)},
        "model": {"family": keys.pop("family", "llama"), "layers": 2, "d_model": 8, "heads": 2, "d_ff": 16},
        "data": {"train": "none", "sequence_tokens": 8},
        "batch": {"tokens_per_step": 8},
        "optim": {"lr": 1.0, **keys},
    }
    return config.parse(table)


def rates(**keys: object) -> list[float]:
    run = run_file(**keys)
    return [optim.learning_rate(run, step) for step in range(run.run.steps + 20)]


def test_warm_up_reaches_the_peak_at_its_last_step() -> None:
    assert rates(warmup_steps=4, schedule="constant")[:6] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_without_warm_up_the_first_rate_is_the_peak() -> None:
    assert rates(schedule="cosine")[0] == 1.0


@pytest.mark.parametrize(
    ("schedule", "at_half"), [("cosine", 0.5 * (1 + 0.1)), ("linear", 0.5 * (1 + 0.1)), ("wsd", 1.0), ("constant", 1.0)]
)
def test_the_middle_of_each_schedule(schedule: str, at_half: float) -> None:
    assert rates(schedule=schedule)[50] == pytest.approx(at_half)


def test_wsd_falls_over_its_last_part_only() -> None:
    passed = rates(schedule="wsd", decay_fraction=0.2, final_lr_fraction=0.0)

    assert passed[:81] == [1.0] * 81
    assert passed[90] == pytest.approx(0.5)
    assert passed[100] == pytest.approx(0.0, abs=1e-12)


def test_cosine_is_a_cosine() -> None:
    passed = rates(schedule="cosine", final_lr_fraction=0.2, warmup_steps=20)

    assert passed[40] == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2)


@settings(max_examples=40)
@given(
    st.sampled_from(["cosine", "linear", "wsd", "constant"]),
    st.integers(0, 29),
    st.integers(30, 80),
    st.floats(0, 1),
    st.floats(0.01, 1),
)
def test_rates_rise_then_fall_and_stay_at_the_end(
    schedule: str, warmup: int, total: int, final: float, decay: float
) -> None:
    passed = rates(
        schedule=schedule,
        warmup_steps=warmup,
        total_steps=total,
        final_lr_fraction=final,
        decay_fraction=decay,
        steps=100,
    )
    peak = max(0, warmup - 1)
    end = 1.0 if schedule == "constant" else final

    assert passed[: peak + 1] == sorted(passed[: peak + 1])
    assert all(later <= earlier + 1e-12 for earlier, later in zip(passed[peak:], passed[peak + 1 :], strict=False))
    assert passed[total:] == pytest.approx([end] * len(passed[total:]))
    assert 0 < max(passed) <= 1


def test_raising_the_number_of_steps_moves_no_rate() -> None:
    short = run_file(steps=50).frozen()
    longer = short.model_copy(update={"run": short.run.model_copy(update={"steps": 80})})

    assert [optim.learning_rate(short, step) for step in range(50)] == [
        optim.learning_rate(longer, step) for step in range(50)
    ]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_only_matrices_outside_the_embeddings_decay(family: str) -> None:
    run = run_file(family=family)
    model = Transformer(run.model, 20, torch.float32)
    decayed, kept = optim.parameter_groups(model.named_parameters(), 0.3)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    chosen = {names[id(parameter)] for parameter in decayed["params"]}

    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.3, 0.0)
    assert len(decayed["params"]) + len(kept["params"]) == len(names)
    assert "blocks.0.attention.query.weight" in chosen
    assert not [name for name in chosen if "norm" in name or "embedding" in name or "bias" in name]
    assert ("head.weight" in chosen) == (family == "llama"), "a tied head is an embedding"
    assert "positions.weight" not in chosen


def test_an_empty_group_is_left_out() -> None:
    groups = optim.parameter_groups([("norm.weight", torch.nn.Parameter(torch.ones(3)))], 0.1)

    assert [group["weight_decay"] for group in groups] == [0.0]


def test_lower_blocks_learn_more_slowly() -> None:
    shape = config.Model(family="bert", layers=2, d_model=8, heads=2)
    model = Transformer(shape, 20, torch.float32)
    groups = optim.build(model.named_parameters(), run_file(layer_lr_decay=0.5).optim).param_groups
    scale_of = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    scales = {name: scale_of[id(parameter)] for name, parameter in model.named_parameters()}

    assert {scales[name] for name in scales if name.startswith(("embedding", "positions", "segments"))} == {0.125}
    assert {scales[name] for name in scales if name.startswith("blocks.0.")} == {0.25}
    assert {scales[name] for name in scales if name.startswith("blocks.1.")} == {0.5}
    assert {scales[name] for name in scales if name.startswith("head.")} == {1.0}
    assert {group["weight_decay"] for group in groups} == {0.1, 0.0}


def test_what_is_frozen_is_in_no_group() -> None:
    model = Transformer(run_file().model, 20, torch.float32)
    model.blocks[0].requires_grad_(False)
    groups = optim.parameter_groups(model.named_parameters(), 0.1)
    chosen = {id(parameter) for group in groups for parameter in group["params"]}

    assert not chosen & {id(parameter) for parameter in model.blocks[0].parameters()}
    assert chosen >= {id(parameter) for parameter in model.blocks[1].parameters()}


def test_groups_scale_the_rate_that_is_written() -> None:
    optimizer = optim.build([("head.weight", torch.nn.Parameter(torch.ones(3, 3)))], run_file().optim)
    optimizer.param_groups[0]["lr_scale"] = 0.5
    optim.set_learning_rate(optimizer, 0.2)

    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


def test_adamw_is_the_formula() -> None:
    """Loshchilov and Hutter 2019, algorithm 2, two steps by hand."""
    parameter = torch.nn.Parameter(torch.full((1, 1), 2.0))
    chosen = run_file(lr=0.1, beta1=0.8, beta2=0.9, eps=1e-3, weight_decay=0.5).optim
    optimizer = optim.build([("head.weight", parameter)], chosen)
    expected, first, second = 2.0, 0.0, 0.0
    for step, gradient in enumerate([0.3, -1.0], start=1):
        parameter.grad = torch.full((1, 1), gradient)
        optimizer.step()
        first, second = 0.8 * first + 0.2 * gradient, 0.9 * second + 0.1 * gradient**2
        update = (first / (1 - 0.8**step)) / (math.sqrt(second / (1 - 0.9**step)) + 1e-3)
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * update

    assert parameter.item() == pytest.approx(expected, rel=1e-5)
