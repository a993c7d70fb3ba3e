"""An array job that tokenizes: how files are shared out, and what is refused before it is queued."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.slurm import controller, data_job
from launcher.slurm.controller import Job
from launcher.slurm.data_job import Wanted, part_folder, prepare, ranges, shares
from launcher.slurm.site import Site
from llm_dist import tokenizer_training
from llm_dist.errors import UserError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    tokenizer_training.train(iter(["the quick brown fox " * 50] * 20), "byte-bpe", 270, folder)
    return folder


@pytest.fixture
def wanted(tmp_path, tokenizer):
    for number, size in enumerate((5000, 100, 3000, 2500)):
        (tmp_path / f"{number}.txt").write_text("a" * size)
    return Wanted([str(tmp_path / "*.txt")], tokenizer, tmp_path / "out", tasks=2)


def test_files_are_shared_out_by_size_and_no_task_is_without_one() -> None:
    assert shares({"a": 50, "b": 1, "c": 30, "d": 25}, 2) == [["a", "b"], ["c", "d"]]
    assert shares({"a": 1, "b": 2}, 8) == [["b"], ["a"]]


def test_numbers_are_written_as_slurm_writes_them() -> None:
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
    assert ranges([3]) == "3"


def test_only_what_is_missing_is_queued(wanted, tmp_path) -> None:
    assert prepare(wanted, Site(), tmp_path).missing == (0, 1)
    done = part_folder(wanted.out, 0) / "train" / "dataset.json"
    done.parent.mkdir(parents=True)
    done.write_text("{}")
    plan = prepare(wanted, Site(), tmp_path)
    assert plan.missing == (1,)
    assert "#SBATCH --array=1\n" in plan.script


def test_other_inputs_for_the_same_folder_are_refused(wanted, tmp_path) -> None:
    wanted.out.mkdir()
    (wanted.out / "tasks.json").write_text(json.dumps({"inputs": []}))
    with pytest.raises(UserError, match=r"holds tasks of another .*inputs.*; choose another --out"):
        prepare(wanted, Site(), tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"inputs": ["/no/such/file.txt"]}, "no such file"),
        ({"inputs": ["-"]}, "standard input cannot be shared out"),
        ({"tokenizer": "/no/tokenizer"}, "/no/tokenizer"),
        ({"holdout": 1.5}, "--holdout 1.5"),
    ],
)
def test_what_no_task_could_do_is_refused_before_the_queue(wanted, tmp_path, change, words) -> None:
    change = {name: Path(value) if name == "tokenizer" else value for name, value in change.items()}
    with pytest.raises(UserError, match=words):
        prepare(replace(wanted, **change), Site(), tmp_path)
    assert not wanted.out.exists()


def test_a_folder_that_is_being_filled_gets_no_second_job(wanted, tmp_path, monkeypatch) -> None:
    plan = prepare(wanted, Site(), tmp_path)
    [line] = [line for line in plan.script.splitlines() if "--comment=" in line]
    queued = Job("7_[0-1]", "llm_dist-tokenize-out", "PENDING", "Resources", comment=line.partition("--comment=")[2])
    monkeypatch.setattr(controller, "own_jobs", lambda: [queued])
    with pytest.raises(UserError, match=r"has job 7_\[0-1\] already, which waits in the queue"):
        data_job.submit(plan, wanted, Site())
