"""Asked to stop in any phase: the ranks agree, nothing acknowledged is lost, and what stands is said in one line."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from llm_dist import metrics
from llm_dist.checkpoint import layout
from tests.e2e.commands import LAUNCH, Said, assert_same_end, run, steps_saved

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

STOPPED = 75
WITHIN_SECONDS = 25.0
SLOW = str(Path(__file__).with_name("slow.py"))
PROGRAMS = {
    "llm-launch": (sys.executable, SLOW, "local", "--ranks", "2"),
    "torchrun": (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", SLOW, "train"),
}
NO_STEP = "stopped before the first step of this attempt: {stands}; start again to go on"


class Ended(NamedTuple):
    """A run that was signalled in a phase."""

    said: Said
    seconds: float
    """From the signal to the end."""


class Slowed:
    """A run of two ranks that is slow in one phase."""

    def __init__(self, program: str, phase: str, marks: Path, words: tuple[object, ...], **environment: str) -> None:
        marks.mkdir(exist_ok=True)
        name, _, *only = phase.split(":")
        self._awaited = [marks / f"{name}_{rank}" for rank in only or ("0", "1")]
        command = [str(word) for word in (*PROGRAMS[program], *words)]
        environment = {**os.environ, "SLOW": phase, "SLOW_MARKS": str(marks), **environment}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )

    def ranks(self) -> list[psutil.Process]:
        """The rank processes, by rank."""
        found = [each for each in psutil.Process(self.process.pid).children() if SLOW in each.cmdline()]
        return sorted(found, key=lambda each: int(each.environ()["RANK"]))

    def signal_in_phase(self, number: signal.Signals, rank: int | None) -> Ended:
        """Wait until the slow ranks have come to the phase; signal the launcher, or one rank; wait for the end."""
        deadline = time.monotonic() + 120
        while not all(mark.exists() for mark in self._awaited):
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < deadline, "waited in vain"
            time.sleep(0.02)
        time.sleep(0.1)
        ranks = self.ranks()
        since = time.monotonic()
        (self.process if rank is None else ranks[rank]).send_signal(number)
        out, _ = self.process.communicate(timeout=120)
        seconds = time.monotonic() - since
        assert not psutil.wait_procs(ranks, timeout=5)[1], "ranks were left behind"
        return Ended(Said(self.process.returncode, "", out), seconds)


@contextmanager
def slowed(*args: object, **environment: str) -> Iterator[Slowed]:
    started = Slowed(*args, **environment)  # type: ignore[arg-type]
    try:
        yield started
    finally:
        if started.process.poll() is None:
            started.process.kill()
            started.process.communicate()


@pytest.fixture
def stopped(run_file: Path, tmp_path: Path):
    """`stopped(program, phase, number, rank, *words)`: how a run ended that was signalled in a phase."""

    def stop(program: str, phase: str, number: signal.Signals, rank: int | None, *words: str, **environment: str):
        with slowed(program, phase, tmp_path / "marks", (run_file, *words), **environment) as started:
            ended = started.signal_in_phase(number, rank)
        assert ended.seconds < WITHIN_SECONDS, ended.said.err
        assert "llm_dist/" not in "".join(re.findall(r'File ".*', ended.said.err)), (
            ended.said.err
        )  # torchrun's own it is
        if program == "llm-launch":
            assert ended.said.code == STOPPED, ended.said.err
        return ended

    return stop


def go_on(run_file: Path, *words: str) -> Said:
    said = run([*LAUNCH, run_file, "--ranks", "2", *words])
    assert said.code == 0, said.err
    return said


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, write_run_file) -> Path:
    """Two ranks, never stopped, evaluated at 4 and 8."""
    folder = tmp_path_factory.mktemp("undisturbed")
    go_on(write_run_file(folder), "eval.every_steps=4")
    return folder / "runs" / "tiny"


BEFORE_ANY_STEP = [
    ("llm-launch", "imports:1", signal.SIGTERM, None),
    ("llm-launch", "imports:1", signal.SIGUSR1, 1),
    ("llm-launch", "rendezvous:3:1", signal.SIGUSR1, None),
    ("llm-launch", "build:1", signal.SIGTERM, 1),
    ("torchrun", "imports:1", signal.SIGTERM, None),
    ("torchrun", "data:2:0", signal.SIGUSR1, 1),
    ("torchrun", "build:1", signal.SIGTERM, None),
]


def names(cases: list[tuple[str, str, signal.Signals, int | None]]) -> list[str]:
    return [
        f"{phase.partition(':')[0]} {number.name} to {program if rank is None else f'rank {rank} of {program}'}"
        for program, phase, number, rank in cases
    ]


@pytest.mark.parametrize(("program", "phase", "number", "rank"), BEFORE_ANY_STEP, ids=names(BEFORE_ANY_STEP))
def test_before_the_first_step_all_leave_and_say_what_stands(stopped, run_folder, program, phase, number, rank):
    said = stopped(program, phase, number, rank).said
    assert NO_STEP.format(stands="no complete checkpoint stands yet") in said.err
    assert steps_saved(run_folder) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_rank_stopped_before_it_listens_is_no_failure(stopped, run_folder, number):
    ended = stopped("llm-launch", "interpreter:30", number, 1)
    assert ended.seconds < 5
    assert "failed" not in ended.said.err
    assert "stopped; no complete checkpoint stands yet; start again to go on" in ended.said.err


@pytest.mark.parametrize("program", PROGRAMS)
def test_while_it_restores_the_checkpoint_stands(stopped, run_file, run_folder, undisturbed, program):
    go_on(run_file, "run.steps=4", "optim.total_steps=8", "eval.every_steps=4")
    words = ("run.steps=8", "optim.total_steps=8", "eval.every_steps=4")
    said = stopped(program, "restore:1", signal.SIGTERM, 1, *words).said
    assert NO_STEP.format(stands="the checkpoint at step 4 stands") in said.err
    go_on(run_folder, *words)
    assert_same_end(run_folder, undisturbed)


WHILE_TRAINING = [
    ("llm-launch", "step:1", signal.SIGTERM, None),
    ("llm-launch", "train:0.5", signal.SIGUSR1, 1),
    ("llm-launch", "save:1", signal.SIGTERM, 1),
    ("torchrun", "step:1", signal.SIGUSR1, 0),
    ("torchrun", "train:0.5", signal.SIGTERM, None),
    ("torchrun", "save:1", signal.SIGTERM, None),
]


@pytest.mark.parametrize(("program", "phase", "number", "rank"), WHILE_TRAINING, ids=names(WHILE_TRAINING))
def test_while_training_all_save_the_step_they_agree_on(
    stopped, run_file, run_folder, undisturbed, program, phase, number, rank
):
    said = stopped(program, phase, number, rank, "eval.every_steps=4").said
    (step,) = map(int, re.findall(r"stopped at step (\d+): saved; start again to go on", said.err))
    assert steps_saved(run_folder)[-1] == step < 8
    go_on(run_file, "eval.every_steps=4")
    assert_same_end(run_folder, undisturbed)


def trajectory(run_folder: Path) -> dict[str, object]:
    return layout.read_manifest(layout.find(run_folder).folder).trajectory


def evaluations(run_folder: Path) -> dict[int, object]:
    return {line["step"]: line["eval"] for line in metrics.read(run_folder / "metrics.jsonl") if "eval" in line}


@pytest.mark.parametrize(("program", "rank", "step"), [("llm-launch", 1, 4), ("torchrun", None, 8)])
def test_an_evaluation_is_left_early_and_done_again(stopped, run_file, run_folder, undisturbed, program, rank, step):
    words = ("eval.every_steps=4",) if step == 4 else ("eval.every_steps=100",)
    ended = stopped(program, "eval:0.5", signal.SIGTERM, rank, *words)
    assert f"stopped at step {step}: saved" in ended.said.err
    assert evaluations(run_folder) == {}
    said = go_on(run_file, *words)
    assert f"step {step}: holdout loss" in said.err
    assert_same_end(run_folder, undisturbed)
    assert evaluations(run_folder)[8] == evaluations(undisturbed)[8]
    if step == 4:
        assert trajectory(run_folder) == trajectory(undisturbed)
    assert "holdout loss" not in go_on(run_file, *words).err  # it is not done a third time


def test_a_finished_run_is_finished_whatever_it_is_told_at_last(stopped, run_file, run_folder, tmp_path):
    with slowed("llm-launch", "shutdown:1", tmp_path / "marks", (run_file,)) as started:
        ended = started.signal_in_phase(signal.SIGTERM, None)
    assert ended.said.code == 0, ended.said.err
    assert "finished at step 8 of 8" in ended.said.err


def test_what_cannot_be_interrupted_and_would_lose_nothing_is_left_in_time(stopped, run_folder):
    said = stopped("llm-launch", "step:60", signal.SIGTERM, None, SLOW_SAY="1").said
    words = (
        r"rank 0: step 0, first_step: asked to stop 1 s ago \(SIGTERM\), still busy; no complete checkpoint stands yet"
    )
    assert re.search(f"{words}; nothing is lost: leaving", said.err)


def test_what_cannot_be_interrupted_and_would_lose_steps_is_waited_for(stopped, run_folder):
    words = ("checkpoint.every_steps=100", "eval.every_steps=1", "eval.max_sequences=1")
    said = stopped("llm-launch", "save:3", signal.SIGTERM, 1, *words, SLOW_SAY="1").said
    log = (run_folder / "logs" / "rank_00001.log").read_text()
    assert "rank 1: step 1, save: asked to stop 1 s ago (SIGTERM), still busy; no complete checkpoint stands yet" in log
    assert "stopped at step 1: saved" in said.err


def test_one_rank_that_leaves_alone_stops_the_job(stopped, run_folder):
    """It could not wait; the others lose contact, and that is no failure to start again from."""
    said = stopped("llm-launch", "step:60:1", signal.SIGTERM, 1, SLOW_SAY="1").said
    assert "nothing is lost: leaving" in (run_folder / "logs" / "rank_00001.log").read_text()
    assert "starting all 2 ranks again" not in said.err
