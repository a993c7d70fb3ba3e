"""Where the hours went, from the run folder alone."""

import json

import pytest

from launcher.goodput import WORDS, lines, read_goodput
from launcher.status import read_status, render
from tests.unit.launcher.test_status import begin, run, save

assert run  # a fixture

SECONDS = {
    "step": 3600.0,
    "data": 120.0,
    "save": 60.0,
    "compile": 30.0,
    "eval": 90.0,
    "replayed": 240.0,
    "start_up": 45.0,
    "down": 600.0,
    "other": 15.0,
}
STARTED, UNTIL = 1_000_000.0, 1_004_800.0


def write(run, number, seconds=SECONDS, time=UNTIL):
    (run / "goodput").mkdir(exist_ok=True)
    table = {"attempt": number, "run_started": STARTED, "time": time, "furthest_step": 9, "seconds": seconds}
    (run / "goodput" / f"attempt_{number:04d}.json").write_text(json.dumps({**table, "ended": None}))


def test_exact_numbers_of_the_newest_attempt(tmp_path):
    write(tmp_path, 1, dict.fromkeys(SECONDS, 1.0))
    write(tmp_path, 2)
    found = read_goodput(tmp_path)
    assert found.seconds == SECONDS
    assert found.wall_seconds == UNTIL - STARTED
    assert found.share() == 0.75
    assert found.share("down") == 0.125


def test_a_run_that_is_neither_running_nor_finished_is_down_until_now(tmp_path):
    write(tmp_path, 1)
    found = read_goodput(tmp_path, down_until=UNTIL + 1200)
    assert found.seconds == {**SECONDS, "down": 1800.0}
    assert found.wall_seconds == UNTIL - STARTED + 1200
    assert read_goodput(tmp_path, down_until=UNTIL - 5).seconds == SECONDS


def test_half_written_accounts_are_passed_over_and_no_account_is_none(tmp_path):
    assert read_goodput(tmp_path) is None
    write(tmp_path, 1)
    (tmp_path / "goodput" / "attempt_0002.json").write_text('{"attempt": 2')
    assert read_goodput(tmp_path).seconds == SECONDS


def test_a_few_lines_for_a_person(tmp_path):
    write(tmp_path, 1)
    assert lines(read_goodput(tmp_path)) == [
        "75.0% of 1 h 20 min went into steps",
        "down or hanging 12.5%, steps computed again 5.0%, waiting for data 2.5%, evaluating 1.9%",
        "saving 1.2%, starting up 0.9%, compiling 0.6%, other 0.3%",
    ]
    assert set(WORDS) == set(SECONDS)


def test_status_shows_it_and_json_carries_it(run):
    from dataclasses import asdict

    begin(run, 1)
    assert read_status(run).goodput is None
    assert "goodput" not in render(read_status(run))
    save(run, 100)
    write(run, 1)
    status = read_status(run)
    assert "  goodput     75.0% of 1 h 20 min went into steps\n              down or hanging 12.5%" in render(status)
    assert json.loads(json.dumps(asdict(status)))["goodput"] == {"wall_seconds": 4800.0, "seconds": SECONDS}


def test_categories_are_those_the_trainer_books():
    pytest.importorskip("torch")
    from llm_dist.train.ledger import CATEGORIES

    assert tuple(WORDS) == CATEGORIES
