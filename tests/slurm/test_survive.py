"""Whatever happens to a job on a real Slurm, its run ends bit for bit as the one that was never disturbed.

The undisturbed run is trained on this machine, without Slurm: same ranks, same bits.
"""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from launcher.attempts import latest_complete_step
from tests.e2e.commands import run as run_command
from tests.e2e.commands import state_at_end
from tests.slurm.cluster import Cluster
from tests.slurm.settings import Shape
from tests.slurm.submitted import LAUNCH, RANKS, Submitted

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(240)]

WORDS = ("run.steps=300", "checkpoint.every_steps=25", "data.holdout=[]", "log.every_steps=50")
LONG = ("run.steps=300", "checkpoint.every_steps=300", "data.holdout=[]", "log.every_steps=50")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, write_run_file: Callable[[Path], Path]) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    said = run_command([*LAUNCH, "local", write_run_file(folder), "--ranks", "2", *WORDS])
    assert said.code == 0, said.err
    return folder / "runs" / "tiny"


@pytest.fixture
def submitted(cluster: Cluster, run_file: Path, run_folder: Path) -> Iterator[Submitted]:
    yield Submitted(cluster, run_file, run_folder)
    cluster.run("scancel", "--me")  # one test that fails is not to take the nodes from the next


def assert_same_end(submitted: Submitted, undisturbed: Path) -> None:
    submitted.finish()
    ours, theirs = state_at_end(submitted.run), state_at_end(undisturbed)
    assert ours.keys() == theirs.keys()
    assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == []


def test_a_job_trains_on_its_nodes_with_the_code_it_was_submitted_with(cluster, tmp_path, write_run_file, undisturbed):
    folder = tmp_path / "with a space"
    folder.mkdir()
    submitted = Submitted(cluster, write_run_file(folder), folder / "runs" / "tiny")
    submitted.submit(*WORDS)
    assert_same_end(submitted, undisturbed)
    [start] = submitted.starts()
    assert (start.action, len(start.nodes)) == ("finish", 2)
    assert Path(start.code).parent == submitted.run / "code"
    for rank, node in enumerate(start.nodes):
        assert f"rank {rank} of 2 | {node} |" in (submitted.run / "logs" / f"rank_{rank:05d}.log").read_text()
    found = submitted.status()
    assert (found["state"], found["slurm"]["state"]) == ("finished", "COMPLETED")


def test_warned_of_the_time_limit_it_saves_requeues_itself_and_goes_on(submitted, undisturbed) -> None:
    submitted.submit(*WORDS)
    submitted.wait_for_step(25)
    submitted.cluster.run("scancel", "--batch", "--signal=USR1", submitted.job)  # as Slurm does before the limit
    submitted.wait_for_requeue()
    stood = latest_complete_step(submitted.run)
    assert (
        "may start in about two minutes" in submitted.status()["slurm"]["words"] or submitted.status()["step"] == stood
    )
    assert_same_end(submitted, undisturbed)
    assert submitted.actions() == ["requeue", "finish"]
    assert submitted.starts()[1].step_before == stood
    assert (
        "asked to end (limit)" in submitted.log()
        and "=== attempt 1" in (submitted.run / "logs/rank_00000.log").read_text()
    )


def test_slurm_itself_warns_before_the_limit_and_nothing_is_lost(submitted) -> None:
    submitted.submit(
        *("run.steps=100000", "checkpoint.every_steps=100000", "data.holdout=[]", "log.every_steps=1000"),
        options=["--nodes", "2", "--ranks-per-node", "1", "--time", "2"],
    )
    submitted.wait_for_state("RUNNING")
    submitted.wait_for_state("PENDING", seconds=130)
    assert (latest_complete_step(submitted.run) or 0) > 0
    assert submitted.actions() == ["requeue"] and "asked to end (limit)" in submitted.log()
    submitted.cluster.run("scancel", submitted.job)


def test_preempted_it_saves_and_makes_way(submitted, undisturbed) -> None:
    cluster = submitted.cluster
    submitted.submit(*WORDS, options=[*RANKS, "--partition", "spot"])
    submitted.wait_for_step(25)
    other = cluster.run(
        "sbatch", "--parsable", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1"
    ).strip()
    cluster.wait_for_state(other, "COMPLETED", 60)
    submitted.wait_for_requeue()
    assert_same_end(submitted, undisturbed)
    assert submitted.actions()[-1] == "finish"


def test_preempted_where_the_site_sends_the_users_signal_it_makes_way_by_itself(
    start_cluster: Callable[[Shape], Cluster], run_file: Path, run_folder: Path, undisturbed
) -> None:
    cluster = start_cluster(Shape(nodes=2, extra="SlurmctldParameters=preempt_send_user_signal"))
    submitted = Submitted(cluster, run_file, run_folder)
    submitted.submit(*WORDS, options=[*RANKS, "--partition", "spot"])
    submitted.wait_for_step(25)
    other = cluster.run("sbatch", "--parsable", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1")
    cluster.wait_for_state(other.strip(), "COMPLETED", 60)
    submitted.wait_for_requeue()
    assert_same_end(submitted, undisturbed)
    assert "asked to end (limit)" in submitted.log() and submitted.actions() == ["requeue", "finish"]


def test_requeued_by_hand_it_goes_on(submitted, undisturbed) -> None:
    submitted.submit(*WORDS)
    submitted.wait_for_step(25)
    submitted.cluster.run("scontrol", "requeue", submitted.job)
    submitted.wait_for_requeue()
    assert_same_end(submitted, undisturbed)


def test_stopped_it_saves_ends_and_resumes_when_asked(submitted, undisturbed) -> None:
    submitted.submit(*WORDS)
    submitted.wait_for_step(25)
    assert "was asked to save and end" in submitted.launch("stop", submitted.run)
    assert submitted.wait_for_state("COMPLETED")["ExitCode"] == "0:0"
    stood = latest_complete_step(submitted.run)
    assert submitted.actions() == ["leave"] and submitted.status()["state"] == "not running"
    submitted.launch("resume", submitted.run, "--site", submitted.site)
    submitted.job = submitted.status()["slurm"]["job"]
    assert_same_end(submitted, undisturbed)
    assert submitted.starts()[1].step_before == stood


def test_cancelled_it_stays_ended_and_nothing_acknowledged_is_lost(submitted, undisturbed) -> None:
    submitted.submit(*WORDS)
    submitted.wait_for_step(25)
    submitted.cluster.run("scancel", submitted.job)
    submitted.wait_for_state("CANCELLED")
    submitted.wait_until(lambda: not submitted.left_behind(), 30, "nothing is left on the nodes")
    assert "was cancelled" in submitted.status()["slurm"]["words"]
    submitted.launch("resume", submitted.run, "--site", submitted.site)
    submitted.job = submitted.status()["slurm"]["job"]
    assert_same_end(submitted, undisturbed)


def test_a_killed_rank_is_named_and_all_start_again_on_the_same_nodes(submitted, undisturbed) -> None:
    submitted.submit(*WORDS)
    submitted.wait_for_step(25)
    submitted.kill_rank("node2")
    assert_same_end(submitted, undisturbed)
    assert submitted.actions() == ["restart", "finish"]
    failure = submitted.starts()[0].failure
    assert failure is not None and (failure.rank, failure.node, failure.cause) == (1, "node2", "killed by SIGKILL")
    assert submitted.cluster.job(submitted.job)["Restarts"] == "0"


def test_a_stopped_rank_is_found_named_and_all_start_again(submitted, undisturbed) -> None:
    submitted.submit(*WORDS, "watch.hang_seconds=4")
    submitted.wait_for_step(25)
    submitted.kill_rank("node2", signal.SIGSTOP)
    assert_same_end(submitted, undisturbed)
    failure = submitted.starts()[0].failure
    assert failure is not None and (failure.rank, failure.node) == (1, "node2")
    assert "hang: rank 1" in failure.cause


def test_a_node_at_fault_in_two_hangs_running_is_kept_out(submitted, undisturbed) -> None:
    submitted.submit(*WORDS, "watch.hang_seconds=4")
    for count in (1, 2):
        submitted.wait_until(lambda count=count: len(submitted.starts()) == count, 90, f"start {count}")
        submitted.wait_for_rank("node2")
        submitted.wait_for_sign_of_life()
        submitted.wait_for_step(count)
        submitted.kill_rank("node2", signal.SIGSTOP)
    submitted.wait_for_state("PENDING", seconds=90)
    submitted.wait_until(lambda: submitted.cluster.job(submitted.job)["ExcNodeList"] == "node2", 5, "Slurm knows")
    submitted.wait_for_requeue()
    assert_same_end(submitted, undisturbed)
    assert submitted.actions() == ["restart", "requeue", "finish"]
    assert submitted.starts()[-1].nodes == ("node1", "node3")


@pytest.mark.parametrize("place", [1, 0], ids=["worker", "batch-host"])
def test_a_node_without_power_is_left_and_the_run_goes_on_elsewhere(submitted, undisturbed, place) -> None:
    submitted.submit(*WORDS)
    submitted.wait_for_step(25)
    lost = submitted.starts()[0].nodes[place]
    node = submitted.cluster.node(lost)
    node.power_off()
    submitted.wait_for_requeue(seconds=120)
    assert_same_end(submitted, undisturbed)
    assert lost not in submitted.starts()[-1].nodes
    node.power_on()
    submitted.wait_until(lambda: is_idle(submitted.cluster, lost), 60, f"{lost} is idle")


def test_a_killed_slurmstepd_ends_in_a_restart_or_in_order(submitted, undisturbed) -> None:
    submitted.submit(*WORDS)
    submitted.wait_for_step(25)
    daemons = [each for each in submitted.cluster.node("node2").processes() if each.command.startswith("slurmstepd")]
    assert daemons
    for each in daemons:
        subprocess.run(["kill", "-KILL", str(each.pid)], check=True)
    assert_same_end(submitted, undisturbed)


def test_three_failures_without_progress_end_it_for_good(submitted) -> None:
    submitted.submit(*LONG)
    for count in range(1, 4):
        submitted.wait_until(lambda count=count: len(submitted.starts()) == count, 60, f"start {count}")
        submitted.wait_for_rank("node2")
        submitted.wait_for_sign_of_life()
        submitted.kill_rank("node2")
    found = submitted.wait_for_state("FAILED")
    assert found["ExitCode"] == "1:0"
    assert submitted.actions() == ["restart", "restart", "give up"]
    assert "gave up after 3 failures in a row" in submitted.log()
    status = submitted.status()["slurm"]
    assert status["failure"]["node"] == "node2" and status["last_action"] == "give up"
    submitted.wait_until(lambda: not submitted.left_behind(), 30, "nothing is left on the nodes")


def test_a_chain_goes_on_where_requeueing_is_forbidden_and_ends_with_the_run(submitted, undisturbed) -> None:
    submitted.submit(*WORDS, options=[*RANKS, "--chain", "3"])
    first = int(submitted.job)
    submitted.wait_for_step(25)
    submitted.cluster.run("scancel", "--batch", "--signal=USR1", str(first))
    submitted.wait_for_state("COMPLETED")
    submitted.job = str(first + 1)
    assert_same_end(submitted, undisturbed)
    submitted.job = str(first + 2)
    assert submitted.wait_for_state("CANCELLED")["Restarts"] == "0"
    assert submitted.actions() == ["requeue", "finish"]


def is_idle(cluster: Cluster, name: str) -> bool:
    return cluster.run("sinfo", "--noheader", "--partition=main", f"--nodes={name}", "--format=%T").strip() == "idle"
