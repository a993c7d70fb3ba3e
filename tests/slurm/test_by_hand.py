"""Without the launcher: the batch files in slurm/, and torchrun on two machines."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.attempts import latest_complete_step
from tests.e2e.commands import losses
from tests.e2e.commands import run as run_command
from tests.pages import ROOT
from tests.slurm.cluster import Cluster
from tests.slurm.daemons import wait_until
from tests.slurm.submitted import LAUNCH, Submitted

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(240)]

WORDS = ("run.steps=300", "checkpoint.every_steps=50", "data.holdout=[]", "log.every_steps=50")


def test_the_batch_file_trains_saves_before_the_limit_and_goes_on(
    cluster: Cluster, run_file: Path, run_folder: Path, tmp_path: Path
) -> None:
    variables = f"RUN={run_file},RANKS=1,PYTHON={sys.executable},OVERRIDES={' '.join(WORDS)}"
    options = ["--nodes=2", "--time=10", f"--chdir={tmp_path}", f"--export=ALL,{variables},PYTHONPATH={ROOT}"]
    submitted = Submitted(cluster, run_file, run_folder)
    submitted.job = cluster.run("sbatch", "--parsable", *options, str(ROOT / "slurm" / "train.sbatch")).strip()
    submitted.wait_for_step(50)
    cluster.run("scancel", "--batch", "--signal=USR1", submitted.job)
    submitted.wait_for_requeue()
    assert (latest_complete_step(run_folder) or 0) < 300
    submitted.finish()
    assert latest_complete_step(run_folder) == 300
    log = (tmp_path / f"llm_dist_{submitted.job}_0.log").read_text()
    assert "attempt 2: resumed at step" in log and "attempt 1: begins" in log


def test_the_batch_file_says_what_it_lacks(cluster: Cluster, tmp_path: Path) -> None:
    options = ["--nodes=1", "--time=10", f"--output={tmp_path / 'log'}", "--export=ALL"]
    job = cluster.run("sbatch", "--parsable", *options, str(ROOT / "slurm" / "train.sbatch")).strip()
    cluster.wait_for_state(job, "FAILED", 30)
    assert "say what to train" in (tmp_path / "log").read_text()


def test_an_array_tokenizes_its_files_and_a_killed_task_does_only_its_own_again(
    cluster: Cluster, tokenizer: Path, corpus: Path, tmp_path: Path
) -> None:
    lines = corpus.read_text().splitlines(keepends=True)
    for number in range(4):
        (tmp_path / f"piece_{number}.jsonl").write_text("".join(lines[number::4]))
    (tmp_path / "files.txt").write_text("".join(f"{tmp_path}/piece_{number}.jsonl\n" for number in range(4)))
    variables = f"FILES=files.txt,TOKENIZER={tokenizer},OUT=parts,PYTHON={sys.executable},PYTHONPATH={ROOT}"
    options = ["--array=0-1", f"--chdir={tmp_path}", f"--export=ALL,{variables}", "--parsable"]
    script = str(ROOT / "slurm" / "tokenize.sbatch")
    job = cluster.run("sbatch", *options, script).strip()
    for task in range(2):
        cluster.wait_for_state(f"{job}_{task}", "COMPLETED", 60)
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").rglob("*.tar")}
    assert {path.relative_to(tmp_path / "parts").parts[0] for path in made} == {"part_0000", "part_0001"}
    cluster.run("scontrol", "requeue", f"{job}_1")  # as a killed node would
    cluster.wait_for_state(f"{job}_1", "PENDING", 30)
    cluster.skip_requeue_delay(f"{job}_1")
    cluster.wait_for_state(f"{job}_1", "COMPLETED", 60)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").rglob("*.tar")} == made


def torchrun(endpoint: str, *options: str) -> list[str]:
    """Words that start one rank on a machine, up to the arguments of `llm_dist train`."""
    program = str(Path(sys.executable).with_name("torchrun"))
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-conf", "last_call_timeout=3"]
    environment = ["env", f"PYTHONPATH={ROOT}", "GLOO_SOCKET_IFNAME=eth0", "OMP_NUM_THREADS=1"]
    return [*environment, program, "--nproc-per-node", "1", *meeting, *options, "-m", "llm_dist", "train"]


def test_torchrun_on_two_machines_gives_the_run_of_one(
    cluster: Cluster, run_file: Path, run_folder: Path, write_run_file, tmp_path_factory: pytest.TempPathFactory
) -> None:
    alone = tmp_path_factory.mktemp("alone")
    assert run_command([*LAUNCH, "local", write_run_file(alone), "--ranks", "2"]).code == 0
    nodes = [cluster.node("node1"), cluster.node("node2")]
    words = [*torchrun(f"{nodes[0].address}:29400", "--nnodes", "2"), str(run_file)]
    started = [subprocess.Popen(node.command(*words), env=cluster.environment, cwd=ROOT) for node in nodes]
    assert [each.wait(timeout=120) for each in started] == [0, 0]
    assert losses(run_folder) == losses(alone / "runs" / "tiny")


def test_torchrun_goes_on_with_the_machines_that_are_left(cluster: Cluster, run_file: Path, run_folder: Path) -> None:
    nodes = [cluster.node("node1"), cluster.node("node2")]
    options = ["--nnodes", "1:2", "--max-restarts", "3"]
    words = [*torchrun(f"{nodes[0].address}:29401", *options), str(run_file), *WORDS, "run.steps=600"]
    started = [subprocess.Popen(node.command(*words), env=cluster.environment, cwd=ROOT) for node in nodes]
    wait_until(lambda: (latest_complete_step(run_folder) or 0) >= 50, 90, "a checkpoint of two ranks")
    for process in nodes[1].processes():
        os.kill(process.pid, signal.SIGKILL)
    assert started[0].wait(timeout=150) == 0
    started[1].wait(timeout=30)
    assert latest_complete_step(run_folder) == 600
    ranks = [json.loads(path.read_text())["ranks"] for path in sorted((run_folder / "attempts").iterdir())]
    assert (ranks[0], ranks[-1]) == (2, 1)
