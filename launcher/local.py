"""Runs the ranks of one training run on this machine and starts them again when one dies.

A rank's exit code says what to do (`llm_dist.errors.Exit`): done, mended by the user only, or asked to stop after
saving. Everything else, and every signal, is a failure: all ranks start again from the latest complete checkpoint.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher import ports
from launcher.attempts import describe_checkpoint, latest_complete_step, next_attempt
from launcher.ranks import World, log_path, start
from launcher.watching import Failure, Follower, StopRequests, say, watch
from llm_dist.errors import Exit


@dataclass(frozen=True)
class Job:
    """What is started, where its files lie and how often it may fail."""

    command: Sequence[str]
    run: Path
    ranks: int
    max_restarts: int = 3
    """Failures in a row, with no newer complete checkpoint between them, after which it is given up."""
    port: int | None = None
    """Where the ranks meet; chosen anew for each attempt when None."""

    @property
    def logs(self) -> Path:
        """Folder of the ranks' logs."""
        return self.run / "logs"


@dataclass(frozen=True)
class Outcome:
    """How it ended."""

    exit_code: Exit
    starts: int
    failure: Failure | None = None

    def as_table(self, job: Job) -> dict[str, Any]:
        """For scripts."""
        names = {Exit.DONE: "finished", Exit.STOPPED: "stopped", Exit.USER_ERROR: "refused", Exit.DEFECT: "failed"}
        names[Exit.SUPERSEDED] = "superseded"
        failed = self.failure
        return {
            "run": str(job.run),
            "outcome": names[self.exit_code],
            "exit_code": int(self.exit_code),
            "starts": self.starts,
            "latest_checkpoint_step": latest_complete_step(job.run),
            "failure": failed and {"rank": failed.rank, "cause": failed.cause, "last_lines": list(failed.last_lines)},
        }


def supervise(job: Job) -> Outcome:
    """Run the job to its end; ranks are gone when this returns or raises.

    Raises:
        UserError: the port the user named is taken.
    """
    with StopRequests() as stop:
        starts, failures, step = 0, 0, latest_complete_step(job.run)
        while True:
            starts += 1
            ending = _attempt(job, stop)
            if isinstance(ending, Exit):
                return Outcome(ending, starts)
            if ending.code == Exit.USER_ERROR:
                _say_user_error(ending)
                return Outcome(Exit.USER_ERROR, starts, ending)
            if ending.code == Exit.SUPERSEDED:
                say("a newer attempt has taken this run over: not started again")
                return Outcome(Exit.SUPERSEDED, starts, ending)
            before, step = step, latest_complete_step(job.run)
            failures = 1 if (step or 0) > (before or 0) else failures + 1
            _say_failure(job, ending)
            if stop.is_wanted or ending.while_stopping:
                return Outcome(Exit.STOPPED, starts, ending)
            if failures > job.max_restarts:
                say(f"gave up after {failures} failures in a row without a newer checkpoint; {_standing(job)}")
                return Outcome(Exit.DEFECT, starts, ending)
            say(f"starting all {job.ranks} ranks again ({failures} of {job.max_restarts} restarts); {_standing(job)}")


def _attempt(job: Job, stop: StopRequests) -> Exit | Failure:
    """Start the ranks once and watch them to the end of all."""
    if stop.is_wanted:
        return Exit.STOPPED
    port = ports.choose_port() if job.port is None else ports.require_free(job.port)
    with start(job.command, World(job.ranks, job.ranks, port), job.logs, next_attempt(job.run)) as ranks:
        follower = Follower(log_path(job.logs, 0), ranks.members[0].log_start_bytes)
        try:
            ending = watch(ranks, stop, job.run, follower.show)
        finally:
            ranks.kill()
            follower.close()
    if ending == Exit.STOPPED:
        say(f"stopped; {_standing(job)}; start again to go on")
    return ending


def _say_failure(job: Job, failure: Failure) -> None:
    if failure.verdict is not None:
        say(f"{failure.cause}; the stacks of the ranks are in {job.logs}")
        return
    ends = " ends with" if failure.last_lines else " has no line of this attempt"
    say(f"rank {failure.rank} failed first: {failure.cause}; {log_path(job.logs, failure.rank)}{ends}")
    for line in failure.last_lines:
        print(f"    {line}", file=sys.stderr)


def _say_user_error(failure: Failure) -> None:
    """Rank 0's words are on the terminal already."""
    if failure.rank:
        for line in failure.last_lines:
            if line.startswith("error: "):
                print(line, file=sys.stderr)


def _standing(job: Job) -> str:
    return describe_checkpoint(job.run)
