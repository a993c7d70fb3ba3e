"""Two or more models on the same examples: how far apart they are, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llm_dist.data.documents import Split
from llm_dist.errors import UserError
from llm_dist.objectives.entities import OUTSIDE
from llm_dist.predictions.inputs import read_inputs, task_of
from llm_dist.predictions.intervals import Interval, Numbers, interval, resampled_sums
from llm_dist.predictions.metrics import METRICS, Metric, Name, numbers_of
from llm_dist.predictions.predict import Predictor
from llm_dist.predictions.texts import read_texts, surprise
from llm_dist.trained import Precision, Trained


@dataclass(frozen=True)
class Difference(Interval):
    """A model's score less the first model's, over the same resamples."""

    share_above_0: float
    """Of the resamples."""


@dataclass(frozen=True)
class Compared:
    """One model's score."""

    model: str
    step: int
    score: Interval
    difference: Difference | None
    """To the first model; None for that one."""


@dataclass(frozen=True)
class Comparison:
    """Models side by side."""

    data: str
    metric: Name
    more_is_better: bool
    examples: int
    """Or documents: what is drawn anew."""
    samples: int
    seed: int
    models: list[Compared]


def compare(
    models: Sequence[tuple[str, Trained]],
    place: str,
    metric: Name | None = None,
    *,
    num_samples: int = 10_000,
    seed: int = 0,
    split: Split = "file",
    precision: Precision | None = None,
    is_cut: bool = False,
) -> Comparison:
    """Score each model on the examples, or documents, at `place`; differences are to the first.

    Args:
        models: how each is called, and what it is.
        place: labelled examples, or raw text for language models.
        metric: by default entity F1, else accuracy, else bits per byte.
        num_samples: how often as many examples are drawn with replacement.
        seed: of those draws.
        split: what a document is in .txt.
        precision: each run's own by default.
        is_cut: read only the beginning of examples that are too long.

    Raises:
        UserError: the metric or the data do not fit all of the models.
    """
    if len(models) < 2:
        raise UserError("one model is compared with nothing; name two runs or more")
    chosen = METRICS[_metric([trained for _, trained in models], metric)]
    if chosen.name == "bits_per_byte":
        texts = read_texts(place, split)
        numbers = [surprise(trained, texts, precision) for _, trained in models]
    else:
        numbers = [_numbers(trained, place, chosen.name, precision, is_cut) for _, trained in models]
    return Comparison(
        place,
        chosen.name,
        chosen.more_is_better,
        len(numbers[0]),
        num_samples,
        seed,
        _compared(models, numbers, chosen, num_samples, seed),
    )


def _compared(
    models: Sequence[tuple[str, Trained]], numbers: Sequence[Numbers], metric: Metric, num_samples: int, seed: int
) -> list[Compared]:
    values = [float(metric.score(each.sum(axis=0))) for each in numbers]
    resampled = [metric.score(sums) for sums in resampled_sums(numbers, num_samples, seed)]
    found: list[Compared] = []
    for (name, trained), value, scores in zip(models, values, resampled, strict=True):
        to_first = difference(value - values[0], scores - resampled[0]) if found else None
        found.append(Compared(name, trained.step, interval(value, scores), to_first))
    return found


def difference(value: float, resampled: Numbers) -> Difference:
    """Of a difference and its resamples [samples]."""
    return Difference(**vars(interval(value, resampled)), share_above_0=float(np.mean(resampled > 0)))


def _numbers(trained: Trained, place: str, name: Name, precision: Precision | None, is_cut: bool) -> Numbers:
    inputs = read_inputs(trained, place, is_labelled=True, is_cut=is_cut)
    return numbers_of(name, list(Predictor(trained, precision).predictions(inputs)), trained.run.data.labels)


def _metric(models: Sequence[Trained], wanted: Name | None) -> Name:
    kinds = {trained.run.objective.name for trained in models}
    if len(kinds) > 1:
        raise UserError(f"models that learnt different things cannot be compared: {', '.join(sorted(kinds))}")
    if kinds == {"causal"}:
        known: list[Name] = ["bits_per_byte"]
    else:
        task = task_of(models[0].run)
        known = ["accuracy", "macro_f1", "loss"]
        if task == "tag" and all(OUTSIDE in trained.run.data.labels for trained in models):
            known.insert(0, "f1")
    if wanted is not None and wanted not in known:
        raise UserError(f"--metric {wanted}: these models are compared by {', '.join(known)}")
    return wanted or known[0]
