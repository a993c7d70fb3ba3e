"""A run that is stopped, killed, damaged or changed goes on as the run it was, or says why it does not."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess

import psutil
import pytest
import torch

from llm_dist import metrics
from tests.e2e.commands import (
    LAUNCH,
    TRAIN,
    Started,
    assert_same_end,
    llm_dist,
    losses,
    run,
    state_at_end,
    steps_saved,
)
from tests.e2e.conftest import tokenized

pytestmark = pytest.mark.e2e

STOPPED = 75


def at_step(monkeypatch, step, action):
    """Do something once, in the middle of training, when the numbers of `step` are written."""
    write, done = metrics.Metrics.write, []

    def write_and_act(self, at, record):
        write(self, at, record)
        if at == step and not done:
            done.append(at)
            action()

    monkeypatch.setattr(metrics.Metrics, "write", write_and_act)


def train(run_file, *words):
    said = llm_dist("train", run_file, *words)
    assert said.code == 0, said.err
    return said


@pytest.fixture
def undisturbed(tmp_path_factory, write_run_file):
    """`undisturbed(*overrides)`: folder of the same run, never stopped."""

    def make(*overrides):
        folder = tmp_path_factory.mktemp("undisturbed")
        train(write_run_file(folder), *overrides)
        return folder / "runs" / "tiny"

    return make


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["engine.precision=bf16", "model.dropout=0.2"],
        ["data.document_mask=true", "data.workers=0", "optim.schedule=wsd"],
        ["checkpoint.asynchronous=true", "model.family=gpt2"],
    ],
    ids=["fp32", "bf16 with dropout", "document mask", "asynchronous gpt2"],
)
def test_resumed_at_the_half_is_bitwise_the_uninterrupted_run(
    run_file, run_folder, undisturbed, monkeypatch, overrides
):
    at_step(monkeypatch, 5, lambda: signal.raise_signal(signal.SIGTERM))
    stopped = llm_dist("train", run_file, *overrides)
    assert stopped.code == STOPPED, stopped.err
    assert "stopped at step 5: saved; start again to go on" in stopped.err
    assert steps_saved(run_folder)[-1] == 5
    resumed = train(run_folder)
    assert "attempt 2: resumed at step 5 of 8 steps" in resumed.err
    assert "saved step 8" in resumed.err
    assert_same_end(run_folder, undisturbed(*overrides))


def test_stopped_before_the_first_step(run_file, run_folder, undisturbed, monkeypatch):
    at_step(monkeypatch, 1, lambda: signal.raise_signal(signal.SIGUSR1))
    assert llm_dist("train", run_file).code == STOPPED
    monkeypatch.setattr("llm_dist.train.stop.StopFlag.is_raised", property(lambda self: True))
    again = llm_dist("train", run_file)
    assert again.code == STOPPED
    assert "stopped before the first step of this attempt: the checkpoint at step 1 stands" in again.err
    new = llm_dist("train", run_file, "run.name=new")
    assert new.code == STOPPED
    assert "no complete checkpoint stands yet; start again to go on" in new.err
    assert steps_saved(run_folder.parent / "new") == []
    monkeypatch.undo()
    train(run_file, "run.name=new")
    assert_same_end(run_folder.parent / "new", undisturbed())


def test_more_steps_go_on(run_file, run_folder, undisturbed):
    train(run_file, "run.steps=4", "optim.total_steps=8")
    train(run_folder, "run.steps=8")
    assert_same_end(run_folder, undisturbed())


def test_the_schedule_of_a_run_stays_when_it_is_made_longer(run_file, run_folder):
    train(run_file)
    said = train(run_file, "run.steps=10")
    assert "the schedule ended at step 8, the rate stays at its last value" in said.err
    records = metrics.read(run_folder / "metrics.jsonl")
    assert [record["lr"] for record in records if "lr" in record][-2:] == pytest.approx([3e-4, 3e-4])


def test_a_finished_run_ends_at_once(run_file, run_folder):
    train(run_file)
    before = (run_folder / "metrics.jsonl").read_bytes()
    assert "finished at step 8 of 8" in train(run_folder).err
    assert (run_folder / "metrics.jsonl").read_bytes() == before
    assert steps_saved(run_folder) == [4, 8]


def test_how_often_one_reports_evaluates_and_saves_changes_no_weight(run_file, run_folder, undisturbed):
    train(run_file, "log.every_steps=3", "eval.every_steps=2", "checkpoint.every_steps=5", "data.workers=0")
    other = undisturbed()
    ours, theirs = state_at_end(run_folder), state_at_end(other)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert losses(run_folder) == {step: loss for step, loss in losses(other).items() if step in (3, 6, 8)}


def test_another_identity_is_refused_by_key_and_changes_nothing(run_file, run_folder):
    train(run_file, "run.steps=4")
    before = {path: path.read_bytes() for path in run_folder.rglob("*") if path.is_file()}
    assert llm_dist("train", run_folder, "model.d_ff=128").mistake == (
        "model.d_ff was 64 and is now 128: that is another run; choose another run.name"
    )
    assert "add --accept optim.lr" in llm_dist("train", run_folder, "optim.lr=1e-3").mistake
    assert {path: path.read_bytes() for path in run_folder.rglob("*") if path.is_file()} == before


def test_what_may_change_from_now_is_accepted_and_recorded(run_file, run_folder):
    train(run_file, "run.steps=4", "optim.total_steps=8")
    train(run_folder, "run.steps=8", "optim.lr=1e-3", "--accept", "optim.lr")
    recorded = [json.loads(path.read_text())["accepted"] for path in sorted((run_folder / "attempts").iterdir())]
    assert recorded == [[], ["optim.lr"]]
    train(run_folder)  # what was accepted once is the run's own now
    assert json.loads((run_folder / "config.json").read_text())["optim"]["lr"] == 1e-3


def test_a_run_that_another_user_has_written_is_refused_until_accepted(run_file, run_folder, monkeypatch):
    train(run_file, "run.steps=1", "optim.total_steps=8")
    own = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: own + 1)
    refused = llm_dist("train", run_folder, "run.steps=2").mistake
    assert "was written by another user" in refused and "--accept owner" in refused
    train(run_folder, "run.steps=2", "--accept", "owner")


def test_other_data_or_another_tokenizer_is_refused_before_anything_is_written(
    run_file, run_folder, corpus, tokenizer, other_shards, tmp_path
):
    train(run_file, "run.steps=4", "data.holdout=[]")
    reordered = tokenized(corpus, tokenizer, tmp_path / "reordered", "--seed", "1")
    config = (run_folder / "config.json").read_bytes()
    for shards, what in ((reordered, "source train of data.train"), (other_shards, "the tokenizer")):
        words = (f"data.train={shards}/train", "run.steps=8")
        mistake = llm_dist("train", run_folder, *words).mistake
        assert mistake.startswith(f"{what} has fingerprint ")
        assert mistake.endswith("; restore it or choose another run.name")
    assert (run_folder / "config.json").read_bytes() == config
    train(run_folder, "run.steps=8")


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(run_file, run_folder, undisturbed):
    train(run_file)
    damaged = run_folder / "checkpoints" / "step_00000008" / "rank_00000.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1000] ^= 1
    damaged.write_bytes(content)
    said = train(run_folder)
    assert str(damaged) in said.err
    assert "set aside as step_00000008.damaged; 4 steps are computed again" in said.err
    assert (run_folder / "checkpoints" / "step_00000008.damaged").is_dir()
    assert_same_end(run_folder, undisturbed())


def test_patience_ends_a_run_that_stopped_improving(run_file, run_folder):
    words = ("eval.every_steps=1", "eval.patience=2", "optim.lr=1e-30", "checkpoint.keep_last=2")
    assert "finished early: validation stopped improving at step 3 of 8" in train(run_file, *words).err
    assert steps_saved(run_folder) == [1, 3]  # the best, and the last
    assert "finished early" in train(run_folder).err
    assert steps_saved(run_folder) == [1, 3]
    status = run([*LAUNCH[:-1], "status", run_folder, "--json"]).json
    assert (status["state"], status["step"]) == ("finished", 3)


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (["checkpoint.keep_last=2"], [7, 8]),
        (["checkpoint.keep_last=2", "checkpoint.keep_every_steps=3"], [3, 6, 7, 8]),
        (["checkpoint.keep_last=2", "eval.every_steps=1", "optim.lr=1e-30"], [1, 7, 8]),
        (["checkpoint.keep_last=2", "eval.every_steps=1", "optim.lr=1e-30", "checkpoint.keep_best=false"], [7, 8]),
    ],
    ids=["last", "multiples", "best", "not the best"],
)
def test_retention(run_file, run_folder, words, kept):
    train(run_file, "checkpoint.every_steps=1", "log.every_steps=8", *words)
    assert steps_saved(run_folder) == kept


def test_numbers_that_are_not_finite_stop_the_run_and_are_never_saved(run_file, run_folder):
    words = ("optim.lr=1e30", "optim.warmup_steps=0", "checkpoint.every_steps=1", "log.every_steps=100")
    mistake = llm_dist("train", run_file, *words, "checkpoint.keep_last=9").mistake
    assert "lower optim.lr or raise optim.warmup_steps" in mistake
    saved = int(re.search(r"nothing was saved after step (\d+)", mistake)[1])
    assert steps_saved(run_folder) == list(range(1, saved + 1))


@pytest.mark.parametrize(
    ("command", "number"),
    [(TRAIN, signal.SIGINT), ((*LAUNCH, "--ranks", "2"), signal.SIGTERM)],
    ids=["Ctrl-C to train", "SIGTERM to llm-launch"],
)
def test_a_signal_leaves_a_complete_checkpoint_at_an_agreed_step(run_file, run_folder, command, number):
    with Started([*command, run_file, "run.steps=100000", "checkpoint.every_steps=100000"]) as started:
        started.until(lambda: len(losses(run_folder)) > 3)
        started.send(number)
        said = started.end()
    assert said.code == STOPPED, said.err
    assert "Traceback" not in said.err
    (step,) = map(int, re.findall(r"stopped at step (\d+): saved; start again to go on", said.err))
    assert steps_saved(run_folder) == [step] == [max(losses(run_folder))]


def rank_process(launcher_pid, rank):
    for process in psutil.Process(launcher_pid).children():
        if process.environ().get("RANK") == str(rank):
            return process
    raise AssertionError(f"no rank {rank}")


@pytest.mark.timeout(900)  # three starts of two ranks that import DeepSpeed: long where the cores are shared
def test_a_killed_rank_is_started_again_and_the_end_is_the_undisturbed_one(tmp_path, write_run_file, zero_run):
    run_file, folder = write_run_file(tmp_path), tmp_path / "runs" / "tiny"
    with Started([*LAUNCH, run_file, "--ranks", "2", *ZERO]) as started:
        started.until(lambda: steps_saved(folder) and max(losses(folder)) > steps_saved(folder)[-1])
        rank_process(started.process.pid, 1).kill()
        said = started.end()
    assert said.code == 0, said.err
    assert "rank 1 failed first: killed by SIGKILL" in said.err
    assert "starting all 2 ranks again (1 of 3 restarts); the checkpoint at step" in said.err
    survivor = (folder / "logs" / "rank_00000.log").read_text()
    assert len(re.findall(r"lost contact with another rank, whose log says why: .+", survivor)) == 1
    assert "Traceback" not in survivor
    assert_same_end(folder, zero_run)


ZERO = (
    "engine.name=zero",
    "engine.zero_stage=2",
    "engine.precision=bf16",
    "run.steps=40",
    "checkpoint.every_steps=10",
    "data.holdout=[]",
)


@pytest.fixture(scope="module")
def zero_run(tmp_path_factory, write_run_file):
    """An undisturbed run of two ranks."""
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("zero")
    said = run([*LAUNCH, write_run_file(folder), "--ranks", "2", *ZERO])
    assert said.code == 0, said.err
    return folder / "runs" / "tiny"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1.2 MB: one checkpoint fits, two do not."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"mounting a small file system is not allowed here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_a_full_disk_while_saving_leaves_the_earlier_checkpoint(run_file, small_disk, asynchronous):
    words = (f"run.dir={small_disk}", "checkpoint.every_steps=2", f"checkpoint.asynchronous={asynchronous}")
    mistake = llm_dist("train", run_file, *words).mistake
    assert "step_00000004 was not saved: No space left on device" in mistake
    assert mistake.endswith("the latest complete checkpoint is step_00000002")
    assert steps_saved(small_disk / "tiny") == [2]


def test_a_full_disk_between_saves_is_one_line(run_file, small_disk, monkeypatch):
    def fill():
        with pytest.raises(OSError, match="No space left"), (small_disk / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    at_step(monkeypatch, 11, fill)
    words = (f"run.dir={small_disk}", "run.steps=40", "checkpoint.every_steps=10", "checkpoint.keep_last=2")
    mistake = llm_dist("train", run_file, *words).mistake
    assert "No space left on device" in mistake
    assert "free some space, then start again" in mistake
    assert steps_saved(small_disk / "tiny") == [10]


def test_a_full_disk_on_two_ranks_ends_the_job_with_one_line(run_file, small_disk):
    words = (f"run.dir={small_disk}", "checkpoint.every_steps=2", "data.holdout=[]")
    said = run([*LAUNCH, run_file, "--ranks", "2", *words])
    assert "No space left on device" in said.mistake
    assert steps_saved(small_disk / "tiny") == [2]
