"""Who is at fault, in one line, whatever the heartbeats say."""

import os
import socket
import subprocess
import sys

import pytest

from llm_dist.train.heartbeat import Beat, Seen
from llm_dist.train.verdict import judge

HANG = 40.0


def beat(rank, phase, step=812, idle=41.0, **more):
    fields = {"attempt": 1, "pid": os.getpid(), "host": "elsewhere", "time": 0.0, "count": 5, "since": 0.0}
    fields |= {"line": None, "waits_in": None}
    return Beat(rank=rank, step=step, phase=phase, idle_seconds=idle, **(fields | more))


def living(*beats):
    return [Seen(each.rank, each, is_silent=False) for each in beats]


def verdict(*seen):
    found = judge(list(seen), HANG)
    assert found is not None
    assert "\n" not in found.words
    return found


def test_a_rank_busy_by_itself_while_the_others_wait():
    found = verdict(*living(*(beat(rank, "agree") for rank in range(3)), beat(3, "data")))
    assert found.words == "rank 3 is in data.loader at step 812, 41 s; the others wait in agree"
    assert (found.ranks, found.step) == ((3,), 812)


def test_the_flight_recorder_knows_who_waits_where_the_phase_does_not():
    waiting = [beat(rank, "step", waits_in="gloo:all_reduce", line="engine/plain.py:60") for rank in range(2)]
    found = verdict(*living(*waiting, beat(2, "step", waits_in="", line="model/attention.py:88")))
    assert found.words == (
        "rank 2 is in engine.train_step (model/attention.py:88) at step 812, 41 s; "
        "the others wait in engine.train_step (gloo:all_reduce, engine/plain.py:60)"
    )
    assert found.ranks == (2,)


def test_a_rank_that_is_behind():
    found = verdict(*living(beat(0, "step"), beat(1, "step", step=811), beat(2, "step")))
    assert found.words.startswith("rank 1 is in engine.train_step at step 811, 41 s; the others are in")
    assert (found.ranks, found.step) == ((1,), 811)


def test_a_rank_that_is_elsewhere_than_most():
    ranks = [beat(rank, "step", line="a.py:1") for rank in range(3)]
    assert verdict(*living(*ranks, beat(3, "step", line="b.py:2"))).ranks == (3,)


def test_where_nobody_differs_nobody_is_accused():
    found = verdict(*living(beat(0, "save", idle=90), beat(1, "save", idle=95)))
    assert found.words == "all ranks are in save at step 812, 90 s, and none goes on"
    assert found.ranks == ()


def test_a_rank_alone():
    found = verdict(*living(beat(0, "data", line="train/loop.py:29")))
    assert found.words == "rank 0 is in data.loader (train/loop.py:29) at step 812, 41 s"
    assert found.ranks == (0,)


def test_a_silent_rank_is_at_fault_whatever_it_did_last():
    silent = Seen(1, beat(1, "agree", idle=0.0), is_silent=True)
    found = verdict(*living(beat(0, "step")), silent)
    assert found.words.startswith("rank 1 gives no sign of life, ")
    assert "on elsewhere is stopped, dead or cut off), last in agree at step 812; rank 0 is in" in found.words
    assert found.ranks == (1,)


@pytest.mark.parametrize(("state", "signal"), [("stopped", "STOP"), ("dead", "KILL")])
def test_what_has_become_of_a_process_of_this_machine(state, signal):
    process = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
    try:
        subprocess.run(["kill", f"-{signal}", str(process.pid)], check=True)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        silent = Seen(1, beat(1, "data", pid=process.pid, host=socket.gethostname()), is_silent=True)
        assert (
            f"(process {process.pid} on {socket.gethostname()} is {state})"
            in verdict(*living(beat(0, "agree")), silent).words
        )
    finally:
        process.kill()
        process.wait()


def test_ranks_that_are_gone_are_counted_and_not_all_named():
    gone = [Seen(rank, None, is_silent=True) for rank in range(1, 13)]
    words = verdict(*living(beat(0, "agree")), *gone).words
    assert words == "ranks 1, 2, 3, 4, 5, 6, 7, 8 and 4 more have left or never began; rank 0 waits in agree"


def test_ranks_that_left_at_the_end_are_not_at_fault():
    found = verdict(*living(beat(0, "close", idle=90)), Seen(1, None, is_silent=True))
    assert found.words == "rank 0 is in close at step 812, 90 s"


@pytest.mark.parametrize(
    "seen",
    [
        living(beat(0, "agree"), beat(1, "data", idle=39)),
        living(beat(0, "agree"), beat(1, "save", idle=79)),
        living(*(beat(rank, "first_step", idle=79) for rank in range(2))),
        [*living(beat(0, "agree")), Seen(1, beat(1, "data"), is_silent=None)],
        [*living(beat(0, "agree", idle=39)), Seen(1, None, is_silent=True)],
    ],
    ids=["goes on", "saves", "compiles", "not looked at for long enough", "silent, but nobody has waited for long"],
)
def test_no_hang(seen):
    assert judge(seen, HANG) is None
