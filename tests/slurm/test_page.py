"""What docs/slurm.md tells a newcomer to type is typed, in its order, on a real Slurm."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pages import ROOT, Block, blocks
from tests.slurm.cluster import Cluster
from tests.slurm.daemons import wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]

PREPARED = 4
"""Blocks of the first page that make what this one goes on from: text, tokenizer, shards, a run file."""


def typed(block: Block, cluster: Cluster, folder: Path) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{cluster.environment['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.text],
        cwd=folder,
        env={**cluster.environment, "PATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, f"line {block.line}:\n{block.text}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def no_jobs(cluster: Cluster) -> bool:
    return cluster.run("squeue", "--noheader", "--me") == ""


def test_every_command_of_the_page_runs(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "slurm").symlink_to(ROOT / "slurm")
    page = blocks(ROOT / "docs" / "getting-started.md")
    first = [block for block in page if block.language == "sh" and block.why_not_run is None]
    for block in first[:PREPARED]:
        typed(block, cluster, tmp_path)
    mine = [block for block in blocks(ROOT / "docs" / "slurm.md") if "test_page.py" in (block.why_not_run or "")]
    assert len(mine) == 5
    said = [typed(block, cluster, tmp_path) for block in mine]
    assert "#SBATCH --nodes=2" in said[0] and "runs/first" in said[1]
    wait_until(lambda: no_jobs(cluster), 120, "all jobs have ended")
    assert {path.name for path in (tmp_path / "parts").glob("part_*")} == {"part_0000", "part_0001", "part_0002"}
    again = typed(mine[-1], cluster, tmp_path)
    assert "all 3 tasks are finished" in again
    status = subprocess.run(
        [sys.executable, "-m", "launcher.cli", "status", "runs/first"],
        cwd=tmp_path,
        env=cluster.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "runs/first: finished" in status.stdout
