"""A test of real data or a real Slurm is skipped on a person's machine and may not be where CI=true."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TEST = """
import os, pytest

@pytest.mark.data
def test_reads(data_folder):
    assert (data_folder("corpus") / "text.txt").read_text() == "a text"

@pytest.mark.slurm
def test_starts_a_cluster():
    pytest.skip("no slurmctld")

def test_is_skipped():
    pytest.skip("needs something else")

def test_runs_on_one_thread_and_offline():
    assert (os.environ["OMP_NUM_THREADS"], os.environ["HF_HUB_OFFLINE"]) == ("1", "1")
"""


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    (tmp_path / "tests").mkdir()
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\nmarkers = ['data', 'slurm']\n")
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path / "tests")
    (tmp_path / "tests" / "test_it.py").write_text(TEST)
    return tmp_path


def run(suite: Path, **settings: str) -> str:
    kept = {name: value for name, value in os.environ.items() if name not in ("CI", "LLM_DIST_DATA")}
    command = [sys.executable, "-m", "pytest", "-rsf", "-p", "no:cacheprovider", "tests"]
    return subprocess.run(
        command, cwd=suite, env={**kept, **settings}, capture_output=True, text=True, check=False
    ).stdout


def test_what_is_missing_skips_and_says_what_to_set(suite: Path) -> None:
    said = run(suite)
    assert "1 passed, 3 skipped" in said
    assert "set LLM_DIST_DATA" in said


def test_what_is_missing_fails_where_nothing_may_be_skipped(suite: Path) -> None:
    said = run(suite, CI="true")
    assert "2 failed, 1 passed, 1 skipped" in said
    assert "may not be skipped" in said


def test_data_is_found_where_it_is_named(suite: Path) -> None:
    (suite / "corpora" / "corpus").mkdir(parents=True)
    (suite / "corpora" / "corpus" / "text.txt").write_text("a text")
    assert "2 passed, 1 skipped" in run(suite, CI="true", LLM_DIST_DATA=str(suite / "corpora"))
