"""Where numbers go: metrics.jsonl always, and the sinks the run file names.

A sink is a mirror of metrics.jsonl: one that fails says so once and is dropped; the run goes on.
"""

from __future__ import annotations

import csv
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TextIO

from llm_dist import config

Flat = dict[str, float]


class Sink(Protocol):
    """A mirror of metrics.jsonl."""

    def write(self, step: int, values: Flat) -> None:
        """Take the numbers of one step."""

    def close(self) -> None:
        """Flush and let go."""


class Metrics:
    """Writes each record to metrics.jsonl and to every sink that still works."""

    def __init__(self, run: config.Config, folder: Path, attempt: int, report: Callable[[str], None]) -> None:
        self._attempt = attempt
        self._report = report
        self._file = _open_to_append(folder / "metrics.jsonl")
        self._sinks: dict[str, Sink] = {}
        for name in run.log.sinks:
            self._guard(name, partial(self._open, name, run, folder))

    def write(self, step: int, record: Mapping[str, Any]) -> None:
        """Append one record of finished step `step`."""
        line = {"step": step, "attempt": self._attempt, "time": round(time.time(), 3), **record}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        values = dict(_flatten(record))
        for name, sink in list(self._sinks.items()):
            self._guard(name, partial(sink.write, step, values))

    def close(self) -> None:
        """Close the file and the sinks."""
        self._file.close()
        for name, sink in list(self._sinks.items()):
            self._guard(name, sink.close)

    def _open(self, name: str, run: config.Config, folder: Path) -> None:
        self._sinks[name] = _open_sink(name, run, folder)

    def _guard(self, name: str, action: Callable[[], None]) -> None:
        """A vendor's sink may fail in any way; whatever it is, it is said and the sink is dropped."""
        try:
            action()
        except Exception as error:  # noqa: BLE001
            self._sinks.pop(name, None)
            self._report(f"log.sinks: {name} failed and is off for this run: {type(error).__name__}: {error}")


class TensorBoardSink:
    """Event files that `tensorboard --logdir RUN` shows."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def write(self, step: int, values: Flat) -> None:
        """One scalar per name."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush the event file."""
        self._writer.close()


class CsvSink:
    """Long-form table: step, name, value."""

    def __init__(self, folder: Path) -> None:
        path = folder / "metrics.csv"
        is_new = not path.exists()
        self._file = path.open("a", newline="", encoding="utf-8")
        self._rows = csv.writer(self._file)
        if is_new:
            self._rows.writerow(("step", "name", "value"))

    def write(self, step: int, values: Flat) -> None:
        """One row per name."""
        self._rows.writerows((step, name, value) for name, value in values.items())
        self._file.flush()

    def close(self) -> None:
        """Close the table."""
        self._file.close()


class WandbSink:
    """Weights & Biases, offline: `wandb sync` sends the run when the user wants to."""

    def __init__(self, run: config.Config, folder: Path) -> None:
        import wandb

        self._run = wandb.init(
            project="llm_dist",
            name=run.run.name,
            dir=str(folder),
            mode="offline",
            config=run.model_dump(by_alias=True),
            settings=wandb.Settings(silent=True),
        )

    def write(self, step: int, values: Flat) -> None:
        """One record per step."""
        self._run.log(values, step=step)

    def close(self) -> None:
        """Finish the offline run."""
        self._run.finish()


def _open_to_append(path: Path) -> TextIO:
    """Open at a line of its own: a killed attempt may have left half a line, which must not swallow the next record."""
    with path.open("ab+") as file:
        if file.tell() and (file.seek(-1, os.SEEK_END), file.read())[1] != b"\n":
            file.write(b"\n")
    return path.open("a", encoding="utf-8")


def _open_sink(name: str, run: config.Config, folder: Path) -> Sink:
    match name:
        case "tensorboard":
            return TensorBoardSink(folder)
        case "csv":
            return CsvSink(folder)
        case _:
            return WandbSink(run, folder)


def _flatten(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{prefix}{name}", float(value)


def read(path: Path) -> list[dict[str, Any]]:
    """Records of a metrics.jsonl in order of step; the last attempt's word counts, a half-written line does not."""
    last: dict[tuple[int, bool], dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        key = record["step"], "eval" in record
        if key not in last or record["attempt"] >= last[key]["attempt"]:  # an older attempt may live on for a while
            last[key] = record
    return [last[key] for key in sorted(last)]
