"""Status of a run from its folder alone, whatever a kill has left there."""

import json
import os
import socket
import time

import pytest

from launcher import attempts
from launcher.status import read_status, render
from launcher.wording import duration_in_words
from llm_dist import config
from llm_dist.errors import UserError

TABLE = {
    "run": {"name": "x", "steps": 100},
    "model": {"layers": 1, "d_model": 64, "heads": 4},
    "data": {"train": "shards", "sequence_tokens": 128},
    "batch": {"tokens_per_step": 1000 * 128},
}


@pytest.fixture
def run(tmp_path):
    for name in ("attempts", "checkpoints", "logs"):
        (tmp_path / name).mkdir()
    (tmp_path / "config.json").write_text(config.parse(TABLE).to_json())
    return tmp_path


def begin(run, number):
    (run / "attempts" / f"attempt_{number:04d}.json").write_text(json.dumps({"attempt": number, "ranks": 2}))


def save(run, step):
    folder = run / "checkpoints" / f"step_{step:08d}"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")


def beat(run, **changed):
    fields = {"pid": os.getpid(), "host": socket.gethostname(), "time": time.time(), "step": 33, "phase": "eval"}
    (run / "heartbeat.json").write_text(json.dumps(fields | changed))


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


def line(step, attempt, loss, **more):
    return {"step": step, "attempt": attempt, "loss_nats": loss, "tokens_per_second": 2000.0, **more}


def test_a_run_not_started(run):
    status = read_status(run)
    assert (status.state, status.step, status.steps, status.attempts) == ("not started", 0, 100, 0)
    assert status.loss_nats is status.seconds_left is status.latest_checkpoint_step is status.error is None
    assert "none yet" in render(status)


def test_a_running_run(run):
    begin(run, 1)
    save(run, 30)
    beat(run)
    (run / "metrics.jsonl").write_text(
        lines(line(20, 1, 5.0), line(30, 1, 4.5), {"step": 30, "attempt": 1, "eval": {}})
    )
    status = read_status(run)
    assert (status.state, status.step, status.loss_nats, status.phase) == ("running", 33, 4.5, "eval")
    assert status.seconds_left == pytest.approx((100 - 33) * 128_000 / 2000)
    assert status.latest_checkpoint_step == 30
    assert "running (eval)" in render(status) and "1 h 11 min" in render(status)


def test_the_newest_attempt_counts_and_half_lines_do_not(run):
    begin(run, 1)
    begin(run, 2)
    save(run, 50)
    first = lines(line(50, 1, 3.0), line(60, 1, 2.5)) + '{"step": 70, "att'
    (run / "metrics.jsonl").write_text(first + "\n" + lines(line(52, 2, 2.9)) + '{"step": 54, "attempt": 2, "lo')
    status = read_status(run)
    assert (status.state, status.step, status.loss_nats, status.attempts) == ("not running", 52, 2.9, 2)


def test_a_finished_run(run):
    begin(run, 1)
    save(run, 100)
    (run / "logs" / "rank_00000.log").write_text("=== attempt 1 | \nValueError: an old one\n")
    status = read_status(run)
    assert (status.state, status.step, status.seconds_left, status.error) == ("finished", 100, None, None)


def test_an_incomplete_checkpoint_is_none(run):
    (run / "checkpoints" / "step_00000100").mkdir()
    assert read_status(run).latest_checkpoint_step is None


@pytest.mark.parametrize("changed", [{"time": time.time() - 120}, {"pid": 2**22 + 1}])
def test_a_stale_heartbeat_or_a_dead_process_is_not_running(run, changed):
    begin(run, 1)
    beat(run, **changed)
    assert read_status(run).state == "not running"


def test_a_fresh_heartbeat_of_another_host_is_believed(run):
    beat(run, host="elsewhere", pid=2**22 + 1)
    assert attempts.is_running(run)
    assert not attempts.runs_here(run)


def test_a_half_written_heartbeat_is_none(run):
    (run / "heartbeat.json").write_text('{"pid": 1')
    assert not attempts.is_running(run)


def test_the_last_error_is_of_the_last_attempt(run):
    begin(run, 1)
    before = "=== attempt 1 | rank 0\nerror: an old one\n=== attempt 2 | rank 0\n"
    (run / "logs" / "rank_00000.log").write_text(before + "step 10\n")
    (run / "logs" / "rank_00001.log").write_text(
        before + "Traceback (most recent call last):\n  x\ntorch.cuda.OutOfMemoryError: no\n"
    )
    assert read_status(run).error == "rank_00001: torch.cuda.OutOfMemoryError: no"


def test_a_hang_is_the_last_error_of_the_attempt_that_it_ended(run):
    begin(run, 1)
    (run / "heartbeats").mkdir()
    (run / "heartbeats" / "verdict_0001.json").write_text(json.dumps({"words": "rank 1 is in data.loader"}))
    assert read_status(run).error == "hang: rank 1 is in data.loader"
    assert "last error  hang: rank 1 is in data.loader" in render(read_status(run))
    begin(run, 2)
    assert read_status(run).error is None


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(UserError, match="is not a run folder"):
        read_status(tmp_path)


def test_attempts_are_counted_from_their_files(run):
    assert attempts.next_attempt(run) == 1
    begin(run, 1)
    begin(run, 4)
    assert attempts.next_attempt(run) == 5


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, "0 s"), (59.6, "1 min"), (3725, "1 h 2 min"), (90_000, "1 d 1 h"), (86_460, "1 d 1 min")]
)
def test_durations(seconds, words):
    assert duration_in_words(seconds) == words
