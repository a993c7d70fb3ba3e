"""What models are compared by: numbers of each example whose sums give a score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from llm_dist.objectives.entities import count_found
from llm_dist.predictions.intervals import Numbers, Score
from llm_dist.predictions.predict import Prediction

Name = Literal["accuracy", "macro_f1", "f1", "loss", "bits_per_byte"]


@dataclass(frozen=True)
class Metric:
    """A score that follows from sums over examples."""

    name: Name
    more_is_better: bool
    score: Score


def _ratio(sums: Numbers) -> Numbers:
    result: Numbers = sums[..., 0] / np.maximum(sums[..., 1], 1)
    return result


def _entity_f1(sums: Numbers) -> Numbers:
    right, found_and_there = sums[..., 0], sums[..., 1]
    result: Numbers = 2 * right / np.maximum(found_and_there, 1)
    return result


def _macro_f1(sums: Numbers) -> Numbers:
    """Mean over the classes that occur, of sums (right, true + predicted) by class: [..., 2, classes] laid flat."""
    right, there = np.split(sums, 2, axis=-1)
    f1 = 2 * right / np.maximum(there, 1)
    result: Numbers = f1.sum(axis=-1) / np.maximum((there > 0).sum(axis=-1), 1)
    return result


def _bits_per_byte(sums: Numbers) -> Numbers:
    result: Numbers = _ratio(sums) / np.log(2)
    return result


METRICS: dict[Name, Metric] = {
    "accuracy": Metric("accuracy", True, _ratio),
    "macro_f1": Metric("macro_f1", True, _macro_f1),
    "f1": Metric("f1", True, _entity_f1),
    "loss": Metric("loss", False, _ratio),
    "bits_per_byte": Metric("bits_per_byte", False, _bits_per_byte),
}


def numbers_of(name: Name, predictions: Sequence[Prediction], labels: Sequence[str]) -> Numbers:
    """What `METRICS[name]` sums: [examples, k]."""
    match name:
        case "accuracy":
            rows = [[float((each.true == each.predicted).sum()), float(len(each.true))] for each in predictions]
        case "loss":
            rows = [[each.nats, float(len(each.true))] for each in predictions]
        case "f1":
            rows = [_entities(each, labels) for each in predictions]
        case "macro_f1":
            return np.stack([_by_class(each, len(labels)) for each in predictions])
        case "bits_per_byte":
            raise AssertionError("labels have no bytes")
    return np.array(rows, np.float64)


def _entities(prediction: Prediction, labels: Sequence[str]) -> list[float]:
    tags = [[labels[id_] for id_ in ids] for ids in (prediction.true, prediction.predicted)]
    right, found, there = count_found([(tags[0], tags[1])])
    return [float(right), float(found + there)]


def _by_class(prediction: Prediction, num_labels: int) -> Numbers:
    true, predicted = prediction.true, prediction.predicted
    right = np.bincount(true[true == predicted], minlength=num_labels)
    there = np.bincount(true, minlength=num_labels) + np.bincount(predicted, minlength=num_labels)
    return np.concatenate([right, there]).astype(np.float64)
