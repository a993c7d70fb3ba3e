"""A run in which nothing goes on any more says who is at fault, ends, and goes on as if nothing had been."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from launcher.goodput import read_goodput
from launcher.ports import choose_port
from llm_dist import metrics
from llm_dist.errors import Exit
from tests.e2e.commands import LAUNCH, Started, assert_same_end, run, steps_saved

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

HANGING = Path(__file__).with_name("hanging.py")
WORDS = ("watch.hang_seconds=3", "data.holdout=[]")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1")
WriteRunFile = Callable[[Path], Path]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, write_run_file: WriteRunFile) -> Path:
    """Two ranks, never disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    said = run([*LAUNCH, write_run_file(folder), "--ranks", "2", *WORDS])
    assert said.code == 0, said.err
    return folder / "runs" / "tiny"


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """`faults(FAULT)`: what tests/e2e/hanging.py plants."""

    def choose(fault: str) -> None:
        monkeypatch.setenv("FAULT", fault)
        monkeypatch.setenv("FAULT_MARK", str(tmp_path / "mark"))
        monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))

    return choose


def stacks(log: str) -> str:
    """The last dump of a log."""
    return log.rpartition("the stacks of all threads, innermost call first:")[2]


def test_a_stopped_rank_is_found_killed_and_started_again(faults, run_file, run_folder, undisturbed) -> None:
    faults("stop:7")
    with Started([sys.executable, HANGING, "launch", run_folder, run_file, *WORDS]) as started:
        started.until(psutil.Process(started.process.pid).children)
        began = time.time()
        started.until((run_folder / "checkpoints" / "step_00000008" / "manifest.json").exists)
        started.until(lambda: not (run_folder / "heartbeat.json").exists())
        took_seconds = time.time() - began
        said = started.end()
    assert said.code == 0, said.err
    verdict = re.findall(r"^\S+  hang: (.+)$", said.err, re.MULTILINE)
    assert len(verdict) == 1
    assert re.fullmatch(
        r"rank 1 gives no sign of life, \d+ s \(process \d+ on \S+ is stopped\), last in \S+ at step \d; "
        r"rank 0 waits in agree \(gloo:all_reduce, runtime.py:\d+\)",
        verdict[0],
    )
    assert f"llm-launch: hang: {verdict[0]}; the stacks of the ranks are in" in said.err
    assert "in agree" in stacks((run_folder / "logs" / "rank_00000.log").read_text())
    assert (run_folder / "heartbeats" / "flight_0001" / "gloo_trace_rank_0").stat().st_size
    assert_same_end(run_folder, undisturbed)
    booked = read_goodput(run_folder)
    assert booked is not None
    assert booked.seconds["replayed"] > 0
    assert booked.seconds["down"] > 3.0  # the hang itself
    assert booked.wall_seconds == pytest.approx(took_seconds, rel=0.02)


def test_a_blocked_loader_under_torchrun(faults, run_file, run_folder, undisturbed) -> None:
    faults("loader:7")
    said = run([*TORCHRUN, HANGING, "train", run_file, *WORDS], OMP_NUM_THREADS="1")
    assert said.code == 0, said.err
    verdict = re.findall(r"hang: (rank 1 is in data.loader .+)", said.err)
    assert len(verdict) == 1
    assert re.match(
        r"rank 1 is in data.loader \(train/loop.py:\d+\) at step 6, \d s; rank 0 waits in agree", verdict[0]
    )
    assert len(re.findall(r"rank [01]: the stacks of all threads", said.err)) == 2
    assert re.search(r'hanging.py", line \d+ in rows', said.err), "the stack shows where"
    assert re.search(r"exitcode\s*:\s*76", said.err) or "exitcode: 76" in said.err
    assert_same_end(run_folder, undisturbed)


def test_when_a_rank_raises_the_others_end_within_seconds_without_any_launcher(faults, run_file, run_folder) -> None:
    faults("raise:7")
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(choose_port())}
    ranks = []
    for rank in range(2):
        environment = {**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"}
        command = [sys.executable, HANGING, "train", run_file, *WORDS]
        ranks.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    _, words_of_1 = ranks[1].communicate(timeout=240)
    ended = time.monotonic()
    _, words_of_0 = ranks[0].communicate(timeout=30)
    assert time.monotonic() - ended < 10.0
    assert [process.returncode for process in ranks] == [Exit.LOST_CONTACT, Exit.DEFECT]
    assert words_of_1.rstrip().endswith("LookupError: planted")
    assert len(re.findall(r"lost contact with another rank, whose log says why: .+", words_of_0)) == 1
    assert "Traceback" not in words_of_0 and "hang" not in words_of_0.replace(str(HANGING), "")
    assert steps_saved(run_folder) == [4]


def test_slow_evaluations_and_saves_and_a_rank_without_rows_are_no_hang(faults, run_file, run_folder) -> None:
    faults("slow")
    words = ("watch.hang_seconds=1.5", "eval.every_steps=4", "eval.max_sequences=24", "batch.tokens_per_step=32")
    said = run([sys.executable, HANGING, "launch", run_folder, run_file, *words])
    assert said.code == 0, said.err
    assert "hang: " not in said.err
    assert not list((run_folder / "heartbeats").glob("verdict*"))
    assert len(list((run_folder / "attempts").iterdir())) == 1
    booked = read_goodput(run_folder)
    assert booked is not None
    assert booked.seconds["eval"] > 2 * 3.0
    assert booked.seconds["save"] > 2 * 5.0
    records = {record["step"]: record for record in metrics.read(run_folder / "metrics.jsonl") if "lr" in record}
    assert records[5]["save_stall_seconds"] > 5.0
    assert {step for step, record in records.items() if "save_stall_seconds" in record} == {5}
    assert sum(records[8]["goodput"].values()) == pytest.approx(1.0, abs=1e-3)
    assert json.loads((run_folder / "goodput" / "attempt_0001.json").read_text())["ended"] == "in order"
