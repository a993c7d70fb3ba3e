"""Sees a run through one Slurm job: starts the ranks on all nodes, learns how they ended, and decides what follows.

This is the batch step, on the first node, outside of any container. Its signals:

USR1   the time limit is near (sbatch --signal=B:USR1): the ranks save and leave, and Slurm queues the job again
TERM   Slurm or the user ends the job: the ranks save and leave, and the job is over, unless Slurm itself requeues it
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType

from launcher.attempts import describe_checkpoint, latest_complete_step, next_attempt, read_table
from launcher.preflight.exclusions import exclude, excluded
from launcher.slurm import controller, starts
from launcher.slurm.allocation import Allocation
from launcher.slurm.choosing import Choice, check, check_network, choose
from launcher.slurm.controller import ControllerSilent, SlurmRefused
from launcher.slurm.decide import Action, Asked, Decision, decide
from launcher.slurm.freeze import PACKAGES
from launcher.slurm.starts import NodeEnd
from launcher.slurm.step import Step, Terms, on_each, ranks_command
from launcher.watching import say
from llm_dist import config
from llm_dist.errors import Exit, exit_code_of

_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
_ASK_AGAIN_SECONDS = 2.0
_REQUEUE_SECONDS = 600.0
"""How long the controller may be silent when the job is to be queued again, and how long Slurm may take to do it."""


class Requests:
    """What the signals so far have asked for."""

    def __init__(self) -> None:
        self.asked: Asked | None = None
        for number in _SIGNALS:
            signal.signal(number, self._hear)

    def ignore(self) -> None:
        """From now on, also in the commands we run: Slurm ends all of a job that it queues again, as a user would."""
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _hear(self, number: int, _frame: FrameType | None) -> None:
        if self.asked != Asked.STOP:
            self.asked = Asked.LIMIT if number == signal.SIGUSR1 else Asked.STOP


class Supervisor:
    """One job."""

    def __init__(self, terms: Terms, allocation: Allocation, requests: Requests) -> None:
        self._terms, self._allocation, self._requests = terms, allocation, requests
        self._run = terms.run
        self._deadline = _deadline(allocation.job, terms.signal_seconds)

    def run(self) -> int:
        """Train until the job has to end; its exit code."""
        choice = self._check_nodes()
        while True:
            decision = self._without_ranks(choice) or self._start(choice.nodes)
            say(f"{decision.words}; {describe_checkpoint(self._run)}")
            for line in decision.failure.last_lines if decision.failure else ():
                print(f"    {line}", file=sys.stderr, flush=True)
            for node in decision.suspects:
                exclude(self._run, node, decision.words, time.time())
            choice = choose(self._run, self._allocation.nodes, self._terms.nodes, self._terms.exclude_hours)
            has_spares = bool(decision.suspects) and not choice.missing
            if decision.action != Action.RESTART and not has_spares:
                return self._finish(decision)

    def _check_nodes(self) -> Choice:
        terms, nodes = self._terms, self._allocation.nodes
        if not terms.has_check:
            return choose(self._run, nodes, terms.nodes, terms.exclude_hours)
        allocation = self._allocation

        def words(names: Sequence[str]) -> list[str]:
            return on_each(terms, allocation, names)

        choice = check(self._run, nodes, terms.nodes, terms.exclude_hours, words, allocation.incarnation)
        if len(choice.nodes) < max(2, terms.nodes):
            return choice
        out = self._run / "preflight" / allocation.incarnation / "network"
        command = ranks_command(terms, allocation, choice.nodes, 0, probe=out)
        return check_network(self._run, nodes, choice, terms.exclude_hours, command, out, terms.ranks_per_node)

    def _without_ranks(self, choice: Choice) -> Decision | None:
        """Why the ranks cannot or need not be started, if so."""
        if self._asked() is not None:
            action = Action.REQUEUE if self._requests.asked == Asked.LIMIT else Action.LEAVE
            return Decision(action, "stopped", "asked to end before the ranks began")
        if choice.mistake is not None:
            return Decision(Action.GIVE_UP, "failed", choice.mistake, Exit.USER_ERROR)
        if choice.missing:
            words = f"{choice.missing} of {self._terms.nodes} nodes are kept out, and no spare is left"
            return Decision(Action.REQUEUE, "stopped", words)
        return None

    def _start(self, nodes: tuple[str, ...]) -> Decision:
        """Start the ranks once and see them to their end."""
        before, step = starts.read_all(self._run), latest_complete_step(self._run) or 0
        facts = {
            "job": self._allocation.job,
            "incarnation": self._allocation.incarnation,
            "nodes": nodes,
            "code": str(PACKAGES),
            "began": time.time(),
            "step_before": step,
        }
        number = starts.begin(self._run, facts)
        say(f"start {number}: {len(nodes)} nodes ({', '.join(nodes[:8])}{', ...' if len(nodes) > 8 else ''})")
        command = ranks_command(self._terms, self._allocation, nodes, number)
        Step(command, self._terms, self._allocation, number, len(nodes)).see_to_the_end(self._asked)
        ends = [self._with_blame(end, nodes) for end in starts.read_node_ends(self._run, number)]
        now = latest_complete_step(self._run) or 0
        decision = decide(ends, nodes, self._requests.asked, before, now > step, self._terms.max_failures)
        told = {"ended": time.time(), "step_after": now, "outcome": decision.outcome, "action": decision.action}
        starts.end(self._run, number, {**told, "failure": decision.failure and vars(decision.failure)})
        return decision

    def _asked(self) -> Asked | None:
        """Why the ranks are to stop; also where Slurm's warning before the limit has never come."""
        is_late = self._deadline is not None and time.monotonic() > self._deadline
        if is_late and self._requests.asked is None:
            self._requests.asked = Asked.LIMIT
        return self._requests.asked

    def _with_blame(self, end: NodeEnd, nodes: tuple[str, ...]) -> NodeEnd:
        """A hang is noticed by those that wait: name who is at fault."""
        failure = end.failure
        if failure is None or failure.code != Exit.HANG:
            return end
        verdict = read_table(self._run / "heartbeats" / f"verdict_{next_attempt(self._run) - 1:04d}.json") or {}
        at_fault = verdict.get("ranks") or [failure.rank]
        rank = int(at_fault[0])
        return replace(end, failure=replace(failure, rank=rank, node=nodes[rank // self._terms.ranks_per_node]))

    def _finish(self, decision: Decision) -> int:
        """Leave the job in the state that the decision asks for."""
        if decision.action == Action.REQUEUE:
            return self._requeue()
        if decision.action in (Action.FINISH, Action.GIVE_UP) and self._allocation.name:
            self._cancel_chain()
        return decision.exit_code

    def _requeue(self) -> int:
        if not self._terms.may_requeue:
            say("this job is not queued again: the next of its chain goes on, or llm-launch resume does")
            return Exit.DONE
        job, bad = self._allocation.job, excluded(self._run, time.time(), self._terms.exclude_hours)
        self._requests.ignore()
        try:
            _insist(lambda: controller.requeue(job))
            if bad:
                _insist(lambda: controller.exclude(job, [each.node for each in bad]))
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


def _deadline(job: str, signal_seconds: float) -> float | None:
    """When to stop even if Slurm's own warning never comes: a third of its lead later; by the monotonic clock."""
    try:
        left = controller.time_left_seconds(job)
    except (SlurmRefused, ControllerSilent):  # then the warning has to do
        return None
    return None if left is None else time.monotonic() + left - signal_seconds * 2 / 3


def _insist(action: Callable[[], None]) -> None:
    """Do it, again and again while Slurm does not answer."""
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="launcher.slurm.supervise", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--nodes", type=int, required=True, help="nodes that the ranks need; others are spares")
    parser.add_argument("--ranks-per-node", type=int, required=True)
    parser.add_argument("--interface", default="")
    parser.add_argument("--signal-seconds", type=float, default=180.0)
    parser.add_argument("--max-failures", type=int, default=3)
    parser.add_argument("--exclude-hours", type=float, default=24.0)
    parser.add_argument("--no-check", action="store_true")
    parser.add_argument("--no-requeue", action="store_true")
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--step-option", action="append", default=[], help="one more option of srun")
    parser.add_argument("--wrapper-word", action="append", default=[], help="one more word in front of the ranks'")
    parser.add_argument("--accept", action="append", default=[])
    return parser


def main() -> int:
    """`python -m launcher.slurm.supervise RUN ...`, the last line of a batch script."""
    requests = Requests()
    given = _parser().parse_args()
    terms = Terms(
        run=given.run,
        nodes=given.nodes,
        ranks_per_node=given.ranks_per_node,
        interface=given.interface,
        signal_seconds=given.signal_seconds,
        max_failures=given.max_failures,
        may_requeue=not given.no_requeue,
        has_check=not given.no_check,
        exclude_hours=given.exclude_hours,
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
