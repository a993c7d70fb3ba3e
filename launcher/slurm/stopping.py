"""Ends a run, wherever it is trained: its ranks save and leave, and nobody starts it again."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

from launcher.attempts import heartbeat, is_running
from launcher.slurm import controller
from launcher.slurm.submit import live_jobs
from llm_dist import config
from llm_dist.errors import UserError

_POLL_SECONDS = 2.0


def stop(run: Path) -> str:
    """Ask the run to save and end; says what was done.

    Raises:
        UserError: it is not a run folder, nothing trains it, or it is out of reach.
    """
    config.load(run)
    jobs = live_jobs(run)
    waiting = [job.number for job in jobs if job.is_waiting]
    running = [job.number for job in jobs if not job.is_waiting]
    if waiting:
        controller.cancel(*waiting)
    if running:
        controller.cancel("--batch", "--signal=TERM", *running)
        return f"job {', '.join(running)} was asked to save and end"
    if waiting:
        return f"job {', '.join(waiting)} was taken out of the queue"
    if not is_running(run):
        raise UserError(f"{run}: nothing trains it now")
    beat = heartbeat(run) or {}
    if beat.get("host") != socket.gethostname():
        raise UserError(f"{run} is trained on {beat.get('host')}, not by a Slurm job of yours; stop it there")
    os.kill(int(beat["pid"]), signal.SIGTERM)  # the ranks agree, and their launcher sees that they were asked
    return f"process {beat['pid']} was asked to save and end"


def wait_until_ended(run: Path) -> None:
    """Return when nothing trains the run any more, and no job of it holds nodes."""
    while live_jobs(run) or is_running(run):
        time.sleep(_POLL_SECONDS)
