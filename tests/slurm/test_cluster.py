"""The harness itself: its nodes are machines of their own, they fail as told, and nothing outlives a cluster."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, leftovers
from tests.slurm.daemons import CommandFailed, wait_until
from tests.slurm.settings import Shape

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slurm

OWNER = """
import time
from tests.slurm.cluster import Cluster
cluster = Cluster()
cluster.up()
job = cluster.run("sbatch", "--parsable", "--output=/dev/null", "-N3", "--wrap", "srun sleep 1000")
cluster.wait_for_state(job, "RUNNING", 10)
print(cluster.folder, cluster.link, flush=True)
time.sleep(1000)
"""


def submit(cluster: Cluster, script: str, *options: str) -> str:
    return cluster.run("sbatch", "--parsable", "--output=/dev/null", *options, "--wrap", script)


def reaches(cluster: Cluster, start: str, end: str) -> bool:
    try:
        cluster.node(start).execute("timeout", "2", "bash", "-c", f"</dev/tcp/{end}/6818")
    except CommandFailed:
        return False
    return True


def test_a_job_runs_on_nodes_that_are_machines_of_their_own(cluster: Cluster, tmp_path: Path) -> None:
    script = "srun --label sh -c 'hostname; ls /sys/class/net; echo x >>/var/tmp/own; cat /var/tmp/own'"
    job = submit(cluster, script, "-N2", f"--output={tmp_path / 'out'}")
    cluster.wait_for_state(job, "COMPLETED", 20)
    said = (tmp_path / "out").read_text().splitlines()
    assert sorted(said) == [
        *("0: eth0", "0: lo", "0: node1", "0: x"),
        *("1: eth0", "1: lo", "1: node2", "1: x"),
    ]


def test_fake_gpus_are_handed_out(cluster: Cluster) -> None:
    words = ["srun", "-N1", "-n2", "--gpus-per-task=1", "printenv", "CUDA_VISIBLE_DEVICES"]
    assert sorted(cluster.run(*words).split()) == ["0", "1"]


def test_a_cut_link_carries_nothing_until_it_is_healed(cluster: Cluster) -> None:
    assert reaches(cluster, "node2", "node1")
    cluster.node("node2").cut()
    assert not reaches(cluster, "node2", "node1")
    assert reaches(cluster, "node3", "node1")
    cluster.node("node2").heal()
    wait_until(lambda: reaches(cluster, "node2", "node1"), 10, "packets pass again")


def test_a_job_outlives_slurmd_and_a_controller_that_comes_back(cluster: Cluster) -> None:
    job = submit(cluster, "sleep 1000", "-w", "node1")
    cluster.wait_for_state(job, "RUNNING", 10)
    node = cluster.node("node1")
    node.kill_slurmd()
    assert not reaches(cluster, "node2", "node1")
    node.start_slurmd()
    cluster.stop_controller()
    cluster.start_controller()
    cluster.pause_controller()
    with pytest.raises(subprocess.TimeoutExpired):
        cluster.run("squeue", seconds=1)
    cluster.resume_controller()
    assert cluster.job(job)["JobState"] == "RUNNING"
    assert [process.command for process in node.processes() if "sleep" in process.command] == ["sleep 1000"]
    cluster.run("scancel", job)
    cluster.wait_for_state(job, "CANCELLED", 10)
    wait_until(lambda: not node.processes(), 10, "nothing of the job is left")


def test_a_job_moves_away_from_a_node_without_power(start_cluster: Callable[[Shape], Cluster]) -> None:
    cluster = start_cluster(Shape(extra="SlurmdTimeout=5"))
    job = submit(cluster, "sleep 1000", "--requeue", "-N2")
    cluster.wait_for_state(job, "RUNNING", 10)
    node = cluster.node("node2")
    node.power_off()
    assert node.processes() == []
    cluster.wait_for_state(job, "PENDING", 60)
    cluster.skip_requeue_delay(job)
    moved = cluster.wait_for_state(job, "RUNNING", 30)
    assert (moved["NodeList"], moved["Restarts"]) == ("node[1,3]", "1")
    node.power_on()
    assert cluster.run("srun", "--nodelist=node2", "hostname") == "node2"
    cluster.run("scancel", job)


def test_sixteen_nodes_of_eight_gpus_and_an_accounting_database(start_cluster: Callable[[Shape], Cluster]) -> None:
    cluster = start_cluster(Shape(nodes=16, cpus=8, gpus=8, accounting=True, extra="KillWait=30"))
    job = submit(cluster, "srun true; exit 3", "-N16", "--gpus-per-node=8")
    cluster.wait_for_state(job, "FAILED", 60)
    words = ["sacct", "--jobs", job, "--allocations", "--noheader", "--parsable2", "--format=State,ExitCode,AllocNodes"]
    wait_until(lambda: cluster.run(*words) == "FAILED|3:0|16", 10, "sacct knows")
    assert "KillWait                = 30 sec" in cluster.run("scontrol", "show", "config").splitlines()


def test_two_clusters_live_side_by_side_and_leave_nothing(cluster: Cluster) -> None:
    with Cluster(Shape(nodes=1)) as other:
        job = submit(other, "setsid sleep 1000 & sleep 1000", "--job-name=other")
        other.wait_for_state(job, "RUNNING", 10)
        assert cluster.run("squeue", "--noheader", "--name=other") == ""
        assert any("slurmctld" in left for left in other.leftovers())
    assert other.leftovers() == []
    assert sorted(cluster.run("srun", "-N3", "hostname").split()) == ["node1", "node2", "node3"]


def test_a_cluster_that_cannot_start_says_why_and_leaves_nothing() -> None:
    broken = Cluster(Shape(nodes=1, extra="NoSuchKey=1"))
    with pytest.raises(CommandFailed, match="NoSuchKey"):
        broken.up()
    assert broken.leftovers() == []


def test_a_cluster_ends_when_its_owner_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", OWNER], cwd=ROOT, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout
        folder, link = owner.stdout.readline().split()
        owner.kill()
    wait_until(lambda: leftovers(Path(folder), link) == [folder], 10, "nothing but files is left")
    shutil.rmtree(folder)
