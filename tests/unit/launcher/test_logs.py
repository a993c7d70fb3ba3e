"""What `llm-launch logs` and `list` show, and which run is meant where none is named."""

import subprocess
import sys
import time

import pytest

from launcher import listing, logs
from llm_dist.errors import UserError

RUN = '{{"run": {{"name": "{name}", "steps": 4}}, "model": {{"layers": 1, "d_model": 8, "heads": 2}}, \
"data": {{"train": "x", "sequence_tokens": 8}}, "batch": {{"tokens_per_step": 8, "sequences_per_micro_batch": 1}}, \
"optim": {{"lr": 0.1}}}}'


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "runs" / "a")


def make_run(folder):
    (folder / "logs").mkdir(parents=True)
    (folder / "config.json").write_text(RUN.format(name=folder.name))
    (folder / "logs" / "rank_00000.log").write_text("one\ntwo\nthree\n")
    return folder


def test_the_newest_lines_are_shown(run, capsys) -> None:
    logs.show(logs.path_of(run, 0), 2, is_followed=False)
    assert capsys.readouterr() == ("two\nthree\n", "")


def test_what_is_followed_comes_on_standard_output_and_without_a_gap(run) -> None:
    command = [sys.executable, "-m", "launcher.cli", "logs", str(run), "-f", "-n", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as follower:
        assert follower.stdout is not None
        assert follower.stdout.readline() == "three\n"
        with (run / "logs" / "rank_00000.log").open("a") as log:
            log.write("four\n")
        began = time.monotonic()
        assert follower.stdout.readline() == "four\n"
        assert time.monotonic() - began < 10
        follower.terminate()


def test_a_rank_without_a_log_is_refused_with_those_that_have_one(run) -> None:
    with pytest.raises(UserError, match=r"rank_00007\.log does not exist: ranks 0 to 0 have one"):
        logs.path_of(run, 7)
    with pytest.raises(UserError, match="no Slurm job of it has begun"):
        logs.path_of(run, None)


def test_the_newest_run_is_meant_where_none_is_named(run, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert listing.meant(tmp_path / "named") == tmp_path / "named"
    assert listing.meant(None).name == "a"
    monkeypatch.chdir(run)
    assert listing.meant(None) == run
    monkeypatch.chdir(tmp_path / "runs" / "a" / "logs")
    with pytest.raises(UserError, match="name a run folder"):
        listing.meant(None)


def test_every_run_of_a_folder_has_a_line(run, tmp_path) -> None:
    make_run(tmp_path / "runs" / "b")
    (tmp_path / "runs" / "no-run").mkdir()
    lines = [listing.line_of(each, "") for each in listing.statuses(tmp_path / "runs")]
    assert sorted(line.split()[0].rpartition("/")[2] for line in lines) == ["a", "b"]
    assert all("not started" in line and "0/4" in line for line in lines)
    with pytest.raises(UserError, match="no such folder"):
        listing.statuses(tmp_path / "nowhere")
