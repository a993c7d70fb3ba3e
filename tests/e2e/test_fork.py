"""A fork goes on from a step of its parent as the parent would, or otherwise, and leaves the parent as it was."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from llm_dist import config, optim
from llm_dist.checkpoint import layout
from llm_dist.metrics import read
from tests.e2e.commands import LAUNCH, Said, llm_dist, losses, run, state_at_end

pytestmark = pytest.mark.e2e

FORK = (*LAUNCH[:-1], "fork")


@pytest.fixture(scope="module")
def parent(tmp_path_factory, write_run_file) -> Path:
    """A finished run of 8 steps with checkpoints at 2, 4, 6 and 8 and step 3 and 7 left out. Tests only read it."""
    folder = tmp_path_factory.mktemp("parent")
    run_file = write_run_file(folder)
    words = ("checkpoint.every_steps=2", "checkpoint.keep_last=9", "eval.every_steps=4", "optim.schedule=wsd")
    assert llm_dist("train", run_file, *words, "run.steps=2", "optim.total_steps=8").code == 0
    skipped = folder / "runs" / "tiny" / "skipped.jsonl"
    skipped.write_text("".join(json.dumps({"step": step, "why": "it was bad"}) + "\n" for step in (3, 7)))
    assert llm_dist("train", run_file, *words, "run.steps=8", "optim.total_steps=8").code == 0
    return folder / "runs" / "tiny"


def fork(parent: Path, out: Path, *words: object) -> Said:
    return run([*FORK, parent, "--out", out, *words])


def contents(folder: Path) -> dict[Path, tuple[bytes, int]]:
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def test_a_fork_that_changes_nothing_goes_on_bit_for_bit_and_the_parent_is_untouched(parent, tmp_path):
    before = contents(parent)
    out = tmp_path / "runs" / "same"
    assert fork(parent, out, "--step", "4", "--json").json == {
        "run": str(out),
        "parent": str(parent),
        "step": 4,
        "steps": 8,
        "changed": [],
    }
    assert [found.step for found in layout.list_complete(out / "checkpoints")] == [4]
    assert [json.loads(line)["step"] for line in (out / "skipped.jsonl").read_text().splitlines()] == [3]
    with (out / "skipped.jsonl").open("a") as file:  # the parent's own future, for the comparison
        file.write(json.dumps({"step": 7, "why": "it was bad"}) + "\n")
    said = llm_dist("train", out)
    assert said.code == 0 and "resumed at step 4 of 8 steps" in said.err, said.err
    assert losses(out) == {step: loss for step, loss in losses(parent).items() if step > 4}
    ours, theirs = state_at_end(out), state_at_end(parent)
    assert all(ours[key].equal(theirs[key]) for key in theirs)
    assert contents(parent) == before


def test_what_it_is_made_from_is_recorded_and_stays(parent, tmp_path):
    out = tmp_path / "runs" / "fork"
    said = fork(parent, out, "run.steps=9")
    assert said.out == f"{out}: {parent} from step 8 on, to step 9, with other run.steps\n"
    manifest = json.loads((parent / "checkpoints" / "step_00000008" / "manifest.json").read_text())
    origin = {"run": str(parent), "step": 8, "fingerprint": manifest["checksum"]}
    assert json.loads((out / "source.json").read_text())["forked_from"] == origin
    assert llm_dist("train", out).code == 0
    assert json.loads((out / "source.json").read_text())["forked_from"] == origin
    status = run([*LAUNCH[:-1], "status", out])
    assert f"forked from {parent} at step 8" in status.out
    assert {path.name for path in out.parent.iterdir()} == {"fork"}


def test_annealing_follows_its_own_curve(parent, tmp_path):
    out = tmp_path / "annealed"
    words = ("run.steps=10", "optim.total_steps=10", "optim.warmup_steps=0")
    words += ("optim.schedule=wsd", "optim.decay_fraction=0.6", "optim.final_lr_fraction=0.0")
    assert fork(parent, out, "--step", "4", *words).code == 0
    assert llm_dist("train", out).code == 0
    rates = {line["step"]: line["lr"] for line in read(out / "metrics.jsonl") if "lr" in line}
    peak = 3e-3
    assert rates == pytest.approx({5 + done: peak * (1 - done / 6) for done in range(6)})
    own = config.load(out)
    assert [optim.learning_rate(own, step) for step in range(4, 10)] == list(rates.values())


def test_another_future_mixture_and_another_holdout(parent, shards, tmp_path):
    out = tmp_path / "mixed"
    both = f'data.train={{train="{shards}/train", more="{shards}/holdout"}}'
    mixture = "data.mixture=[{from_step=0, weights={train=1}}, {from_step=4, weights={train=1, more=1}}]"
    said = fork(parent, out, "--step", "4", both, mixture, f'data.holdout="{shards}/train"', "eval.max_sequences=4")
    assert said.code == 0, said.err
    trajectory = layout.read_manifest(layout.find(out).folder).trajectory
    assert (trajectory["best_step"], trajectory["evaluated_step"], trajectory["step"]) == (None, None, 4)
    said = llm_dist("train", out)
    assert said.code == 0, said.err
    assert "step 4: train loss" in said.err  # the new holdout is scored where the fork begins
    sources = [line["sources"]["more"]["tokens"] for line in read(out / "metrics.jsonl") if "sources" in line]
    assert sources[0] > 0


@pytest.mark.parametrize(
    ("words", "mistake"),
    [
        (["--step", "5"], "{parent} has no complete checkpoint of step 5; it has 2, 4, 6, 8"),
        (["model.d_ff=128"], "model.d_ff was 64 and is now 128: that is another run; a fork has the parent's;"),
        (["run.seed=4"], "run.seed was 3 and is now 4: that is another run; a fork has the parent's;"),
        (["run.name=x"], "run.name follows from --out {out}; leave it away"),
        (["optim.lr=0"], "optim.lr=0: input should be greater than 0"),
    ],
    ids=["no such step", "identity", "seed", "name", "value"],
)
def test_a_mistake_is_one_line_and_makes_nothing(parent, tmp_path, words, mistake):
    out = tmp_path / "fork"
    assert mistake.format(parent=parent, out=out) in fork(parent, out, *words).mistake
    assert list(tmp_path.iterdir()) == []


def test_a_past_segment_of_the_mixture_is_refused(parent, shards, tmp_path):
    both = f'data.train={{train="{shards}/train", more="{shards}/holdout"}}'
    mixture = "data.mixture=[{from_step=0, weights={train=1}}, {from_step=2, weights={more=1}}]"
    mistake = fork(parent, tmp_path / "fork", "--step", "4", both, mixture).mistake
    assert "data.mixture: 4 steps are finished" in mistake
    assert list(tmp_path.iterdir()) == []


def test_it_never_writes_into_what_exists(parent, tmp_path):
    assert "exists; a fork is a new run folder, name another" in fork(parent, tmp_path).mistake
    assert "exists; a fork is a new run folder, name another" in fork(parent, parent).mistake


def test_a_damaged_checkpoint_is_named_and_nothing_is_made(parent, tmp_path):
    copy = tmp_path / "copy"
    assert fork(parent, copy, "--step", "8").code == 0
    damaged = copy / "checkpoints" / "step_00000008" / "rank_00000.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1000] ^= 1
    damaged.unlink()  # the parent's own file has another link
    damaged.write_bytes(content)
    mistake = fork(copy, tmp_path / "fork").mistake
    assert mistake.startswith(f"{damaged}: piece ") and mistake.endswith(
        "the checkpoint is damaged, choose another step"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_a_folder_without_a_checkpoint_or_run_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "is not a run folder" in fork(tmp_path / "empty", tmp_path / "fork").mistake


def test_where_hard_links_are_impossible_it_copies(parent, tmp_path, monkeypatch):
    from launcher import fork as module

    def refuse(*_: object) -> None:
        raise OSError("no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    module.fork(parent, tmp_path / "copied", None, [])
    monkeypatch.undo()
    module.fork(parent, tmp_path / "linked", None, [])
    name = "checkpoints/step_00000008/rank_00000.safetensors"
    assert not (tmp_path / "copied" / name).samefile(parent / name)
    assert (tmp_path / "linked" / name).samefile(parent / name)
    assert_same_state(tmp_path / "copied", parent)


def assert_same_state(run_folder: Path, other: Path) -> None:
    ours, theirs = state_at_end(run_folder), state_at_end(other)
    assert ours.keys() == theirs.keys() and all(ours[key].equal(theirs[key]) for key in theirs)
