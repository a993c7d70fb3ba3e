"""Watchdogs of several ranks in one process, on a clock of their own: who judges, who ends, and when nobody does."""

import json
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch

from llm_dist.errors import Exit
from llm_dist.runtime import Runtime
from llm_dist.train import heartbeat, watchdog
from llm_dist.train import watch as watch_module
from llm_dist.train.folder import RunFolder
from llm_dist.train.ledger import Ledger
from llm_dist.train.watch import Watch
from llm_dist.train.watchdog import Watchdog, beat_seconds, collective_timeout, window_seconds

HANG = 3.0


class World:
    """Ranks whose watchdogs look whenever time passes."""

    def __init__(self, folder, ranks, hang_seconds=HANG):
        self.now = 1000.0
        self.phases = ExitStack()
        self.folder, self.asleep, self.ended = folder, set(), {}
        self.watches = [Watch() for _ in range(ranks)]
        self.dogs = []
        for rank, watch in enumerate(self.watches):
            here = Runtime(rank, ranks, rank, torch.device("cpu"))
            ledger = Ledger(folder.goodput, 1, watch, self.now) if rank == 0 else None
            end = lambda code, rank=rank: self.ended.setdefault(rank, code)  # noqa: E731
            self.dogs.append(Watchdog(watch, folder, here, 1, hang_seconds, ledger, end))

    def enter(self, *phases):
        """The phase of each rank, for good."""
        for watch, name in zip(self.watches, phases, strict=True):
            self.phases.enter_context(watch.phase(name))

    def wait(self, seconds, meanwhile=lambda: None):
        for _ in range(round(seconds / 0.3)):
            self.now += 0.3
            meanwhile()
            for rank, dog in enumerate(self.dogs):
                if rank not in self.asleep and rank not in self.ended:
                    dog.look()

    @property
    def verdict(self):
        path = self.folder.heartbeats / "verdict_0001.json"
        return json.loads(path.read_text()) if path.exists() else None


@pytest.fixture
def world_of(tmp_path, monkeypatch):
    """`world_of(ranks)`: their time passes only when told."""
    worlds = []

    def make(*args):
        folder = RunFolder(tmp_path)
        now = lambda: worlds[-1].now if worlds else 1000.0  # noqa: E731
        clock = SimpleNamespace(monotonic=now, time=now, perf_counter=now, sleep=lambda seconds: None)
        monkeypatch.setattr(watchdog, "time", clock)
        monkeypatch.setattr(watch_module, "time", clock)
        worlds.append(World(folder, *args))
        return worlds[-1]

    return make


def test_a_blocked_loader_is_judged_by_rank_0_and_all_ranks_end(world_of, capfd):
    world = world_of(3)
    world.enter("agree", "data", "agree")
    world.wait(HANG + 2 * window_seconds(3, HANG))
    assert world.ended == dict.fromkeys(range(3), Exit.HANG)
    assert world.verdict["ranks"] == [1]
    said = capfd.readouterr().err
    assert said.count("hang: rank 1 is in data.loader") == 1
    assert said.count("the stacks of all threads, innermost call first:") == 3
    assert said.count("test_watchdog.py") >= 3
    account = json.loads((world.folder.goodput / "attempt_0001.json").read_text())
    assert account["ended"] == "hang"
    assert account["seconds"]["down"] == pytest.approx(HANG, abs=1.0)


@pytest.mark.parametrize("asleep", [{0}, {2}, {0, 1}])
def test_a_silent_rank_is_judged_by_the_lowest_living_one(world_of, asleep, capfd):
    world = world_of(4)
    world.enter(*["step"] * 4)
    world.wait(1)
    world.asleep = asleep
    world.wait(HANG + 4 * window_seconds(4, HANG))
    assert set(world.ended) == set(range(4)) - asleep
    assert world.verdict["ranks"] == sorted(asleep)
    assert "sign of life" in world.verdict["words"]
    assert capfd.readouterr().err.count("hang: ") == 1


def test_a_rank_that_wakes_up_finds_the_verdict(world_of):
    world = world_of(2)
    world.enter("step", "step")
    world.wait(1)
    world.asleep = {1}
    world.wait(20)
    world.asleep = set()
    world.wait(1)
    assert set(world.ended) == {0, 1}


def test_a_machine_that_slept_accuses_nobody(world_of):
    world = world_of(2)
    world.enter("step", "step")
    world.wait(1)
    world.now += 3600
    world.wait(HANG - 1.9)
    assert world.ended == {}


def test_progress_within_a_phase_is_no_hang(world_of):
    world = world_of(2)
    world.enter("eval", "eval")
    world.wait(10 * HANG, meanwhile=world.watches[1].mark)
    assert world.ended == {}
    world.wait(10 * HANG)
    assert set(world.ended) == {0, 1}


def test_a_save_that_writes_is_no_hang_and_one_that_does_not_gets_twice_the_time(world_of, monkeypatch):
    written = [0]
    counters = lambda: SimpleNamespace(write_chars=written[0], read_chars=0)  # noqa: E731
    monkeypatch.setattr(watchdog.psutil, "Process", lambda: SimpleNamespace(io_counters=counters))
    world = world_of(2)
    world.enter("save", "save")

    def write():
        written[0] += 1 << 20

    world.wait(10 * HANG, meanwhile=write)
    assert world.ended == {}
    world.wait(2 * HANG - 0.3)
    assert world.ended == {}
    world.wait(1.5)
    assert world.verdict["words"].startswith("all ranks are in save (")
    assert set(world.ended) == {0, 1}


def test_hang_seconds_of_0_shows_life_and_judges_nobody(world_of):
    world = world_of(2, 0.0)
    world.enter("agree", "data")
    world.wait(300)
    assert world.ended == {} and world.verdict is None
    assert heartbeat.read(heartbeat.path_of(world.folder.heartbeats, 1), 1).phase == "data"


def test_heartbeats_say_who_where_and_what_and_go_when_the_rank_leaves_in_order(tmp_path):
    folder, watch = RunFolder(tmp_path), Watch()
    with Watchdog(watch, folder, Runtime(0, 1, 0, torch.device("cpu")), 4, HANG):
        watch.step = 33
        with watch.phase("eval"):
            deadline = watchdog.time.monotonic() + 5
            while (beat := json.loads(folder.heartbeat.read_text()))["phase"] != "eval":
                assert watchdog.time.monotonic() < deadline
                watchdog.time.sleep(0.01)
        assert (beat["step"], beat["rank"], beat["attempt"]) == (33, 0, 4)
        assert {"pid", "host", "time", "since"} <= beat.keys()
        assert heartbeat.path_of(folder.heartbeats, 0).exists()
    assert not folder.heartbeat.exists()
    assert list(folder.heartbeats.iterdir()) == []


def test_heartbeats_of_another_attempt_or_half_written_are_none(tmp_path, world_of):
    world = world_of(1)
    world.wait(0.3)
    path = heartbeat.path_of(world.folder.heartbeats, 0)
    assert heartbeat.read(path, 1) is not None
    assert heartbeat.read(path, 2) is None
    path.write_text(path.read_text()[:-9])
    assert heartbeat.read(path, 1) is None


def test_a_neighbour_that_ends_first_does_not_hide_the_verdict(world_of, capfd):
    """Its end breaks the collective this rank waits in: the error reaches the main thread before the next look."""
    world = world_of(2)
    world.dogs[0]._thread.start = lambda: None
    world.dogs[0]._thread.join = lambda timeout: None
    with pytest.raises(RuntimeError), world.dogs[0]:
        (world.folder.heartbeats / "verdict_0001.json").write_text('{"words": "x", "ranks": [1], "step": 3}')
        raise RuntimeError("Connection closed by peer")
    assert world.ended == {0: Exit.HANG}
    assert "hang: " not in capfd.readouterr().err


def test_a_run_folder_that_cannot_be_written_is_named_once(world_of, capfd):
    world = world_of(1)
    world.folder.heartbeats.write_text("in the way")
    world.wait(3)
    assert capfd.readouterr().err.count("its heartbeat cannot be written") == 1


def test_large_worlds_beat_seldom_and_hangs_are_judged_before_a_collective_gives_up():
    assert [beat_seconds(ranks, 600) for ranks in (1, 50, 500, 10_000)] == [1, 1, 10, 30]
    assert beat_seconds(2, 3) == pytest.approx(0.3)
    assert window_seconds(10_000, 600) >= 3 * 30
    assert collective_timeout(0).total_seconds() == collective_timeout(60).total_seconds() == 600
    assert collective_timeout(600).total_seconds() > 2 * 600 + 2 * window_seconds(8, 600)
