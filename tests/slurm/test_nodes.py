"""Nodes that fail the check before the ranks start: named, kept out, replaced by a spare or by Slurm."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.slurm import starts
from tests.slurm.cluster import Cluster
from tests.slurm.submitted import Submitted

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(240)]

WORDS = ("run.steps=20", "data.holdout=[]")
SLOW_CLOCK = "import time\nhonest = time.time\ntime.time = lambda: honest() - 3600\n"


@pytest.fixture
def submitted(cluster: Cluster, run_file: Path, run_folder: Path) -> Submitted:
    made = Submitted(cluster, run_file, run_folder)
    # Python looks first into a folder that every node has for itself.
    made.site.write_text('signal_seconds = 60\nsetup = ["export PYTHONPATH=/var/tmp:$PYTHONPATH"]\n')
    return made


@pytest.fixture
def late(cluster: Cluster, tmp_path: Path):
    """node2's clock is an hour late, as far as its Python can tell."""
    cluster.node("node2").execute("sh", "-c", f"printf %s '{SLOW_CLOCK}' > /var/tmp/sitecustomize.py")
    yield "node2"
    cluster.node("node2").execute("rm", "/var/tmp/sitecustomize.py")


def test_a_spare_takes_the_place_of_a_node_whose_clock_is_wrong(submitted, late) -> None:
    submitted.submit(*WORDS, options=["--nodes", "2", "--ranks-per-node", "1", "--spares", "1", "--time", "10"])
    submitted.finish()
    [start] = submitted.starts()
    assert start.nodes == ("node1", "node3")
    [excluded] = json.loads((submitted.run / "slurm" / "excluded.json").read_text())
    assert excluded["node"] == late and "clock" in excluded["reason"]
    assert f"{late} is kept out" in submitted.log()
    [report] = submitted.run.glob("preflight/*/network/rank_00000.json")
    assert json.loads(report.read_text())["links"].keys() == {"1"}, "the network was checked between the nodes chosen"
    script = submitted.launch(
        *("slurm", submitted.run, "--nodes", "2", "--ranks-per-node", "1", "--time", "10", "--dry-run"),
        *("--site", submitted.site, "run.steps=30"),
    )
    assert f"#SBATCH --exclude={late}" in script


def test_the_network_between_three_sound_nodes_has_no_faults(submitted) -> None:
    submitted.submit(*WORDS, "plan.max_waste=0.2", options=["--nodes", "3", "--ranks-per-node", "1", "--time", "10"])
    submitted.finish()
    [start] = submitted.starts()
    assert start.nodes == ("node1", "node2", "node3")
    reports = [json.loads(path.read_text()) for path in submitted.run.glob("preflight/*/network/rank_*.json")]
    assert sorted(len(report["links"]) for report in reports) == [2, 2, 2]


def test_without_a_spare_the_job_is_queued_again_and_gets_other_nodes(submitted, late, cluster) -> None:
    submitted.submit(
        *WORDS,
        "plan.max_waste=0.2",
        options=["--nodes", "3", "--ranks-per-node", "1", "--time", "10"],
    )
    submitted.wait_until((submitted.run / "slurm" / "excluded.json").exists, 60, "node2 is kept out")
    submitted.wait_for_state("PENDING")
    submitted.wait_until(lambda: cluster.job(submitted.job)["ExcNodeList"] == late, 30, "Slurm knows")
    assert starts.read_all(submitted.run) == []
    cluster.run("scancel", submitted.job)
    submitted.wait_until(lambda: not submitted.left_behind(), 30, "nothing is left")
