"""One task of an array job that tokenizes: `python -m launcher.slurm.data_task OUT`, written by the array's script."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from launcher.attempts import read_table
from launcher.slurm.allocation import array_task
from launcher.slurm.data_job import part_folder
from llm_dist.data.tokenize import tokenize
from llm_dist.errors import UserError, exit_code_of


def run_task(out: Path, task: int) -> None:
    """Make the part of one task; nothing is done where it is finished.

    Raises:
        UserError: there is no such task, or its files cannot be read.
    """
    asked = read_table(out / "tasks.json")
    if asked is None or not 0 <= task < len(asked["inputs"]):
        raise UserError(f"{out}/tasks.json names no task {task}")
    report = tokenize(
        asked["inputs"][task],
        asked["tokenizer"],
        part_folder(out, task),
        holdout=asked["holdout"],
        split=asked["split"],
        on_bad=asked["on_bad"],
        seed=asked["seed"],
    )
    done = "was finished before" if report.already_made else f"{report.tokens_per_second:,.0f} tokens/s"
    print(f"task {task}: {report.num_files} files, {report.train.num_tokens:,} tokens to train on, {done}", flush=True)


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="launcher.slurm.data_task")
    parser.add_argument("out", type=Path)
    given = parser.parse_args()

    def action() -> None:
        run_task(given.out, array_task())

    return exit_code_of(action)


if __name__ == "__main__":
    sys.exit(main())
