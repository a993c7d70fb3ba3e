"""Predictions as JSON lines, one per example."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llm_dist.data.examples import Task
from llm_dist.objectives.entities import OUTSIDE, entities
from llm_dist.predictions.predict import Prediction


def line_of(prediction: Prediction, task: Task, names: Sequence[str]) -> dict[str, Any]:
    """What is said of one example; a word beyond the model's length has the label null."""
    return (_of_words if task == "tag" else _of_text)(prediction, names)


def _of_text(prediction: Prediction, names: Sequence[str]) -> dict[str, Any]:
    [probabilities], [label] = prediction.probabilities.tolist(), prediction.predicted.tolist()
    keys = ("text", "text_pair")
    return {
        **dict(zip(keys, prediction.example.texts, strict=False)),
        "label": names[label],
        "probability": probabilities[label],
        "probabilities": dict(zip(names, probabilities, strict=True)),
    }


def _of_words(prediction: Prediction, names: Sequence[str]) -> dict[str, Any]:
    words = prediction.example.texts
    labels = [names[label] for label in prediction.predicted]
    not_read = [None] * (len(words) - len(labels))
    said: dict[str, Any] = {
        "words": words,
        "labels": [*labels, *not_read],
        "probabilities": [*prediction.probabilities.max(axis=1).tolist(), *not_read],
    }
    if OUTSIDE in names:
        found = entities(labels)
        said["entities"] = [{**each._asdict(), "text": " ".join(words[each.first : each.end])} for each in found]
    return said
