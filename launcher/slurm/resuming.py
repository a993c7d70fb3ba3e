"""A run that was submitted before, to be submitted again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from launcher.slurm import controller
from launcher.slurm.freeze import PACKAGES
from launcher.slurm.standing import held
from launcher.slurm.submit import Wanted, all_submissions, live_jobs
from llm_dist import config
from llm_dist.errors import UserError


def release_held(run: Path) -> str | None:
    """Let the run's job go if it is held; its number."""
    for job in live_jobs(run):
        if held(job):
            controller.release(job.number)
            return job.number
    return None


def wanted_again(run: Path, overrides: Sequence[str], accepted: Sequence[str]) -> Wanted:
    """What was submitted last, with other keys of the run file.

    Raises:
        UserError: it is not a run folder, or was never submitted.
    """
    config.load(run)
    before = all_submissions(run)
    if not before:
        raise UserError(f"{run} was never submitted; llm-launch slurm {run} does that")
    last = before[-1]
    shape = last.shape
    return Wanted(
        source=str(run),
        overrides=overrides,
        accepted=accepted,
        nodes=shape["nodes"],
        gpus_per_node=shape["gpus_per_node"],
        ranks_per_node=shape["ranks_per_node"],
        minutes=shape["minutes"],
        partition=shape["partition"],
        account=shape["account"],
        qos=shape["qos"],
        constraint=shape["constraint"],
        image=last.image,
        spares=shape["spares"],
        chain=last.chain,
        has_live_code=last.code == str(PACKAGES),
        options=shape["options"],
    )
