"""The same run from llm-launch, torchrun and accelerate: each only describes the ranks in the environment."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.e2e.commands import LAUNCH, llm_dist, losses, run

pytestmark = pytest.mark.e2e

PROGRAMS = Path(sys.executable).parent
ACCELERATE = ("--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no")
OVERRIDES = ("data.holdout=[]", "checkpoint.every_steps=8")


@pytest.fixture(scope="module")
def launched(tmp_path_factory, write_run_file):
    """Losses of two ranks under llm-launch."""
    folder = tmp_path_factory.mktemp("launched")
    said = run([*LAUNCH, write_run_file(folder), "--ranks", "2", "--json", *OVERRIDES])
    assert said.json | {"run": ""} == {
        "run": "",
        "outcome": "finished",
        "exit_code": 0,
        "starts": 1,
        "latest_checkpoint_step": 8,
        "failure": None,
    }
    logs = [path.name for path in sorted((folder / "runs" / "tiny" / "logs").iterdir())]
    assert logs == ["rank_00000.log", "rank_00001.log"]
    return losses(folder / "runs" / "tiny")


def test_two_ranks_learn_what_one_learns(launched, finished):
    assert launched == pytest.approx(losses(finished), rel=1e-5)


@pytest.mark.parametrize(
    "command",
    [
        ("torchrun", "--nproc-per-node", "2"),
        ("accelerate", "launch", "--multi_gpu", *ACCELERATE),
    ],
    ids=["torchrun", "accelerate"],
)
def test_other_launchers_give_the_same_losses(command, run_file, run_folder, launched):
    program = PROGRAMS / command[0]
    if not program.exists():
        pytest.skip(f"{command[0]} is not installed beside this Python")
    said = run([program, *command[1:], "-m", "llm_dist", "train", run_file, *OVERRIDES])
    assert said.code == 0, said.err
    assert "2 ranks" in said.err
    assert losses(run_folder) == launched


def test_accelerate_on_cpu_starts_one_process_and_that_is_said(run_file, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert "accelerate was asked for several processes and started one" in llm_dist("train", run_file).mistake
