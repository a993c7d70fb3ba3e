"""Nodes that see each other through files alone, each a process of its own."""

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from launcher.preflight.shared import Meeting, meet
from llm_dist.errors import UserError

NODES = ("node1", "node2", "node3")


def meeting_of(folder, number, seconds):
    return Meeting(folder / "preflight" / "7.0", NODES, number, seconds)


def met(folder: Path, number: int, seconds: float):
    """On one node."""
    return meet(meeting_of(folder, number, seconds))


@pytest.fixture(scope="module")
def nodes():
    with ProcessPoolExecutor(3, multiprocessing.get_context("spawn")) as pool:
        yield pool


def test_all_see_all_at_one_moment(nodes, tmp_path):
    began = time.time()
    sights = list(nodes.map(met, [tmp_path] * 3, range(3), [30.0] * 3))
    assert [sight.unseen for sight in sights] == [(), (), ()]
    clocks = [sight.clock_seconds for sight in sights]
    assert began <= min(clocks) <= max(clocks) <= time.time()
    assert max(clocks) - min(clocks) < 2


def test_the_clocks_are_read_when_the_last_node_comes(nodes, tmp_path):
    waiting = [nodes.submit(met, tmp_path, number, 30.0) for number in (0, 1)]
    while not all(meeting_of(tmp_path, number, 0.0).file("here", number).exists() for number in (0, 1)):
        time.sleep(0.01)
    came = time.time()
    assert met(tmp_path, 2, 30.0).unseen == ()
    assert came <= min(each.result().clock_seconds for each in waiting)


def test_one_that_never_comes_is_named_by_the_others(nodes, tmp_path):
    sights = list(nodes.map(met, [tmp_path] * 2, (0, 2), [1.0] * 2))
    assert [(sight.unseen, sight.clock_seconds) for sight in sights] == [(("node2",), None)] * 2


def test_an_incarnation_is_met_once(tmp_path):
    met(tmp_path, 0, 0.0)
    with pytest.raises(UserError, match=r"here_00000\.json is there already"):
        met(tmp_path, 0, 0.0)
