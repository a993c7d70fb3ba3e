"""How good predicted labels are: scikit-learn counts labels, seqeval counts entities. Knows no models and no files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt

from llm_dist.errors import UserError
from llm_dist.objectives.entities import OUTSIDE
from llm_dist.predictions.predict import Prediction

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Averages:
    """One score over several classes."""

    micro: float
    """Of all decisions together."""
    macro: float
    """Mean over the classes that occur, in truth or as predictions."""
    weighted: float
    """Mean over the classes, by how often each is there."""


@dataclass(frozen=True)
class ClassScores:
    """Of one label, or of the entities of one kind."""

    name: str
    precision: float
    recall: float
    f1: float
    support: int
    """How often it is there."""


@dataclass(frozen=True)
class Entities:
    """Whole entities: right only if both borders and the kind are."""

    precision: Averages
    recall: Averages
    f1: Averages
    support: int
    kinds: list[ClassScores]


@dataclass(frozen=True)
class LabelScores:
    """Of labels, each decision by itself."""

    examples: int
    scored: int
    """Labels that were compared."""
    not_read: int
    """Words behind the end of the model's sequence: not scored."""
    loss_nats: float
    """Mean negative log-likelihood of the true labels."""
    accuracy: float
    precision: Averages
    recall: Averages
    f1: Averages
    classes: list[ClassScores]
    confusion: list[list[int]]
    """[true label][predicted label], in the order of `classes`."""
    entities: Entities | None
    """None where labels are not of entities."""


def measure(predictions: Sequence[Prediction], names: Sequence[str], *, are_tags: bool) -> LabelScores:
    """Scores of predictions of labelled examples.

    Raises:
        UserError: scikit-learn or seqeval is not installed.
    """
    metrics = _wanted("sklearn.metrics", "scikit-learn")
    true = np.concatenate([each.true for each in predictions])
    predicted = np.concatenate([each.predicted for each in predictions])
    all_ids = np.arange(len(names))
    by_class = metrics.precision_recall_fscore_support(true, predicted, labels=all_ids, zero_division=0)
    averages = {
        kind: metrics.precision_recall_fscore_support(true, predicted, average=kind, zero_division=0)
        for kind in ("micro", "macro", "weighted")
    }
    precision, recall, f1 = (
        Averages(**{kind: float(scores[place]) for kind, scores in averages.items()}) for place in range(3)
    )
    num_words = sum(len(each.example.labels) for each in predictions)
    return LabelScores(
        examples=len(predictions),
        scored=len(true),
        not_read=num_words - len(true),
        loss_nats=sum(each.nats for each in predictions) / len(true),
        accuracy=float(metrics.accuracy_score(true, predicted)),
        precision=precision,
        recall=recall,
        f1=f1,
        classes=[_class(name, *scores) for name, *scores in zip(names, *by_class, strict=True)],
        confusion=metrics.confusion_matrix(true, predicted, labels=all_ids).tolist(),
        entities=measure_entities(predictions, names) if are_tags and OUTSIDE in names else None,
    )


def measure_entities(predictions: Sequence[Prediction], names: Sequence[str]) -> Entities:
    """Scores of the entities that tags spell.

    Raises:
        UserError: seqeval is not installed.
    """
    metrics = _wanted("seqeval.metrics", "seqeval")
    true = [[names[id_] for id_ in each.true] for each in predictions]
    predicted = [[names[id_] for id_ in each.predicted] for each in predictions]
    if all(tag == OUTSIDE for sentence in (*true, *predicted) for tag in sentence):
        nothing = Averages(0.0, 0.0, 0.0)
        return Entities(nothing, nothing, nothing, 0, [])
    report = metrics.classification_report(true, predicted, output_dict=True, zero_division=0)
    averages = {kind: report.pop(f"{kind} avg") for kind in ("micro", "macro", "weighted")}
    precision, recall, f1 = (
        Averages(**{kind: float(scores[name]) for kind, scores in averages.items()})
        for name in ("precision", "recall", "f1-score")
    )
    kinds = [
        _class(kind, scores["precision"], scores["recall"], scores["f1-score"], scores["support"])
        for kind, scores in report.items()
    ]
    return Entities(precision, recall, f1, int(averages["micro"]["support"]), kinds)


def _class(name: str, precision: float, recall: float, f1: float, support: float) -> ClassScores:
    return ClassScores(name, float(precision), float(recall), float(f1), int(support))


def _wanted(module: str, package: str) -> Any:
    try:
        return import_module(module)
    except ImportError:
        raise UserError(f"{package} is not installed, it counts what was right; pip install 'llm_dist[eval]'") from None
