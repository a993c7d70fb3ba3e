"""The batch script and what goes into it: rendered, for every kind of site."""

import subprocess
from pathlib import Path

import pytest

from launcher.slurm import controller, reasons, script
from launcher.slurm import site as sites
from launcher.slurm.script import Shape, Work, minutes_of
from launcher.slurm.site import Container, Site
from llm_dist.errors import UserError

WORK = Work(Path("/shared/runs/a"), Path("/shared/runs/a/code/1f"), Path("/home/me"), "/venv/bin/python", ["optim.lr"])
SHAPE = Shape(16, 8, 8, 96, 2 * 1440.0, partition="gpu", account="lab", exclude=["node7"], options=["--mem=0"])


def rendered(site=None, is_chained=False):
    text = script.render(SHAPE, WORK, site or Site(), "abc", is_chained)
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    return text.splitlines()


def test_a_script_says_all_that_was_asked_for_and_ends_as_the_supervisor() -> None:
    lines = rendered(Site(setup=("module load cuda/12.6",), environment={"NCCL_DEBUG": "WARN it"}, interface="ib0"))
    options = {line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")}
    assert options >= {
        *("--nodes=16", "--ntasks-per-node=1", "--cpus-per-task=96", "--gpus-per-node=8", "--time=2-00:00:00"),
        *("--signal=B:USR1@180", "--requeue", "--open-mode=append", "--partition=gpu", "--account=lab", "--mem=0"),
        *("--exclude=node7", "--comment=llm_dist:abc", "--output=/shared/runs/a/slurm/job_%j.log"),
    }
    assert "module load cuda/12.6" in lines and "export NCCL_DEBUG='WARN it'" in lines
    assert lines[-1].startswith(
        "exec /venv/bin/python -m launcher.slurm.supervise /shared/runs/a --nodes 16 --ranks-per-node 8"
    )
    assert lines[-1].endswith("--interface ib0 --accept optim.lr")


def test_a_folder_with_a_space_stays_one_word() -> None:
    work = Work(Path("/shared/my runs/a"), WORK.code, WORK.folder, WORK.python)
    text = script.render(SHAPE, work, Site(), "abc")
    assert '#SBATCH --output="/shared/my runs/a/slurm/job_%j.log"' in text
    assert "launcher.slurm.supervise '/shared/my runs/a' " in text


def test_jobs_of_a_chain_wait_for_one_another_and_are_not_requeued() -> None:
    lines = rendered(is_chained=True)
    assert "#SBATCH --no-requeue" in lines and "#SBATCH --dependency=singleton" in lines
    assert "--no-requeue" in lines[-1]


def test_containers_hold_the_ranks_and_never_slurm() -> None:
    pyxis = rendered(Site(container=Container(kind="pyxis", image="/images/a.sqsh", mounts=("/data:/data",))))
    assert "--step-option=--container-image=/images/a.sqsh" in pyxis[-1]
    assert "/shared/runs/a:/shared/runs/a" in pyxis[-1] and "/data:/data" in pyxis[-1]
    apptainer = rendered(Site(container=Container(kind="apptainer", image="a.sif", python="/opt/python")))
    assert "--wrapper-word=apptainer" in apptainer[-1] and "--python /opt/python" in apptainer[-1]
    for lines in (pyxis, apptainer):
        assert lines[-1].startswith("exec /venv/bin/python -m launcher.slurm.supervise")


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("90", 90), ("90:30", 90.5), ("1:30:00", 90), ("2-12", 3600), ("2-12:30", 3630), ("1-00:00:30", 1440.5)],
)
def test_time_limits_are_read_as_slurm_reads_them(text, minutes) -> None:
    assert minutes_of(text) == pytest.approx(minutes)
    assert controller.seconds_of(script.in_slurm_words(minutes)) == pytest.approx(minutes * 60)


@pytest.mark.parametrize("text", ["", "x", "1:2:3:4", "-5", "1-", "1.5"])
def test_other_time_limits_are_refused(text) -> None:
    with pytest.raises(UserError, match="--time"):
        minutes_of(text)


def test_a_mistake_in_a_site_profile_is_named(tmp_path) -> None:
    path = tmp_path / "site.toml"
    path.write_text("signal_second = 10\n")
    with pytest.raises(UserError, match="unknown key signal_second"):
        sites.load(path)
    path.write_text("signal_seconds = 10\n")
    with pytest.raises(UserError, match="signal_seconds=10"):
        sites.load(path)
    with pytest.raises(UserError, match="no such file"):
        sites.load(tmp_path / "none.toml")


def test_the_shipped_profile_holds_the_defaults(monkeypatch) -> None:
    assert sites.load(Path(__file__).parents[3] / "slurm" / "site.toml") == Site()


def test_what_an_outer_job_says_of_itself_reaches_no_job_submitted_from_inside() -> None:
    outer = {"SLURM_JOB_ID": "1", "SLURM_CPU_BIND": "x", "SBATCH_PARTITION": "p", "PMI_RANK": "0", "HOME": "/h"}
    assert controller.clean_environment({**outer, "SLURM_CONF": "/c"}) == {"HOME": "/h", "SLURM_CONF": "/c"}


@pytest.mark.parametrize(
    ("state", "reason", "words"),
    [
        ("PENDING", "Resources", "the nodes it needs are busy"),
        ("PENDING", "launch_failed_requeued_held", "llm-launch resume lets it go"),
        ("PENDING", "PartitionTimeLimit", "would wait for ever"),
        ("PENDING", "SomethingNew", "SomethingNew"),
        ("TIMEOUT", "", "reached its time limit"),
        ("STATE_OF_2030", "", "its job is STATE_OF_2030"),
    ],
)
def test_states_and_reasons_are_said_in_words(state, reason, words) -> None:
    assert words in reasons.in_words(controller.Job("1", "a", state, reason))


def test_an_unknown_state_counts_as_alive() -> None:
    assert controller.Job("1", "a", "STATE_OF_2030").is_alive
    assert not controller.Job("1", "a", "NODE_FAIL").is_alive
