"""The commands that say how good a model is, and what it says: eval, compare, predict."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from llm_dist.cli_manners import Best, Checkpoint, Json, Precision, Step, show
from llm_dist.errors import UserError, exit_code_of

if TYPE_CHECKING:
    from llm_dist.predictions.measures import Averages, ClassScores
    from llm_dist.predictions.report import LabelEvaluation

Precise = Annotated[Precision | None, typer.Option(help="The run's own by default.")]
Cut = Annotated[bool, typer.Option("--cut", help="Read only the beginning of examples that are too long.")]

_MOST_COLUMNS = 12
"""A wider table of confusions does not fit a terminal."""


def evaluate(
    checkpoint: Checkpoint,
    data: Annotated[
        str | None, typer.Option(help="Shard folder, or URL of one; for a run with labels, labelled files.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(metavar="FOLDER:NAME", help="Instead of data: tasks of lm-evaluation-harness.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Labels: folder for what was wrong, as table and page.")] = None,
    stride: Annotated[int | None, typer.Option(help="Text: tokens from one window to the next; T by default.")] = None,
    cut: Cut = False,
    step: Step = None,
    best: Best = False,
    precision: Precise = None,
    as_json: Json = False,
) -> None:
    """Score a model: perplexity and bits per byte of held-out text, or how many labels are right."""

    def work() -> int:
        from llm_dist import trained

        if (data is None) == (tasks is None):
            raise UserError("what to score? name either --data or --tasks")
        source = trained.find(checkpoint, step, best)
        if tasks is not None:
            from llm_dist.harness import run_tasks

            show(run_tasks(source, tasks), as_json)
            return 0
        assert data is not None
        if source.run.objective.name in ("classify", "tag"):
            from llm_dist.predictions.report import evaluate_labels

            if stride is not None:
                raise UserError(f"--stride {stride}: labels are predicted example by example; leave the option out")
            scores = evaluate_labels(source, data, report=report, precision=precision, is_cut=cut)
            print(json.dumps(asdict(scores))) if as_json else _show_labels(scores)
            return 0
        if report is not None:
            raise UserError(f'--report {report}: this run learnt no labels (objective.name="classify" or "tag")')
        show(trained.score(source, trained.open_held_out(source, data), precision, stride), as_json)
        return 0

    raise typer.Exit(exit_code_of(work))


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN_OR_CHECKPOINT...", help="Two or more; the first is base.")],
    data: Annotated[str, typer.Option(help="Labelled examples; for language models, raw text.")],
    metric: Annotated[
        Literal["accuracy", "macro_f1", "f1", "loss", "bits_per_byte"] | None,
        typer.Option(help="f1 is of entities. By default f1, else accuracy, else bits_per_byte."),
    ] = None,
    samples: Annotated[int, typer.Option(min=100, help="How often examples are drawn anew.")] = 10_000,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws.")] = 0,
    split: Annotated[Literal["file", "blank-line", "line"], typer.Option(help="What a document is in .txt.")] = "file",
    cut: Cut = False,
    best: Best = False,
    precision: Precise = None,
    as_json: Json = False,
) -> None:
    """Compare models on the same examples: scores and differences with 95 % intervals (paired bootstrap)."""

    def work() -> int:
        from llm_dist import trained
        from llm_dist.predictions import comparison

        models = [(str(run), trained.find(run, None, best)) for run in runs]
        found = comparison.compare(
            models, data, metric, num_samples=samples, seed=seed, split=split, precision=precision, is_cut=cut
        )
        print(json.dumps(asdict(found))) if as_json else _show_comparison(asdict(found))
        return 0

    raise typer.Exit(exit_code_of(work))


def predict(
    checkpoint: Checkpoint,
    data: Annotated[str, typer.Argument(metavar="INPUT", help="Texts, or words to tag; - is stdin, a line each.")],
    out: Annotated[Path | None, typer.Option(help="File of JSON lines; standard output by default.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Examples computed at once.")] = 32,
    cut: Cut = False,
    step: Step = None,
    best: Best = False,
    precision: Precise = None,
    as_json: Json = False,
) -> None:
    """Label texts, or the words of sentences: one JSON line per example, in their order."""

    def work() -> int:
        from llm_dist import trained
        from llm_dist.predictions.inputs import read_inputs, task_of
        from llm_dist.predictions.lines import line_of
        from llm_dist.predictions.predict import Predictor

        source = trained.find(checkpoint, step, best)
        task, names = task_of(source.run), source.run.data.labels
        inputs = read_inputs(source, data, is_labelled=False, is_cut=cut)
        predictions = Predictor(source, precision, batch).predictions(inputs)
        count = _write_lines((line_of(each, task, names) for each in predictions), out)
        if as_json:
            show({"examples": count, "out": None if out is None else str(out), "step": source.step}, as_json)
        return 0

    raise typer.Exit(exit_code_of(work))


def _write_lines(lines: Iterable[dict[str, Any]], out: Path | None) -> int:
    """Write JSON lines; a file appears when it is whole."""
    if out is not None and not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}; make it first")
    writing = None if out is None else out.with_name(f".{out.name}.writing")
    count = 0
    with nullcontext(sys.stdout) if writing is None else writing.open("w", encoding="utf-8") as stream:
        try:
            for line in lines:
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")
                count += 1
        except BaseException:
            if writing is not None:
                writing.unlink()
            raise
    if writing is not None and out is not None:
        writing.replace(out)
    return count


def _show_labels(scores: LabelEvaluation) -> None:
    """For people: what follows from all labels, then each label, then what was taken for what."""
    show(
        {
            "examples": scores.examples,
            "labels scored": scores.scored,
            **({"words not read": scores.not_read} if scores.not_read else {}),
            "loss (nats)": scores.loss_nats,
            "accuracy": scores.accuracy,
        },
        as_json=False,
    )
    averages = {"precision": scores.precision, "recall": scores.recall, "f1": scores.f1}
    _table_of_classes("label", scores.classes, averages)
    if scores.entities is not None:
        found = scores.entities
        averages = {"precision": found.precision, "recall": found.recall, "f1": found.f1}
        _table_of_classes("entity", found.kinds, averages)
    _table_of_confusions(scores)
    for path in scores.report:
        print(f"wrote {path}")


def _table_of_classes(what: str, classes: list[ClassScores], averages: dict[str, Averages]) -> None:
    names = ("precision", "recall", "f1")
    lines = [[each.name, *(f"{getattr(each, name):.4f}" for name in names), f"{each.support:,}"] for each in classes]
    support = f"{sum(each.support for each in classes):,}"
    for kind in ("micro", "macro", "weighted"):
        lines.append([f"({kind})", *(f"{getattr(averages[name], kind):.4f}" for name in names), support])
    _print_table([what, *names, "support"], lines)


def _table_of_confusions(scores: LabelEvaluation) -> None:
    names = [each.name for each in scores.classes]
    if len(names) <= _MOST_COLUMNS:
        lines = [
            [name, *(f"{count:,}" for count in counts)] for name, counts in zip(names, scores.confusion, strict=True)
        ]
        _print_table(["true / predicted", *names], lines)


def _show_comparison(found: dict[str, Any]) -> None:
    better = "higher" if found["more_is_better"] else "lower"
    print(f"{found['metric']} on {found['data']}, {found['examples']:,} examples; {better} is better")
    lines = []
    for model in found["models"]:
        difference = model["difference"]
        compared = ["", "", ""]
        if difference is not None:
            compared = [f"{difference['value']:+.4f}", _bounds(difference), f"{difference['share_above_0']:.1%}"]
        lines.append([model["model"], f"{model['score']['value']:.4f}", _bounds(model["score"]), *compared])
    _print_table(["model", found["metric"], "95 % interval", "to the first", "95 % interval", "above 0"], lines)


def _bounds(interval: dict[str, float]) -> str:
    return f"{interval['low']:.4f} .. {interval['high']:.4f}"


def _print_table(head: list[str], lines: list[list[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for place, name in enumerate(head):
        table.add_column(Text(name), justify="right" if place else "left")
    for line in lines:
        table.add_row(*map(Text, line))
    Console(width=None if sys.stdout.isatty() else 200).print(table)
