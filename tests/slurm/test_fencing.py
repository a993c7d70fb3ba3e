"""Split brain: Slurm loses sight of a node whose ranks live on, write to the shared disk, and meet their successors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from launcher.attempts import latest_complete_step, next_attempt
from llm_dist.checkpoint import layout
from llm_dist.errors import Exit
from tests.e2e.commands import run as run_command
from tests.e2e.commands import state_at_end
from tests.slurm.cluster import Cluster
from tests.slurm.settings import Shape
from tests.slurm.submitted import LAUNCH, Submitted

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(480)]

WORDS = ("optim.total_steps=100000", "checkpoint.every_steps=50", "data.holdout=[]", "log.every_steps=100")
ONE_NODE = ("--nodes", "1", "--ranks-per-node", "2", "--time", "10")


def test_after_a_cut_cable_the_older_attempt_writes_nothing_more_and_the_end_is_the_undisturbed_one(
    start_cluster: Callable[[Shape], Cluster],
    run_file: Path,
    run_folder: Path,
    write_run_file: Callable[[Path], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    cluster = start_cluster(Shape(nodes=2, extra="SlurmdTimeout=5"))
    submitted = Submitted(cluster, run_file, run_folder)
    submitted.submit(*WORDS, "run.steps=100000", options=ONE_NODE)
    submitted.wait_for_step(50)
    [start] = submitted.starts()
    lost = cluster.node(start.nodes[0])
    lost.cut()
    stood = latest_complete_step(run_folder) or 0
    submitted.wait_for_step(stood + 50)  # it lives on and writes
    submitted.wait_for_requeue(seconds=60)
    submitted.wait_until(lambda: next_attempt(run_folder) == 3, 60, "the second attempt has begun")
    submitted.wait_until(lambda: not training(submitted, lost.name), 60, "the older ranks have ended by themselves")
    assert len(list(layout.list_complete(run_folder / "checkpoints"))) >= 2
    lost.heal()
    submitted.wait_for_step((latest_complete_step(run_folder) or 0) + 50)
    submitted.launch("stop", run_folder, "--wait", seconds=120)
    submitted.finish()
    failure = submitted.starts()[0].failure
    assert failure is not None and failure.code == Exit.SUPERSEDED
    steps = f"run.steps={latest_complete_step(run_folder)}"
    folder = tmp_path_factory.mktemp("undisturbed")
    assert run_command([*LAUNCH, "local", write_run_file(folder), "--ranks", "2", *WORDS, steps]).code == 0
    ours, theirs = state_at_end(run_folder), state_at_end(folder / "runs" / "tiny")
    assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == []


def training(submitted: Submitted, node: str) -> bool:
    return any("llm_dist train" in each.command for each in submitted.cluster.node(node).processes())
