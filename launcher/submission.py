"""From what the user typed to a job that may start: everything that can be refused before a rank exists."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher import capacity, planning, ports
from launcher.attempts import heartbeat, runs_here
from launcher.local import Job
from launcher.watching import SAVE_GRACE_SECONDS
from llm_dist import config
from llm_dist.errors import UserError
from llm_dist.plan import require_little_waste


@dataclass(frozen=True)
class Wanted:
    """What the user typed."""

    source: str
    overrides: Sequence[str] = ()
    accepted: Sequence[str] = ()
    ranks: int | None = None
    """One per GPU, else 1, when None."""
    max_restarts: int = 3
    port: int | None = None


def prepare(wanted: Wanted) -> Job:
    """The job of training on this machine.

    Raises:
        UserError: run file, data, waste, capacity, port or run folder do not allow it.
    """
    run = config.load(wanted.source, wanted.overrides)
    ranks = wanted.ranks or capacity.num_cuda_devices() or 1
    plan = planning.plan_of(run, planning.data_size(run, must_exist=True), ranks)
    require_little_waste(plan.rows, run.plan.max_waste)
    capacity.require_capacity(plan)
    if wanted.port is not None:
        ports.require_free(wanted.port)
    folder = run.run.folder
    _require_writable(folder)
    _wait_for_earlier_ranks(folder)
    command = [sys.executable, "-m", "llm_dist", "train", wanted.source]
    command += [word for key in wanted.accepted for word in ("--accept", key)]
    return Job([*command, *wanted.overrides], folder, ranks, wanted.max_restarts, wanted.port)


def _require_writable(run: Path) -> None:
    foreign = run.exists() and (not run.is_dir() or any(entry.name != "logs" for entry in run.iterdir()))
    if foreign and not (run / "config.json").is_file():
        raise UserError(f"{run} exists and is not a run folder; choose another run.name or run.dir")
    try:
        (run / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{run}: cannot write the run folder: {error.strerror}; choose another run.dir") from None


def _wait_for_earlier_ranks(run: Path) -> None:
    """Ranks whose launcher was killed are saving; two trainings in one folder are refused."""
    deadline = time.monotonic() + SAVE_GRACE_SECONDS
    said = False
    while runs_here(run):
        if time.monotonic() > deadline:
            pid = (heartbeat(run) or {}).get("pid")
            raise UserError(f"{run} is being trained by process {pid} of this machine; stop that one first")
        if not said:
            print(f"llm-launch: an earlier attempt at {run} still runs; waiting for it to leave", file=sys.stderr)
            said = True
        time.sleep(0.2)
