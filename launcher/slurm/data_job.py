"""Tokenizes many files with an array job: each task makes one shard folder of its share of the files.

OUT/tasks.json        which task reads which files, with what: the same for every submission
OUT/part_0007/train   what task 7 makes; it is there if and only if the task is finished

A task that is killed or requeued does only its own part again. Submitted again, only what is missing is queued.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.attempts import read_table
from launcher.slurm import controller, freeze
from launcher.slurm.reasons import in_words
from launcher.slurm.script import COMMENT, in_slurm_words, quoted
from launcher.slurm.site import Site
from llm_dist import tokenizer
from llm_dist.data.folder import DATASET
from llm_dist.data.inputs import find_files
from llm_dist.errors import UserError
from llm_dist.publishing import publish


@dataclass(frozen=True)
class Wanted:
    """What the user typed."""

    inputs: Sequence[str]
    tokenizer: Path
    out: Path
    tasks: int
    cpus: int = 4
    minutes: float = 60.0
    holdout: float = 0.01
    split: str = "file"
    on_bad: str = "stop"
    seed: int = 0
    partition: str = ""
    account: str = ""
    most_at_once: int | None = None


@dataclass(frozen=True)
class Plan:
    """What is to be queued."""

    out: Path
    tasks: int
    missing: tuple[int, ...]
    script: str


def part_folder(out: Path, task: int) -> Path:
    """Where a task writes."""
    return out / f"part_{task:04d}"


def prepare(wanted: Wanted, site: Site, code: Path) -> Plan:
    """Share out the files and render the script of the tasks that are not finished.

    Raises:
        UserError: no input, or `out` holds the work of other inputs.
    """
    out = Path(os.path.abspath(wanted.out))  # noqa: PTH100  a link to a faster disk is to stay one
    asked = _asked(wanted)
    before = read_table(out / "tasks.json")
    if before is not None and before != asked:
        differs = ", ".join(sorted(key for key in asked if asked[key] != before.get(key)))
        raise UserError(f"{out} holds tasks of another {differs}; choose another --out")
    tokenizer.load(wanted.tokenizer)  # refuses what is none
    if not 0 <= wanted.holdout < 1:
        raise UserError(f"--holdout {wanted.holdout}: must be a share of the text, at least 0 and below 1")
    tasks = len(asked["inputs"])
    missing = tuple(task for task in range(tasks) if not (part_folder(out, task) / "train" / DATASET).is_file())
    return Plan(out, tasks, missing, render(wanted, out, missing, site, code))


def submit(plan: Plan, wanted: Wanted, site: Site) -> str:
    """Write the tasks down and queue those that are missing; the job's number.

    Raises:
        UserError: they are queued already, the folder cannot be written, or Slurm refuses.
    """
    for job in controller.own_jobs():
        if job.comment == _comment(plan.out) and job.is_alive:
            raise UserError(
                f"{plan.out} has job {job.number} already, which {in_words(job)}; wait for it or scancel it"
            )
    try:
        (plan.out / "logs").mkdir(parents=True, exist_ok=True)
        publish(plan.out / "tasks.json", json.dumps(_asked(wanted), indent=1) + "\n")
        code = freeze.freeze(plan.out)
    except OSError as error:
        raise UserError(f"{plan.out}: {error.strerror}; choose another --out") from None
    return controller.submit(render(wanted, plan.out, plan.missing, site, code))


def _asked(wanted: Wanted) -> dict[str, Any]:
    names = ("holdout", "split", "on_bad", "seed")
    return {
        "inputs": shares(_sizes(wanted.inputs), wanted.tasks),
        "tokenizer": os.path.abspath(wanted.tokenizer),  # noqa: PTH100
        **{name: getattr(wanted, name) for name in names},
    }


def _sizes(inputs: Sequence[str]) -> dict[str, int]:
    paths = [file.path for file in find_files(inputs)[0] if file.path is not None]
    if not paths:
        raise UserError("standard input cannot be shared out: name files, folders or globs")
    return {os.path.abspath(path): path.stat().st_size for path in paths}  # noqa: PTH100


def shares(sizes: Mapping[str, int], tasks: int) -> list[list[str]]:
    """Files by task: the largest first, each to the task that has least; no task without a file."""
    heap = [(0, task) for task in range(min(tasks, len(sizes)))]
    found: list[list[str]] = [[] for _ in heap]
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        total, task = heapq.heappop(heap)
        found[task].append(name)
        heapq.heappush(heap, (total + sizes[name], task))
    return [sorted(each) for each in found]


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as Slurm writes them: `0-9,12`."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ",".join(f"{first}-{last}" if last > first else str(first) for first, last in found)


def _comment(out: Path) -> str:
    """By which the jobs of a folder are found again."""
    return f"{COMMENT}tokenize:{hashlib.sha256(str(out).encode()).hexdigest()[:16]}"


def render(wanted: Wanted, out: Path, missing: Sequence[int], site: Site, code: Path) -> str:
    """The array script."""
    limit = f"%{wanted.most_at_once}" if wanted.most_at_once else ""
    python = site.python or sys.executable
    options = [
        f"--job-name=llm_dist-tokenize-{out.name}",
        f"--comment={_comment(out)}",
        f"--array={ranges(missing)}{limit}",
        "--ntasks=1",
        f"--cpus-per-task={wanted.cpus}",
        f"--time={in_slurm_words(wanted.minutes)}",
        "--requeue" if site.requeue else "--no-requeue",
        "--open-mode=append",
        f"--output={out}/logs/task_%a.log",
        f"--chdir={Path.cwd()}",
        *(f"--partition={name}" for name in [wanted.partition or site.partition] if name),
        *(f"--account={name}" for name in [wanted.account or site.account] if name),
        *site.options,
    ]
    lines = [
        "#!/bin/bash",
        f"# Makes {out}/part_*: {len(missing)} tasks. Made by llm-launch slurm-data.",
        *(f"#SBATCH {quoted(option)}" for option in options),
        "set -euo pipefail",
        f"export PYTHONPATH={shlex.quote(str(code))} PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1",
        *site.setup,
        *(f"export {name}={shlex.quote(value)}" for name, value in site.environment.items()),
        f"exec {shlex.join([python, '-m', 'launcher.slurm.data_task', str(out)])}",
    ]
    return "\n".join(lines) + "\n"
