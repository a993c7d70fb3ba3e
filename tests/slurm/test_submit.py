"""What is submitted on a real Slurm: once whatever happens, refused in words, explained while it waits."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.daemons import CommandFailed
from tests.slurm.settings import Shape
from tests.slurm.submitted import LAUNCH, RANKS, Submitted

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(180)]

BUSY = ("--nodes=3", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1000")


@pytest.fixture
def submitted(cluster: Cluster, run_file: Path, run_folder: Path) -> Submitted:
    return Submitted(cluster, run_file, run_folder)


@pytest.fixture
def busy(cluster: Cluster):
    """A job that holds all nodes, so that others wait."""
    job = cluster.run("sbatch", "--parsable", *BUSY).strip()
    cluster.wait_for_state(job, "RUNNING", 20)
    yield job
    cluster.run("scancel", "--me")
    cluster.wait_for_state(job, "CANCELLED", 30)


def own_jobs(cluster: Cluster) -> list[str]:
    return [
        line
        for line in cluster.run("squeue", "--noheader", "--me", "--format=%i %j").splitlines()
        if "llm_dist" in line
    ]


def refusal(submitted: Submitted, *words: str) -> str:
    with pytest.raises(CommandFailed) as failed:
        submitted.launch("slurm", submitted.run_file, "--site", submitted.site, "--time", "10", *words)
    return str(failed.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--nodes", "5"], "--nodes 5 is more than the 3 nodes of partition main"),
        (["--nodes", "2", "--spares", "2"], "--nodes 2 --spares 2 is more than the 3 nodes"),
        (["--partition", "nix"], "--partition nix: this cluster has main, spot, short"),
        (["--partition", "short", "--time", "10"], "is more than partition short allows: 00:02:00"),
        (["--gpus-per-node", "4"], "--gpus-per-node 4: nodes of partition main have 2"),
        (["--time", "1"], "is too short to save before its end"),
        (["--constraint", "no-such-feature"], "Invalid feature specification"),
        (["model.layers=x"], "model.layers"),
        (["plan.max_waste=0", "--ranks-per-node", "3"], "waste"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_what_can_never_run_is_refused_before_the_queue_and_leaves_nothing(submitted, words, said) -> None:
    assert said in refusal(submitted, *words)
    assert not submitted.run.exists() and not own_jobs(submitted.cluster)


def test_a_dry_run_prints_what_would_be_submitted_and_writes_nothing(submitted) -> None:
    said = submitted.launch("slurm", submitted.run_file, *RANKS, "--site", submitted.site, "--dry-run")
    assert said.startswith("#!/bin/bash") and "#SBATCH --nodes=2" in said
    assert not submitted.run.exists() and not own_jobs(submitted.cluster)


def test_a_run_has_one_job_and_while_it_waits_the_reason_is_said(submitted, busy) -> None:
    submitted.submit()
    assert "the nodes it needs are busy" in submitted.status()["slurm"]["words"]
    assert "has job" in refusal(submitted)
    assert f"job {submitted.job} waits in the queue" in submitted.launch("list", submitted.run.parent)
    assert "taken out of the queue" in submitted.launch("stop", submitted.run)
    assert "was cancelled" in submitted.status()["slurm"]["words"]


def test_the_script_holds_no_secret_and_the_folder_has_the_users_permissions(submitted, busy, monkeypatch) -> None:
    submitted.cluster.environment["WANDB_API_KEY"] = "open-sesame"
    try:
        subprocess.run(
            ["bash", "-c", 'umask 077; exec "$@"', "-", *LAUNCH, "slurm", submitted.run_file, *RANKS],
            env=submitted.cluster.environment,
            check=True,
            capture_output=True,
        )
    finally:
        del submitted.cluster.environment["WANDB_API_KEY"]
    files = [path for path in submitted.run.rglob("*") if path.is_file()]
    assert files and not [path for path in files if b"open-sesame" in path.read_bytes()]
    assert not [path for path in [submitted.run, *files] if path.stat().st_mode & 0o077]


def test_a_controller_that_is_silent_while_a_job_is_submitted_gets_it_once(submitted, busy) -> None:
    """sbatch times out, though the controller has the request in its queue: the job must not come twice."""
    cluster = submitted.cluster
    words = [*LAUNCH, "slurm", str(submitted.run_file), *RANKS, "--site", str(submitted.site), "--json"]
    # The answer of the last check before sbatch is slow to come, so the pause falls between the two.
    paused = threading.Event()

    def pause_when_written() -> None:
        while not list(submitted.run.glob("slurm/submissions/*.sbatch")):
            time.sleep(0.005)
        cluster.pause_controller()
        paused.set()

    watcher = threading.Thread(target=pause_when_written, daemon=True)
    watcher.start()
    process = subprocess.Popen(
        words, env=cluster.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert paused.wait(60)
    time.sleep(12.0)  # sbatch gives up after ten
    cluster.resume_controller()
    out, err = process.communicate(timeout=90)
    jobs = own_jobs(cluster)
    assert len(jobs) == 1, (jobs, out, err)
    if process.returncode:  # it could not learn what became of the job: the same command again finds it
        assert "is not known" in err
        out = cluster.run(*words)
    assert json.loads(out.splitlines()[-1])["jobs"] == [jobs[0].split()[0]]
    assert len(own_jobs(cluster)) == 1


def test_a_job_held_after_a_failed_prolog_is_explained_and_let_go(
    start_cluster: Callable[[Shape], Cluster], run_file: Path, run_folder: Path, tmp_path: Path
) -> None:
    prolog = tmp_path / "prolog"
    prolog.write_text("#!/bin/sh\nexit 1\n")
    prolog.chmod(0o755)
    cluster = start_cluster(Shape(nodes=1, extra=f"Prolog={prolog}"))
    submitted = Submitted(cluster, run_file, run_folder)
    submitted.submit("run.steps=1", "optim.warmup_steps=0", options=["--time", "10"])
    submitted.wait_until(lambda: "prolog failed" in submitted.status()["slurm"]["words"], 60, "it is held")
    prolog.write_text("#!/bin/sh\n")
    cluster.run("scontrol", "update", "NodeName=node1", "State=resume")
    assert "let go" in submitted.launch("resume", submitted.run)
    submitted.finish()


def test_accounts_are_known_before_the_queue_and_remember_what_the_queue_forgets(
    start_cluster: Callable[[Shape], Cluster], run_file: Path, run_folder: Path
) -> None:
    cluster = start_cluster(Shape(nodes=1, accounting=True, extra="MinJobAge=2"))
    cluster.run("sacctmgr", "-i", "add", "account", "lab")
    cluster.run("sacctmgr", "-i", "add", "user", "root", "account=lab")
    submitted = Submitted(cluster, run_file, run_folder)
    assert "--account nix is not one of yours: lab" in refusal(submitted, "--account", "nix")
    submitted.submit("run.steps=1", "optim.warmup_steps=0", options=["--time", "10", "--account", "lab"])
    submitted.wait_until(
        lambda: cluster.run("squeue", "--noheader", "--states=all", "--me") == "", 90, "it is forgotten"
    )
    found = submitted.status()["slurm"]
    assert (found["job"], found["state"], found["words"]) == (submitted.job, "COMPLETED", "its job came to its end")


def test_sixteen_nodes_of_eight_gpus_are_accepted_and_cost_no_more_requests_than_two(
    start_cluster: Callable[[Shape], Cluster], run_file: Path, run_folder: Path
) -> None:
    cluster = start_cluster(Shape(nodes=16, cpus=8, gpus=8))
    submitted = Submitted(cluster, run_file, run_folder)
    counts = []
    for nodes in (2, 16):
        words = ["slurm", submitted.run_file, "--nodes", nodes, "--gpus-per-node", 8, "--time", "60", "--dry-run"]
        cluster.run("sdiag", "--reset")
        said = submitted.launch(*words, "batch.tokens_per_step=8192", "--site", submitted.site)
        counts.append(num_requests(cluster))
        assert f"#SBATCH --nodes={nodes}" in said and "#SBATCH --gpus-per-node=8" in said
    assert counts[0] == counts[1] > 0


def num_requests(cluster: Cluster) -> int:
    """Of the user to the controller, without those of the nodes."""
    ours = (
        "REQUEST_PARTITION_INFO",
        "REQUEST_NODE_INFO",
        "REQUEST_JOB_INFO",
        "REQUEST_JOB_USER_INFO",
        "REQUEST_JOB_WILL_RUN",
    )
    lines = cluster.run("sdiag").splitlines()
    return sum(int(line.split("count:")[1].split()[0]) for line in lines if line.split("(")[0].strip() in ours)
