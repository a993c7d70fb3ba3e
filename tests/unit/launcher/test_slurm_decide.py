"""What follows from how the ranks ended: every case of the pure function."""

import pytest

from launcher.slurm.decide import Action, Asked, decide
from launcher.slurm.starts import NodeEnd, RankFailure, Start, failures_in_a_row, first_failure
from llm_dist.errors import Exit

NODES = ("node1", "node2")


def end(number, outcome="done", code=None, time=0.0, rank=None):
    failure = (
        None if code is None else RankFailure(number if rank is None else rank, NODES[number], code, f"code {code}")
    )
    return NodeEnd(NODES[number], number, "failed" if failure else outcome, time, failure)


def start(outcome="failed", before=0, after=0, failure=None):
    return Start(1, "7", "7.0", NODES, "code", 0.0, before, 1.0, after, outcome, "restart", failure)


def outcome(ends, asked=None, before=(), has_progress=False, max_failures=3):
    return decide(ends, NODES, asked, before, has_progress, max_failures)


def test_all_done_is_finished_even_when_asked_to_stop() -> None:
    for asked in (None, *Asked):
        assert outcome([end(0), end(1)], asked).action == Action.FINISH


@pytest.mark.parametrize(
    ("asked", "action"),
    [(Asked.LIMIT, Action.REQUEUE), (Asked.STOP, Action.LEAVE), (None, Action.REQUEUE)],
    ids=["limit", "user", "preempted"],
)
def test_stopped_ranks_are_queued_again_unless_the_job_is_to_end(asked, action) -> None:
    decision = outcome([end(0, "stopped"), end(1, "stopped")], asked)
    assert (decision.action, decision.outcome, decision.exit_code) == (action, "stopped", 0)


def test_the_rank_that_explains_the_others_is_named_whatever_the_clocks_say() -> None:
    lost, killed = end(0, code=Exit.LOST_CONTACT, time=1.0), end(1, code=-9, time=5.0)
    decision = outcome([lost, killed])
    assert decision.action == Action.RESTART
    assert decision.failure is not None and decision.failure.node == "node2"
    assert "rank 1 on node2: code -9 (failure 1 of 3 in a row)" in decision.words


def test_a_mistake_of_the_user_ends_the_job_for_good_with_its_code() -> None:
    decision = outcome([end(0, code=Exit.USER_ERROR), end(1, code=Exit.LOST_CONTACT)])
    assert (decision.action, decision.exit_code) == (Action.GIVE_UP, Exit.USER_ERROR)


def test_a_superseded_attempt_leaves_the_run_to_the_newer_one() -> None:
    decision = outcome([end(0, code=Exit.SUPERSEDED), end(1, code=-15)])
    assert (decision.action, decision.exit_code) == (Action.LEAVE, Exit.SUPERSEDED)


def test_three_failures_without_a_newer_checkpoint_are_enough() -> None:
    before = [start(), start()]
    decision = outcome([end(0, code=1), end(1)], before=before)
    assert (decision.action, decision.exit_code) == (Action.GIVE_UP, Exit.DEFECT)
    assert "gave up after 3 failures in a row" in decision.words
    assert outcome([end(0, code=1), end(1)], before=before, has_progress=True).action == Action.RESTART
    assert outcome([end(0, code=1), end(1)], before=before, max_failures=4).action == Action.RESTART


def test_progress_and_only_progress_forgives_failures() -> None:
    assert failures_in_a_row([start(), start("stopped"), start()]) == 2
    assert failures_in_a_row([start(), start(), start(before=0, after=5)]) == 1
    assert failures_in_a_row([start(), start("stopped", 0, 5)]) == 0
    assert failures_in_a_row([start(None), start()]) == 1, "an end without a word is no failure of the ranks"


def test_a_node_that_ends_without_a_word_is_a_failure_unless_the_job_was_to_end() -> None:
    assert "node2 ended without a word" in outcome([end(0)]).words
    assert outcome([end(0)]).action == Action.RESTART
    assert outcome([]).action == Action.RESTART
    assert outcome([end(0, "stopped")], Asked.STOP).action == Action.LEAVE
    assert outcome([end(0, "stopped")], Asked.LIMIT).action == Action.REQUEUE


def test_a_node_that_hangs_twice_is_kept_out() -> None:
    hung = RankFailure(1, "node2", Exit.HANG, "hang")
    ends = [end(0, code=Exit.HANG), end(1, code=Exit.HANG)]
    first = decide(ends, NODES, None, [], False, 3)
    assert first.action == Action.RESTART
    again = decide([NodeEnd("node2", 1, "failed", 0.0, hung), end(0)], NODES, None, [start(failure=hung)], False, 3)
    assert (again.action, again.suspects) == (Action.REQUEUE, ("node2",))


def test_nothing_failed_is_no_failure() -> None:
    assert first_failure([end(0), end(1, "stopped")]) is None
