"""Sees a run through one Slurm job: starts the ranks on all nodes, learns how they ended, and decides what follows.

This is the batch step, on the first node, outside of any container. Its signals:

USR1   the time limit is near (sbatch --signal=B:USR1): the ranks save and leave, and Slurm queues the job again
TERM   Slurm or the user ends the job: the ranks save and leave, and the job is over, unless Slurm itself requeues it
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from launcher.attempts import describe_checkpoint, heartbeat, latest_complete_step, next_attempt, read_table
from launcher.slurm import controller, starts
from launcher.slurm.allocation import Allocation, meeting_address, meeting_port
from launcher.slurm.controller import ControllerSilent, SlurmRefused
from launcher.slurm.decide import Action, Asked, Decision, decide
from launcher.slurm.freeze import PACKAGES
from launcher.slurm.starts import RankFailure
from launcher.watching import say
from llm_dist import config
from llm_dist.errors import Exit, exit_code_of

_POLL_SECONDS = 0.5
STEP_GRACE_SECONDS = 60.0
"""How long after the first node has come to its end the step may last: Slurm's `--wait`, and once more ours."""
SILENCE_SECONDS = 900.0
"""How long rank 0 may stand still before the step is ended. Ranks that can judge a hang do so long before."""
_ASK_AGAIN_SECONDS = 10.0
_REQUEUE_SECONDS = 600.0
"""How long the controller may be silent when the job is to be queued again, and how long Slurm may take to do it."""


@dataclass(frozen=True)
class Terms:
    """What the job was submitted with, as far as it matters inside."""

    run: Path
    ranks_per_node: int
    interface: str = ""
    signal_seconds: float = 180.0
    max_failures: int = 3
    may_requeue: bool = True
    python: str = sys.executable
    """Interpreter of the ranks, inside the container if there is one."""
    step: tuple[str, ...] = ()
    """More options of srun."""
    wrapper: tuple[str, ...] = ()
    """In front of the ranks' command, for example `apptainer exec IMAGE`."""
    accepted: tuple[str, ...] = ()


class Requests:
    """What the signals so far have asked for."""

    def __init__(self) -> None:
        self.asked: Asked | None = None
        self.is_deaf = False
        """Set once the job is being queued again: Slurm then ends us with the same signal that a user sends."""
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._hear)

    def _hear(self, number: int, _frame: FrameType | None) -> None:
        if not self.is_deaf and self.asked != Asked.STOP:
            self.asked = Asked.LIMIT if number == signal.SIGUSR1 else Asked.STOP


class Supervisor:
    """One job."""

    def __init__(self, terms: Terms, allocation: Allocation, requests: Requests) -> None:
        self._terms, self._allocation, self._requests = terms, allocation, requests
        self._run = terms.run
        self._wants_end_at = _deadline(allocation.job, terms.signal_seconds)

    def run(self) -> int:
        """Train until the job has to end; its exit code."""
        while True:
            if self._requests.asked is not None:
                return self._finish(Decision(_what(self._requests.asked), "stopped", "asked before the ranks began"))
            decision = self._start()
            say(f"{decision.words}; {describe_checkpoint(self._run)}")
            if decision.failure is not None:
                _show(decision.failure)
            if decision.action != Action.RESTART:
                return self._finish(decision)

    def _start(self) -> Decision:
        """Start the ranks once and see them to their end."""
        before, step = starts.read_all(self._run), latest_complete_step(self._run) or 0
        facts = {
            "job": self._allocation.job,
            "incarnation": self._allocation.incarnation,
            "nodes": self._allocation.nodes,
            "code": str(PACKAGES),
            "began": time.time(),
            "step_before": step,
        }
        number = starts.begin(self._run, facts)
        nodes = self._allocation.nodes
        say(f"start {number}: {len(nodes)} nodes ({', '.join(nodes[:8])}{', ...' if len(nodes) > 8 else ''})")
        self._see_to_the_end(subprocess.Popen(self._command(number)), number)
        ends = starts.read_node_ends(self._run, number)
        now = latest_complete_step(self._run) or 0
        asked = self._requests.asked
        decision = decide(ends, nodes, asked, before, now > step, self._terms.max_failures)
        if decision.failure is not None:
            decision = replace(decision, failure=self._blamed(decision.failure))
        failure = decision.failure and {**vars(decision.failure)}
        told = {"ended": time.time(), "step_after": now, "outcome": decision.outcome, "action": decision.action}
        starts.end(self._run, number, {**told, "failure": failure})
        return decision

    def _command(self, number: int) -> list[str]:
        terms, nodes = self._terms, self._allocation.nodes
        count = str(len(nodes))
        address = "127.0.0.1" if len(nodes) == 1 else meeting_address(terms.interface, nodes[0])
        step = ["srun", f"--nodes={count}", f"--ntasks={count}", "--ntasks-per-node=1"]
        step += ["--kill-on-bad-exit=1", f"--wait={STEP_GRACE_SECONDS:.0f}", "--export=ALL"]
        step += [f"--cpus-per-task={self._allocation.cpus_per_task}"] if self._allocation.cpus_per_task else []
        words = [terms.python, "-m", "launcher.slurm.node", str(self._run), "--nodes", count, "--address", address]
        words += ["--start", str(number), "--attempt", str(next_attempt(self._run))]
        words += ["--ranks-per-node", str(terms.ranks_per_node)]
        words += ["--port", str(meeting_port(self._allocation.job, number))]
        words += [word for key in terms.accepted for word in ("--accept", key)]
        return [*step, *terms.step, *terms.wrapper, *words]

    def _see_to_the_end(self, step: subprocess.Popen[bytes], number: int) -> None:
        """Until srun is gone, passing on that the ranks are to stop; srun is killed where it waits in vain."""
        has_passed_on = has_lived = False
        sign, sign_at = self._sign_of_life(), time.monotonic()
        first_end_at: float | None = None
        while step.poll() is None:
            time.sleep(_POLL_SECONDS)
            now = time.monotonic()
            if self._wants_end_at is not None and now > self._wants_end_at and self._requests.asked is None:
                self._requests.asked = Asked.LIMIT
            if self._requests.asked is not None and not has_passed_on:
                has_passed_on = True
                say(f"asked to end ({self._requests.asked}): the ranks save and leave")
                step.send_signal(signal.SIGUSR1)  # srun passes it on to every task
            ends = starts.read_node_ends(self._run, number)
            if ends and first_end_at is None:
                first_end_at = now
            if (new := self._sign_of_life()) != sign:
                sign, sign_at, has_lived = new, now, True
            grace = _POLL_SECONDS * 10 if len(ends) == len(self._allocation.nodes) else 2 * STEP_GRACE_SECONDS
            if first_end_at is not None and now > first_end_at + grace:
                return self._end_step(step, "nodes have come to their end and srun has not noticed")
            if has_lived and now > sign_at + SILENCE_SECONDS:
                return self._end_step(step, f"rank 0 has given no sign of life for {SILENCE_SECONDS:.0f} s")
        return None

    def _sign_of_life(self) -> object:
        beat = heartbeat(self._run) or {}
        return beat.get("time"), beat.get("step"), latest_complete_step(self._run)

    def _end_step(self, step: subprocess.Popen[bytes], why: str) -> None:
        say(f"{why}: ending the step")
        step.kill()
        step.wait()
        try:  # what srun leaves behind; of this job's steps only, so that we are not meant
            controller.cancel("--signal=KILL", f"{self._allocation.job}.{_newest_step(self._allocation.job)}")
        except (SlurmRefused, ControllerSilent) as error:  # leases keep what is left from writing
            say(str(error))

    def _blamed(self, failure: RankFailure) -> RankFailure:
        """A hang is noticed by those that wait: name who is at fault."""
        if failure.code != Exit.HANG:
            return failure
        verdict = read_table(self._run / "heartbeats" / f"verdict_{next_attempt(self._run) - 1:04d}.json") or {}
        at_fault = verdict.get("ranks") or [failure.rank]
        rank = int(at_fault[0])
        return replace(failure, rank=rank, node=self._allocation.nodes[rank // self._terms.ranks_per_node])

    def _finish(self, decision: Decision) -> int:
        """Leave the job in the state that the decision asks for."""
        if decision.action == Action.REQUEUE:
            return self._requeue(decision.suspects)
        if decision.action in (Action.FINISH, Action.GIVE_UP) and self._allocation.name:
            self._cancel_chain()
        return decision.exit_code

    def _requeue(self, suspects: Sequence[str]) -> int:
        if not self._terms.may_requeue:
            say("this job is not queued again: the next of its chain goes on, or llm-launch resume does")
            return Exit.DONE
        self._requests.is_deaf = True
        try:
            _insist(lambda: controller.requeue(self._allocation.job))
            if suspects:
                _insist(lambda: controller.exclude(self._allocation.job, suspects))
        except SlurmRefused as error:
            say(f"Slurm does not queue this job again ({error}); llm-launch resume {self._run} goes on")
            return Exit.STOPPED
        say("queued again")
        time.sleep(_REQUEUE_SECONDS)  # Slurm ends us
        return Exit.STOPPED

    def _cancel_chain(self) -> None:
        """Jobs that wait to go on with this run have nothing to do."""
        try:
            controller.cancel("--me", "--state=PENDING", f"--name={self._allocation.name}")
        except (SlurmRefused, ControllerSilent) as error:
            say(f"jobs of the chain that wait were not cancelled: {error}")


def _what(asked: Asked) -> Action:
    return Action.REQUEUE if asked == Asked.LIMIT else Action.LEAVE


def _deadline(job: str, signal_seconds: float) -> float | None:
    """When to stop even if Slurm's own warning never comes: a third of its lead later; by the monotonic clock."""
    try:
        left = controller.time_left_seconds(job)
    except (SlurmRefused, ControllerSilent):  # then the warning has to do
        return None
    return None if left is None else time.monotonic() + left - signal_seconds * 2 / 3


def _newest_step(job: str) -> str:
    lines = controller.ask("squeue", "--noheader", "--steps", f"--jobs={job}", "--format=%i").split()
    steps = [line.rpartition(".")[2] for line in lines]
    return max((each for each in steps if each.isdigit()), key=int, default="0")


def _insist(action: object) -> None:
    """Do it, again and again while Slurm does not answer."""
    assert callable(action)
    until = time.monotonic() + _REQUEUE_SECONDS
    while True:
        try:
            action()
        except ControllerSilent as error:
            if time.monotonic() > until:
                raise
            say(f"{error}; asking again")
            time.sleep(_ASK_AGAIN_SECONDS)
        else:
            return


def _show(failure: RankFailure) -> None:
    print(*(f"    {line}" for line in failure.last_lines), sep="\n", file=sys.stderr, flush=True)


def main() -> int:
    """`python -m launcher.slurm.supervise RUN ...`, the last line of a batch script."""
    parser = argparse.ArgumentParser(prog="launcher.slurm.supervise", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--ranks-per-node", type=int, required=True)
    parser.add_argument("--interface", default="")
    parser.add_argument("--signal-seconds", type=float, default=180.0)
    parser.add_argument("--max-failures", type=int, default=3)
    parser.add_argument("--no-requeue", action="store_true")
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--step-option", action="append", default=[], help="one more option of srun")
    parser.add_argument("--wrapper-word", action="append", default=[], help="one more word in front of the ranks'")
    parser.add_argument("--accept", action="append", default=[])
    given = parser.parse_args()
    requests = Requests()
    terms = Terms(
        run=given.run,
        ranks_per_node=given.ranks_per_node,
        interface=given.interface,
        signal_seconds=given.signal_seconds,
        max_failures=given.max_failures,
        may_requeue=not given.no_requeue,
        python=given.python,
        step=tuple(given.step_option),
        wrapper=tuple(given.wrapper_word),
        accepted=tuple(given.accept),
    )

    def action() -> int:
        config.load(terms.run)  # refuses what is no run folder
        return Supervisor(terms, Allocation.read(), requests).run()

    return exit_code_of(action)


if __name__ == "__main__":
    sys.exit(main())
