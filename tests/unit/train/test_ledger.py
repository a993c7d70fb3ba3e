"""Every second of a run is booked once, over all its attempts."""

import json
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from llm_dist.train import ledger as module
from llm_dist.train import watch as watch_module
from llm_dist.train.ledger import CATEGORIES, Ledger
from llm_dist.train.watch import Watch


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only when told: clock[0] is now."""
    now = [1000.0]
    fake = SimpleNamespace(time=lambda: now[0], perf_counter=lambda: now[0])
    monkeypatch.setattr(module, "time", fake)
    monkeypatch.setattr(watch_module, "time", fake)
    return now


def attempt(folder, number, clock, started=None):
    started = clock[0] if started is None else started
    watch = Watch()
    return watch, Ledger(folder, number, watch, started)


def spend(watch, clock, *phases):
    for name, seconds in phases:
        with watch.stepping() if name == "step" else watch.phase(name):
            clock[0] += seconds
        watch.step += name == "step"


def assert_seconds(found, **expected):
    assert {name: each for name, each in found.seconds.items() if each} == expected
    assert found.seconds.keys() == set(CATEGORIES)
    assert sum(found.seconds.values()) == pytest.approx(found.time - found.run_started)


def test_one_attempt_in_exact_numbers(clock, tmp_path):
    watch, ledger = attempt(tmp_path / "goodput", 1, clock, started=clock[0] - 5)
    spend(watch, clock, ("build", 2), ("restore", 1))
    watch.begin()
    spend(watch, clock, ("data", 1), ("agree", 0.5), ("step", 30), ("step", 2), ("step", 2), ("step", 4))
    spend(watch, clock, ("save", 7), ("eval", 6), ("report", 0.25), ("replicas", 0.25))
    clock[0] += 0.5
    assert_seconds(ledger.account(), start_up=8, data=1.5, step=10, compile=28, save=7, eval=6, other=1)
    assert ledger.fractions()["step"] == pytest.approx(10 / 61.5, abs=1e-5)
    assert sum(ledger.fractions().values()) == pytest.approx(1.0, abs=1e-4)


def test_what_is_down_and_what_is_replayed_after_a_kill(clock, tmp_path):
    watch, ledger = attempt(tmp_path, 1, clock)
    watch.begin()
    spend(watch, clock, ("step", 10), ("step", 4), ("step", 4))
    ledger.write()  # and killed
    clock[0] += 100
    started = clock[0]
    clock[0] += 3
    watch, ledger = attempt(tmp_path, 2, clock, started)
    watch.step = 1  # its checkpoint
    watch.begin()
    spend(watch, clock, ("data", 1), ("step", 14), ("data", 1), ("step", 4), ("data", 1), ("step", 4))
    ledger.write("in order")
    assert_seconds(ledger.account(), step=12 + 4, compile=6 + 10, down=100, start_up=3, replayed=1 + 4 + 1 + 4, data=1)
    assert ledger.account().furthest_step == 4
    found = json.loads((tmp_path / "attempt_0002.json").read_text())
    assert (found["ended"], found["run_started"]) == ("in order", 1000.0)
    assert json.loads((tmp_path / "attempt_0001.json").read_text())["ended"] is None


def test_time_in_which_all_hung_is_down(clock, tmp_path):
    watch, ledger = attempt(tmp_path, 1, clock)
    watch.begin()
    with watch.phase("agree"):
        clock[0] += 9
        assert_seconds(ledger.account("hang", ("agree", 6.0)), data=3, down=6)
    assert_seconds(ledger.account("hang", ("agree", 60.0)), down=9)


def test_an_attempt_that_left_no_account_is_down_and_a_broken_file_is_none(clock, tmp_path):
    attempt(tmp_path, 1, clock)
    (tmp_path / "attempt_0002.json").write_text('{"attempt": 2, "ru')
    clock[0] += 50
    assert_seconds(attempt(tmp_path, 4, clock)[1].account(), down=50)


def test_attempts_of_one_process_do_not_count_it_twice(clock, tmp_path):
    watch, ledger = attempt(tmp_path, 1, clock, started=900.0)
    spend(watch, clock, ("data", 10))
    ledger.write()
    clock[0] += 1
    assert_seconds(attempt(tmp_path, 2, clock, started=900.0)[1].account(), start_up=101, data=10)


def test_the_beginning_of_a_process_is_known_to_a_fraction_of_a_second():
    code = "import time; time.sleep(1); from llm_dist.train.ledger import process_started; print(process_started())"
    before = time.time()
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert before - 0.1 <= float(said) <= before + 0.5
