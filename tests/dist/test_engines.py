"""Same mathematics everywhere: every engine against `plain` on one rank that computes the step as one micro-batch.

`pytest --junitxml FILE -o junit_family=xunit1` reports the largest deviation that each test measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import pytest
import torch

from llm_dist.errors import UserError
from llm_dist.runtime import Runtime
from tests.dist import training
from tests.dist.ranks import Ranks
from tests.dist.training import ENGINES, Arrays, Trajectory, micro_batch, rows_per_step

pytestmark = pytest.mark.dist
Group = Callable[[int], Ranks]
Gradients = tuple[Arrays, float]
"""By parameter name, and the norm the engine reported."""
Record = Callable[[str, object], None]
"""Measured values go into the report that `--junitxml` writes."""

HUGE = 2.0**40
"""A learning rate beside which the first weights vanish: change / HUGE is the gradient to the last bit or two."""

TIED = ("model.tied_head=true", "model.vocabulary_multiple=1", "model.qk_norm=true", "objective.z_loss=1e-3")
GPT2 = ("model.family=gpt2", "model.kv_heads=4", "model.vocabulary_multiple=1", "data.document_mask=true")
MODELS = {
    "llama": (),
    "tied": (*TIED, "engine.recompute=selective"),
    "gpt2": (*GPT2, "engine.recompute=full"),
}
"""The two unusual ones have 101 rows of vocabulary, which no number of ranks divides, and recompute activations."""

VANISHING = "attention.key.bias"
"""Softmax does not see what is added to all of a query's scores alike: this gradient is zero but for rounding."""

BF16 = "engine.precision=bf16"


def engines(ranks: int) -> list[str]:
    return [name for name in ENGINES if name != "hybrid" or ranks == 4]


def first_gradients(here: Runtime, *overrides: str) -> Gradients:
    """Gradient of the first step by parameter name, as the update applied it, and the norm the engine reports."""
    run = training.run_file("optim.name=sgd", "optim.clip=0", "optim.weight_decay=0", *overrides)
    engine = training.engine_of(run, here)
    before = training.whole_state(engine, here)
    batches, valid = training.micro_batches(run, here, step=0)
    norm = float(engine.train_step(batches, valid, HUGE, 0).grad_norm)
    after = training.whole_state(engine, here)
    engine.close()
    return {key: (before[key] - after[key]) / np.float32(HUGE) for key in before}, norm


def trajectory(here: Runtime, steps: int, *overrides: str) -> tuple[Trajectory, Arrays]:
    run = training.run_file(*overrides)
    engine = training.engine_of(run, here)
    passed = training.train(engine, run, here, range(steps))
    state = training.whole_state(engine, here)
    engine.close()
    return passed, state


@pytest.fixture(scope="module")
def oracle(group_of: Group) -> Iterator[Callable[..., object]]:
    """What `function(runtime, *args)` gives on one rank; each asked for once."""
    known: dict[object, object] = {}

    def ask(function: Callable[..., object], *args: object) -> object:
        key = (function.__name__, args)
        if key not in known:
            known[key] = group_of(1).run(function, *args)[0]
        return known[key]

    yield ask


def relative_error(found: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> float:
    return float(np.linalg.norm(found.astype(np.float64) - expected) / np.linalg.norm(expected.astype(np.float64)))


def largest_gradient_error(found: Gradients, expected: Gradients) -> float:
    """Over the parameters, of the relative L2 error."""
    assert found[0].keys() == expected[0].keys()
    vanishing = [key for key in expected[0] if VANISHING in key]
    assert all(np.linalg.norm(found[0].pop(key)) <= 1e-7 * expected[1] for key in vanishing)
    errors = {key: relative_error(found[0][key], expected[0][key]) for key in found[0]}
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= 1e-5, worst
    assert found[1] == pytest.approx(expected[1], rel=1e-5)
    return errors[worst]


def largest_difference(found: Trajectory, expected: Trajectory, steps: int) -> float:
    return float(np.abs(np.subtract(found.losses[:steps], expected.losses[:steps])).max())


@pytest.mark.parametrize("accumulated", [1, 3])
@pytest.mark.parametrize(("ranks", "name"), [(ranks, name) for ranks in (1, 2, 4) for name in engines(ranks)])
def test_first_gradients_are_those_of_plain_on_one_rank(
    group_of: Group,
    oracle: Callable[..., Gradients],
    record_property: Record,
    ranks: int,
    name: str,
    accumulated: int,
) -> None:
    size = training.ROWS // ranks // accumulated
    found = group_of(ranks).run(first_gradients, *ENGINES[name], micro_batch(size))[0]

    error = largest_gradient_error(found, oracle(first_gradients, micro_batch(training.ROWS)))
    record_property("gradients", error)


@pytest.mark.parametrize("model", ["tied", "gpt2"])
@pytest.mark.parametrize("name", list(ENGINES))
def test_first_gradients_of_other_models(
    group_of: Group, oracle: Callable[..., Gradients], record_property: Record, model: str, name: str
) -> None:
    found = group_of(4).run(first_gradients, *ENGINES[name], *MODELS[model], micro_batch(2))[0]
    without_recompute = [each for each in MODELS[model] if not each.startswith("engine.")]

    error = largest_gradient_error(found, oracle(first_gradients, *without_recompute, micro_batch(training.ROWS)))
    record_property("gradients", error)


@pytest.mark.parametrize("rows", [3, 10])
@pytest.mark.parametrize("name", list(ENGINES))
def test_ranks_need_not_divide_the_rows(
    group_of: Group, oracle: Callable[..., Gradients], record_property: Record, name: str, rows: int
) -> None:
    """Of 3 rows over 4 ranks, one rank has none; of 10, ranks have two or three and fill up two micro-batches of 2."""
    found = group_of(4).run(first_gradients, *ENGINES[name], rows_per_step(rows), micro_batch(2))[0]

    error = largest_gradient_error(found, oracle(first_gradients, rows_per_step(rows), micro_batch(rows)))
    record_property("gradients", error)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_changes_no_gradient(group_of: Group, oracle: Callable[..., Gradients], recompute: str) -> None:
    kept, _ = oracle(first_gradients, micro_batch(training.ROWS))
    again, _ = group_of(1).run(first_gradients, micro_batch(training.ROWS), f"engine.recompute={recompute}")[0]

    assert all(np.array_equal(again[key], kept[key]) for key in kept)


@pytest.mark.parametrize("name", list(ENGINES))
def test_sgd_with_clipping_ends_at_the_same_parameters(
    group_of: Group, oracle: Callable[..., tuple[Trajectory, Arrays]], record_property: Record, name: str
) -> None:
    clip = 0.2
    sgd = ("optim.name=sgd", "optim.lr=3", f"optim.clip={clip}")
    found, parameters = group_of(4).run(trajectory, 20, *ENGINES[name], *sgd, micro_batch(2))[0]
    expected, references = oracle(trajectory, 20, *sgd, micro_batch(training.ROWS))

    assert largest_difference(found, expected, 20) <= 1e-5
    assert found.grad_norms == pytest.approx(expected.grad_norms, rel=1e-4)
    worst = max(relative_error(parameters[key], references[key]) for key in references)
    record_property("parameters", worst)
    assert worst <= 1e-5
    assert min(expected.grad_norms) > clip, "a step was not clipped"


@pytest.mark.parametrize("name", engines(2))
def test_adamw_loses_the_same(
    group_of: Group, oracle: Callable[..., tuple[Trajectory, Arrays]], record_property: Record, name: str
) -> None:
    found, _ = group_of(2).run(trajectory, 50, *ENGINES[name])[0]
    expected, _ = oracle(trajectory, 50, micro_batch(training.ROWS))

    assert expected.losses[-1] < expected.losses[0] - 1, "nothing was learnt"
    record_property("losses_20", largest_difference(found, expected, 20))
    record_property("losses_50", largest_difference(found, expected, 50))
    assert largest_difference(found, expected, 20) <= 1e-5
    assert largest_difference(found, expected, 50) <= 1e-4
    assert found.grad_norms[:20] == pytest.approx(expected.grad_norms[:20], rel=1e-3)


@pytest.mark.parametrize("name", engines(2))
def test_bf16_losses_stay_within_half_a_percent(
    group_of: Group, oracle: Callable[..., tuple[Trajectory, Arrays]], record_property: Record, name: str
) -> None:
    found, _ = group_of(2).run(trajectory, 50, *ENGINES[name], BF16)[0]
    expected, _ = oracle(trajectory, 50, BF16, micro_batch(training.ROWS))

    record_property("losses_bf16", largest_difference(found, expected, 50))
    assert found.losses == pytest.approx(expected.losses, rel=5e-3)


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3"])
def test_zero_starts_as_fsdp_does_in_bf16(group_of: Group, name: str) -> None:
    """One micro-batch, so that all add the same two numbers: rounding is then the same, not only close."""
    (found, _), (expected, _) = (
        group_of(2).run(trajectory, 2, *ENGINES[engine], BF16, micro_batch(6))[0] for engine in (name, "fsdp")
    )

    assert found.losses == expected.losses


def evaluated_in_between(here: Runtime, evaluations: int, *overrides: str) -> tuple[list[float], Arrays]:
    run = training.run_file(*overrides)
    engine = training.engine_of(run, here)
    batches, valid = training.micro_batches(run, here, step=99)
    losses = []
    for step in range(3):
        training.train(engine, run, here, range(step, step + 1))
        for _ in range(evaluations):
            nats = sum((engine.eval_step(batch).nats for batch in batches), torch.zeros(()))
            losses.append(float(here.sum(nats)) / valid)
    state = training.whole_state(engine, here)
    engine.close()
    return losses, state


@pytest.mark.parametrize("name", engines(2))
def test_evaluation_is_the_same_and_changes_nothing(
    group_of: Group, oracle: Callable[..., tuple[list[float], Arrays]], name: str
) -> None:
    expected, _ = oracle(evaluated_in_between, 2)
    dropout = "model.dropout=0.1"
    found, _ = group_of(2).run(evaluated_in_between, 2, *ENGINES[name])[0]
    _, disturbed = group_of(2).run(evaluated_in_between, 1, *ENGINES[name], dropout)[0]
    _, undisturbed = group_of(2).run(evaluated_in_between, 0, *ENGINES[name], dropout)[0]

    assert found == pytest.approx(expected, abs=1e-5)
    assert all(np.array_equal(disturbed[key], undisturbed[key]) for key in undisturbed)


def poisoned(here: Runtime, *overrides: str) -> tuple[float, float]:
    """Loss and gradient norm of a step whose weights hold a number that is none."""
    run = training.run_file(*overrides)
    engine = training.engine_of(run, here)
    for key, part in engine.state().items():
        if key == "param/norm.weight":
            part.values[:1] = torch.nan
    engine.state_was_written(0)
    (loss,), (grad_norm,) = training.train(engine, run, here, range(1))
    engine.close()
    return loss, grad_norm


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", engines(2))
def test_numbers_that_are_not_finite_are_reported_by_every_rank(group_of: Group, name: str, precision: str) -> None:
    """Vendors differ in whether they take such a step; the trainer stops at it, so none may hide it."""
    found = group_of(2).run(poisoned, *ENGINES[name], f"engine.precision={precision}")

    assert not np.isfinite(found).any()


def refusal(here: Runtime, *overrides: str) -> str:
    try:
        training.engine_of(training.run_file(*overrides), here)
    except UserError as error:
        return str(error)
    return ""


def test_sharding_that_does_not_fit_is_refused(group_of: Group) -> None:
    uneven = group_of(2).run(refusal, "engine.name=fsdp", "engine.shard_ranks=3")
    elsewhere = group_of(2).run(refusal, "engine.name=zero", "engine.shard_ranks=2")

    assert all("engine.shard_ranks=3 does not divide the 2 ranks" in line for line in uneven)
    assert all('engine.name="fsdp"' in line for line in elsewhere)
