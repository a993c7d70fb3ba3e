"""Scores a labelled run on labelled examples, and writes down what it got wrong."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llm_dist.errors import UserError
from llm_dist.predictions.cases import cases, write_table
from llm_dist.predictions.inputs import read_inputs, task_of
from llm_dist.predictions.measures import LabelScores, measure
from llm_dist.predictions.page import page_of
from llm_dist.predictions.predict import Prediction, Predictor
from llm_dist.publishing import publish
from llm_dist.trained import Precision, Trained

MOST_WRONG, MOST_UNCERTAIN = 300, 100
"""Shown on the page; the table holds all that is wrong."""


@dataclass(frozen=True)
class LabelEvaluation(LabelScores):
    """Scores, and of what."""

    data: str
    step: int
    task: str
    report: list[str]
    """The files of the error report, where one was asked for."""


def evaluate_labels(
    trained: Trained,
    place: str,
    *,
    report: Path | None = None,
    precision: Precision | None = None,
    is_cut: bool = False,
) -> LabelEvaluation:
    """Score the labels that `trained` predicts for the labelled examples at `place`.

    Args:
        trained: a run that learnt labels.
        place: a file, folder or glob of labelled examples, or shards that were made of some.
        report: a folder for errors.tsv and errors.html.
        precision: the run's own by default.
        is_cut: read only the beginning of what is too long.

    Raises:
        UserError: an example cannot be used, a label is unknown, or scikit-learn or seqeval is missing.
    """
    task, names = task_of(trained.run), trained.run.data.labels
    if report is not None and report.exists() and not report.is_dir():
        raise UserError(f"--report {report}: is a file; name a folder")
    predictor = Predictor(trained, precision, trained.run.batch.sequences_per_micro_batch)
    predictions = list(predictor.predictions(read_inputs(trained, place, is_labelled=True, is_cut=is_cut)))
    scores = measure(predictions, names, are_tags=task == "tag")
    files = [] if report is None else write_report(report, f"{trained.run.run.name} on {place}", scores, predictions)
    return LabelEvaluation(**vars(scores), data=place, step=trained.step, task=task, report=files)


def write_report(folder: Path, title: str, scores: LabelScores, predictions: list[Prediction]) -> list[str]:
    """Write errors.tsv and errors.html; earlier ones are replaced."""
    chosen = cases(predictions, [each.name for each in scores.classes], MOST_UNCERTAIN)
    table, page = folder / "errors.tsv", folder / "errors.html"
    publish(page, page_of(title, scores, chosen, MOST_WRONG))
    write_table(table, chosen)
    return [str(table), str(page)]
