"""Where a run stands with Slurm: its job, why it waits or ended, and the failure that explains the others.

From the queue, else the accounts, else our own files: whichever answers.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.slurm import controller, starts
from launcher.slurm.controller import Job
from launcher.slurm.reasons import in_words
from launcher.slurm.starts import RankFailure, Start
from launcher.slurm.submit import all_submissions, live_jobs
from llm_dist.errors import UserError


@dataclass(frozen=True)
class Standing:
    """One look."""

    job: str | None
    """Number of the job that runs, waits, or was the last."""
    state: str | None
    """Slurm's word for it; None where Slurm does not know it any more or does not answer."""
    words: str
    """The same for a person, with the reason."""
    nodes: str
    waiting_jobs: int
    """Jobs in the queue, those of a chain."""
    starts: int
    """Starts of the ranks."""
    last_action: str | None
    """What followed from the last start that has ended."""
    failure: RankFailure | None
    """Of the last start, if it failed."""


def look(run: Path, queue: Sequence[Job] | None = None) -> Standing | None:
    """None for a run that was never submitted.

    `queue` is what `controller.own_jobs` has said, for who looks at many runs: Slurm is not asked again.
    """
    submissions = all_submissions(run)
    history = starts.read_all(run)
    if not submissions and not history:
        return None
    last = history[-1] if history else None
    known = [number for each in submissions for number in each.jobs] + ([last.job] if last else [])
    try:
        alive = live_jobs(run, queue)
        job = alive[0] if alive else _ended(known[-1], queue) if known else None
        words = in_words(job) if job else _from_files(last)
    except UserError as error:
        alive, job, words = [], None, f"{_from_files(last)} ({error})"
    ended = last is not None and last.ended is not None
    return Standing(
        job=job.number if job else (known[-1] if known else None),
        state=job.state if job else None,
        words=words,
        nodes=job.nodes if job else "",
        waiting_jobs=sum(each.is_waiting for each in alive),
        starts=len(history),
        last_action=_last_action(history),
        failure=last.failure if last is not None and ended else None,
    )


def queue_of(runs: Sequence[Path]) -> list[Job]:
    """The user's jobs, asked for once; none where no run was submitted or Slurm does not answer."""
    if not any(all_submissions(run) for run in runs):
        return []
    try:
        return controller.own_jobs()
    except UserError as error:
        print(f"llm-launch: {error}", file=sys.stderr)
        return []


def _ended(number: str, queue: Sequence[Job] | None) -> Job | None:
    if queue is None:
        return controller.job(number)
    return next((job for job in queue if job.number == number), None)


def lines(found: Standing) -> list[str]:
    """For a person, to stand below the run's own status."""
    said = [f"  job         {found.job or '-'}: {found.words}"]
    if found.waiting_jobs > 1:
        said.append(f"              {found.waiting_jobs} jobs wait in the queue")
    if found.state == "FAILED" and found.failure is None:
        said.append("              llm-launch logs --job says why")
    if (failure := found.failure) is not None:
        said.append(f"  failed      {failure}; then: {found.last_action}")
        said += [f"              {line}" for line in failure.last_lines[-4:]]
    return said


def _last_action(history: Sequence[Start]) -> str | None:
    return next((start.action for start in reversed(history) if start.action), None)


def _from_files(last: Start | None) -> str:
    if last is None:
        return "not started yet"
    if last.outcome is None:
        return f"start {last.number} began on {', '.join(last.nodes)} and has not said how it ended"
    return f"start {last.number} ended: {last.outcome}, then {last.action}"


def held(job: Job) -> bool:
    """Whether a job waits until somebody releases it."""
    return job.is_waiting and job.reason in ("launch_failed_requeued_held", "JobHeldUser")
