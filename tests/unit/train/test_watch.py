"""Where the seconds go, and the heartbeat."""

import json
import os

import pytest

from llm_dist.train import watch as module
from llm_dist.train.watch import Watch


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only when told: clock[0] is now."""
    now = [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(module.time, "time", lambda: now[0])
    return now


def test_seconds_by_phase_and_the_rest(clock):
    watch = Watch(None)
    with watch.phase("data"):
        clock[0] += 1
    with watch.phase("step"):
        clock[0] += 3
    with watch.phase("data"):
        clock[0] += 0.5
    clock[0] += 2
    assert watch.take() == {"data": 1.5, "step": 3.0, "other": 2.0, "all": 6.5}
    clock[0] += 1
    assert watch.take() == {"other": 1.0, "all": 1.0}


def test_heartbeat_says_who_where_and_what(clock, tmp_path):
    path = tmp_path / "heartbeat.json"
    watch = Watch(path)
    watch.step = 7
    with watch.phase("eval"):
        beat = json.loads(path.read_text())
    assert beat == {"pid": os.getpid(), "host": beat["host"], "time": 100.0, "step": 7, "phase": "eval"}
    assert [file.name for file in tmp_path.iterdir()] == ["heartbeat.json"]
    watch.close()
    assert not path.exists()


def test_steps_beat_once_a_second_and_everything_else_at_once(clock, tmp_path):
    path = tmp_path / "heartbeat.json"
    watch = Watch(path)

    def phase_after(seconds, name):
        clock[0] += seconds
        with watch.phase(name):
            return json.loads(path.read_text())["phase"]

    assert phase_after(0, "data") == "data"
    assert phase_after(0.1, "step") == "data"
    assert phase_after(0.1, "save") == "save"
    assert phase_after(1.1, "step") == "step"
