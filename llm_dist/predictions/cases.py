"""Which predictions a person should look at: the wrong ones, the surest first, and the least certain right ones."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from llm_dist.predictions.predict import Prediction

Verdict = Literal["wrong", "uncertain"]


@dataclass(frozen=True)
class Judged:
    """One label of an example."""

    text: str
    """What was labelled: a text, or a word."""
    true: str
    predicted: str
    probability: float
    """Of the predicted label."""
    true_probability: float

    @property
    def is_right(self) -> bool:
        """Whether the label is."""
        return self.true == self.predicted


@dataclass(frozen=True)
class Case:
    """One example to look at."""

    verdict: Verdict
    where: str
    judged: list[Judged]
    """One, or one per word."""

    @property
    def worst(self) -> Judged:
        """The surest of the wrong labels, or else the least certain of the right ones."""
        wrong = [each for each in self.judged if not each.is_right]
        return max(wrong, key=_probability) if wrong else min(self.judged, key=_probability)


def _probability(judged: Judged) -> float:
    return judged.probability


def cases(predictions: Iterable[Prediction], names: Sequence[str], most_uncertain: int) -> list[Case]:
    """All that are wrong, the surest first, then the `most_uncertain` least certain of the right ones."""
    wrong: list[Case] = []
    right: list[Case] = []
    for prediction in predictions:
        judged = _judged(prediction, names)
        if prediction.is_right:
            right.append(Case("uncertain", prediction.example.where, judged))
        else:
            wrong.append(Case("wrong", prediction.example.where, judged))
    wrong.sort(key=lambda case: -case.worst.probability)
    right.sort(key=lambda case: case.worst.probability)
    return [*wrong, *right[:most_uncertain]]


def _judged(prediction: Prediction, names: Sequence[str]) -> list[Judged]:
    each = np.arange(len(prediction.true))
    probabilities, predicted = prediction.probabilities, prediction.predicted
    texts: Sequence[str] = prediction.example.texts
    if len(texts) != len(prediction.example.labels):  # a text and its pair
        texts = ["\n".join(texts)]
    return [
        Judged(text, names[true], names[guessed], float(sure), float(of_true))
        for text, true, guessed, sure, of_true in zip(
            texts,
            prediction.true.tolist(),
            predicted.tolist(),
            probabilities[each, predicted],
            probabilities[each, prediction.true],
            strict=False,
        )
    ]


def write_table(path: Path, chosen: Iterable[Case]) -> None:
    """As a .tsv that spreadsheets open: a line per case; wrong words are marked `word[true > predicted]`."""
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, "excel-tab", lineterminator="\n")
        table.writerow(["verdict", "probability", "true", "predicted", "true_probability", "text", "where"])
        for case in chosen:
            worst = case.worst
            numbers = f"{worst.probability:.6f}", f"{worst.true_probability:.6f}"
            true, predicted = (
                " ".join(names) for names in zip(*((j.true, j.predicted) for j in case.judged), strict=True)
            )
            text = " ".join(_marked(judged, len(case.judged)) for judged in case.judged)
            table.writerow([case.verdict, numbers[0], true, predicted, numbers[1], text, case.where])


def _marked(judged: Judged, num_judged: int) -> str:
    is_plain = judged.is_right or num_judged == 1
    return judged.text if is_plain else f"{judged.text}[{judged.true} > {judged.predicted}]"
