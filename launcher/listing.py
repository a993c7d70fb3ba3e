"""The runs under a folder, one line each, and the run that somebody means who names none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from launcher.attempts import read_table
from launcher.status import Status, read_status
from llm_dist.errors import UserError

FOLDER = Path("runs")


def run_folders(folder: Path) -> list[Path]:
    """Run folders directly under `folder`, the one last written to first."""
    return sorted(_run_folders(folder), key=lambda run: (run / "config.json").stat().st_mtime, reverse=True)


def _run_folders(folder: Path) -> Iterator[Path]:
    for each in folder.iterdir() if folder.is_dir() else ():
        table = read_table(each / "config.json")
        if table is not None and "run" in table:
            yield each


def meant(run: Path | None) -> Path:
    """The run named, else the one we stand in, else the newest in `runs`.

    Raises:
        UserError: there is none.
    """
    if run is not None:
        return run
    if (Path.cwd() / "config.json").is_file():
        return Path.cwd()
    found = run_folders(FOLDER)
    if not found:
        raise UserError("name a run folder: this is none, and there is none in runs/")
    return found[0]


def line_of(status: Status, job: str) -> str:
    """One run in a list."""
    loss = "-" if status.loss_nats is None else f"{status.loss_nats:.4f}"
    return f"{status.run:<32} {status.state:<12} {status.step:>8}/{status.steps:<8} loss {loss:<8} {job}".rstrip()


def statuses(folder: Path) -> list[Status]:
    """Of all runs under a folder.

    Raises:
        UserError: there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name the one that holds your run folders")
    return [read_status(run) for run in run_folders(folder)]
