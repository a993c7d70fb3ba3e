"""What follows from how the ranks ended: a pure function, so that every case can be read and tried."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from launcher.slurm.starts import NodeEnd, Outcome, RankFailure, Start, failures_in_a_row, first_failure
from llm_dist.errors import Exit


class Asked(StrEnum):
    """Why the supervisor itself asked the ranks to stop."""

    LIMIT = "limit"
    """The time limit is near."""
    STOP = "stop"
    """Slurm or the user ends the job."""


class Action(StrEnum):
    """What the supervisor does next."""

    FINISH = "finish"
    """The run is trained to its end."""
    LEAVE = "leave"
    """End the job; whoever wanted it starts the run again."""
    REQUEUE = "requeue"
    """End the job and have Slurm queue it again."""
    RESTART = "restart"
    """Start the ranks again on the same nodes."""
    GIVE_UP = "give up"
    """End the job for good."""


@dataclass(frozen=True)
class Decision:
    """What to do, how the job ends if it ends, and how to say it."""

    action: Action
    outcome: Outcome
    words: str
    exit_code: int = 0
    failure: RankFailure | None = None
    suspects: tuple[str, ...] = ()
    """Nodes to keep out from now on."""


_FOR_GOOD: dict[int, tuple[Action, str]] = {
    Exit.USER_ERROR: (Action.GIVE_UP, "this is for you to mend"),
    Exit.SUPERSEDED: (Action.LEAVE, "a newer attempt has taken the run over"),
}


def decide(
    ends: Sequence[NodeEnd],
    nodes: Sequence[str],
    asked: Asked | None,
    before: Sequence[Start],
    has_progress: bool,
    max_failures: int,
) -> Decision:
    """After one start has ended.

    Args:
        ends: what the nodes say; a node without an entry ended without a word.
        nodes: all nodes of the start.
        asked: whether and why the supervisor asked the ranks to stop.
        before: earlier starts of the run, oldest first.
        has_progress: whether this start left a newer checkpoint.
        max_failures: in a row and without a newer checkpoint, after which it is given up.
    """
    silent = sorted(set(nodes) - {end.node for end in ends})
    failure = first_failure(ends)
    if failure is not None and (for_good := _FOR_GOOD.get(failure.code)):
        action, reason = for_good
        return Decision(action, "failed", reason, failure.code, failure)
    if failure is None and not silent:
        is_done = all(end.outcome == "done" for end in ends)
        return Decision(Action.FINISH, "done", "finished") if is_done else _stopped(asked)
    if asked == Asked.STOP:
        return Decision(Action.LEAVE, "stopped", "asked to stop", failure=failure)
    words = str(failure) if failure else f"{', '.join(silent)} ended without a word"
    return _failed(words, failure, asked, before, has_progress, max_failures)


def _failed(
    words: str,
    failure: RankFailure | None,
    asked: Asked | None,
    before: Sequence[Start],
    has_progress: bool,
    max_failures: int,
) -> Decision:
    count = 1 if has_progress else failures_in_a_row(before) + 1
    if count >= max_failures:
        gave_up = f"{words}; gave up after {count} failures in a row without a newer checkpoint"
        return Decision(Action.GIVE_UP, "failed", gave_up, Exit.DEFECT, failure)
    if asked == Asked.LIMIT:
        return Decision(Action.REQUEUE, "failed", f"{words}, near the time limit", failure=failure)
    if failure is not None and failure.code == Exit.HANG and failure.node == _hung_before(before):
        again = f"{words}, for the second time on {failure.node}, which is kept out from now on"
        return Decision(Action.REQUEUE, "failed", again, failure=failure, suspects=(failure.node,))
    return Decision(Action.RESTART, "failed", f"{words} (failure {count} of {max_failures} in a row)", failure=failure)


def _stopped(asked: Asked | None) -> Decision:
    if asked == Asked.STOP:
        return Decision(Action.LEAVE, "stopped", "asked to stop")
    why = "the time limit is near" if asked == Asked.LIMIT else "the ranks were asked to make way"
    return Decision(Action.REQUEUE, "stopped", why)


def _hung_before(before: Sequence[Start]) -> str | None:
    """The node that the last start hung on, if it did."""
    last = before[-1].failure if before else None
    return last.node if last is not None and last.code == Exit.HANG else None
