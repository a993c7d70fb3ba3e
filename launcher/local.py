"""Runs the ranks of one training run on this machine and starts them again when one dies.

A rank's exit code says what to do (`llm_dist.errors.Exit`): done, mended by the user only, or asked to stop after
saving. Everything else, and every signal, is a failure: all ranks start again from the latest complete checkpoint.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from launcher import ports
from launcher.attempts import describe_checkpoint, hang_verdict, latest_complete_step, next_attempt
from launcher.ranks import Ranks, log_path, start
from llm_dist.errors import Exit

HANG_GRACE_SECONDS = 5.0
"""How long ranks may take to leave their stacks in their logs after one has found that the run hangs."""
SAVE_GRACE_SECONDS = 25.0
"""How long ranks may take to save and leave after another has died."""
START_GRACE_SECONDS = 1.0
"""The same where no rank has begun its attempt: those that wait to meet the dead one have nothing to save."""
_POLL_SECONDS = 0.1
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_WAS_STOPPED = tuple(-number for number in _STOP_SIGNALS)
"""How a rank ends that is asked to stop before it listens, in the first moments of its process."""


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
class Failure:
    """The rank that failed first, and how."""

    rank: int
    code: int
    last_lines: tuple[str, ...]
    while_stopping: bool = False
    """Another rank had left before, because it was asked to stop."""
    verdict: str | None = None
    """Who was at fault, where the ranks found that nothing went on any more."""

    @property
    def cause(self) -> str:
        """Code or signal in words."""
        if self.verdict is not None:
            return f"hang: {self.verdict}"
        return f"killed by {signal.Signals(-self.code).name}" if self.code < 0 else f"exit code {self.code}"


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
                _say("a newer attempt has taken this run over: not started again")
                return Outcome(Exit.SUPERSEDED, starts, ending)
            before, step = step, latest_complete_step(job.run)
            failures = 1 if (step or 0) > (before or 0) else failures + 1
            _say_failure(job, ending)
            if stop.is_wanted or ending.while_stopping:
                return Outcome(Exit.STOPPED, starts, ending)
            if failures > job.max_restarts:
                _say(f"gave up after {failures} failures in a row without a newer checkpoint; {_standing(job)}")
                return Outcome(Exit.DEFECT, starts, ending)
            _say(f"starting all {job.ranks} ranks again ({failures} of {job.max_restarts} restarts); {_standing(job)}")


class StopRequests:
    """Remembers signals to the launcher, so that they are passed on to the ranks once and between two polls."""

    def __init__(self) -> None:
        self.is_wanted = False
        self.interrupts = 0
        self._passed_on = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequests:
        self._before = {number: signal.signal(number, self._remember) for number in _STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self.interrupts += number == signal.SIGINT and self.is_wanted
        self.is_wanted = True

    def pass_on(self, ranks: Ranks) -> None:
        """Ask the ranks to save and leave; kill them when the user insists."""
        if self.is_wanted and not self._passed_on:
            self._passed_on = True
            _say("asked to stop: the ranks save and leave (Ctrl-C again kills them)")
            ranks.send(signal.SIGTERM)
        if self.interrupts:
            ranks.kill()


class Follower:
    """Shows what a log gains."""

    def __init__(self, path: Path, from_bytes: int) -> None:
        self._file = path.open("rb")
        self._file.seek(from_bytes)

    def show(self) -> None:
        """Copy what is new to standard error."""
        if new := self._file.read():
            sys.stderr.write(new.decode("utf-8", errors="replace"))
            sys.stderr.flush()

    def close(self) -> None:
        """Show the rest and let go of the file."""
        self.show()
        self._file.close()


def _attempt(job: Job, stop: StopRequests) -> Exit | Failure:
    """Start the ranks once and watch them to the end of all."""
    if stop.is_wanted:
        return Exit.STOPPED
    port = ports.choose_port() if job.port is None else ports.require_free(job.port)
    attempt = next_attempt(job.run)
    with start(job.command, job.ranks, port, job.logs, attempt) as ranks:
        follower = Follower(log_path(job.logs, 0), ranks.members[0].log_start_bytes)
        try:
            return _watch(ranks, stop, follower, job, attempt)
        finally:
            ranks.kill()
            follower.close()


def _watch(ranks: Ranks, stop: StopRequests, follower: Follower, job: Job, attempt: int) -> Exit | Failure:
    leave_by: float | None = None
    while True:
        stop.pass_on(ranks)
        follower.show()
        codes = ranks.codes()
        if failed := [number for number, code in codes.items() if not _is_in_order(code, stop)]:
            grace_seconds = SAVE_GRACE_SECONDS if next_attempt(job.run) > attempt else START_GRACE_SECONDS
            return _end_others(ranks, _first_of(failed, codes), codes, follower, job.run, grace_seconds)
        if any(code in _WAS_STOPPED for code in codes.values()):  # no rank has begun to train, and none can
            ranks.terminate(_POLL_SECONDS, follower.show)
            return _say_stopped(job)
        if len(codes) == len(ranks.members):
            break
        if leave_by is None and any(code != Exit.DONE for code in codes.values()):
            leave_by = time.monotonic() + SAVE_GRACE_SECONDS
        if leave_by is not None and time.monotonic() > leave_by:
            _say(
                f"rank {_missing(ranks, codes)} did not leave with the others within {SAVE_GRACE_SECONDS:.0f} s: killed"
            )
            ranks.kill()
            return _say_stopped(job)
        time.sleep(_POLL_SECONDS)
    return Exit.DONE if not any(codes.values()) else _say_stopped(job)


def _is_in_order(code: int, stop: StopRequests) -> bool:
    return code in (Exit.DONE, Exit.STOPPED, *_WAS_STOPPED) or (code == -signal.SIGKILL and stop.interrupts > 0)


def _first_of(failed: Sequence[int], codes: dict[int, int]) -> int:
    """What explains most, then a signal; a neighbour's lost connection only follows from them."""
    explains = (Exit.USER_ERROR, Exit.SUPERSEDED)
    return min(failed, key=lambda number: (codes[number] not in explains, codes[number] >= 0, number))


def _end_others(
    ranks: Ranks, number: int, codes: dict[int, int], follower: Follower, run: Path, grace_seconds: float
) -> Failure:
    code = codes[number]
    if code == Exit.USER_ERROR:  # the others come to the same conclusion, and rank 0 says it best
        ranks.wait(2.0, follower.show)
        number = 0 if ranks.members[0].poll() == Exit.USER_ERROR else number
    if code == Exit.HANG:  # nobody can save, and a rank that is stopped hears no SIGTERM
        ranks.wait(HANG_GRACE_SECONDS, follower.show)
        ranks.kill()
        return Failure(number, code, tuple(ranks.members[number].last_lines(8)), verdict=hang_verdict(run))
    ranks.terminate(grace_seconds, follower.show)
    while_stopping = Exit.STOPPED in codes.values()
    return Failure(number, code, tuple(ranks.members[number].last_lines(8)), while_stopping)


def _missing(ranks: Ranks, codes: dict[int, int]) -> str:
    return ", ".join(str(rank.number) for rank in ranks.members if rank.number not in codes)


def _say_stopped(job: Job) -> Exit:
    _say(f"stopped; {_standing(job)}; start again to go on")
    return Exit.STOPPED


def _say_failure(job: Job, failure: Failure) -> None:
    if failure.verdict is not None:
        _say(f"{failure.cause}; the stacks of the ranks are in {job.logs}")
        return
    ends = " ends with" if failure.last_lines else " has no line of this attempt"
    _say(f"rank {failure.rank} failed first: {failure.cause}; {log_path(job.logs, failure.rank)}{ends}")
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


def _say(text: str) -> None:
    print(f"llm-launch: {text}", file=sys.stderr, flush=True)
