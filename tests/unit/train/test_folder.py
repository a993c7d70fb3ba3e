"""Who may use a run folder, and what it says of itself."""

import json

import pytest

from llm_dist import config
from llm_dist.checkpoint.layout import Found
from llm_dist.errors import ResumeRefused, UserError
from llm_dist.train import folder as module
from llm_dist.train.folder import RunFolder

DATA = {"tokenizer": "e" * 64, "data.train": "d" * 64}


def run(tmp_path, *overrides):
    table = {
        "run": {"name": "tiny", "dir": str(tmp_path), "steps": 10},
        "model": {"layers": 1, "d_model": 8, "heads": 1},
        "data": {"train": "shards/train", "sequence_tokens": 8},
        "batch": {"tokens_per_step": 16},
    }
    return config.parse(table, overrides)


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "tiny")


@pytest.fixture
def tokenizer(tmp_path):
    path = tmp_path / "tokenizer"
    path.mkdir()
    (path / "tokenizer.json").write_text("{}")
    return path


def begin(folder, tokenizer, **record):
    return folder.begin_attempt({"accepted": [], **record}, DATA, tokenizer)


def test_a_new_run_keeps_its_schedule_when_it_is_made_longer(tmp_path, folder):
    assert folder.open(run(tmp_path), DATA, []).optim.total_steps == 10
    longer = folder.open(run(tmp_path, "run.steps=30"), DATA, [])
    assert (longer.run.steps, longer.optim.total_steps) == (30, 10)
    assert config.load(folder.path) == longer


def test_logs_may_be_there_first_and_anything_else_may_not(tmp_path, folder):
    (folder.path / "logs").mkdir(parents=True)
    folder.open(run(tmp_path), DATA, [])
    other = RunFolder(tmp_path / "other")
    other.path.mkdir()
    (other.path / "notes.txt").touch()
    with pytest.raises(UserError, match=r"exists and is not a run folder; choose another run\.name"):
        other.open(run(tmp_path, "run.name=other"), DATA, [])


def test_another_run_or_other_data_is_refused_and_nothing_is_written(tmp_path, folder, tokenizer):
    folder.open(run(tmp_path), DATA, [])
    begin(folder, tokenizer)
    before = folder.config.read_text()
    with pytest.raises(ResumeRefused, match=r"model\.layers was 1 and is now 2"):
        folder.open(run(tmp_path, "model.layers=2", "run.steps=20"), DATA, [])
    other = run(tmp_path, "data.train=elsewhere", "run.steps=20")
    for changed, words in (
        (
            {"data.train": "7" * 64},
            "source train of data.train has fingerprint 777777777777, but the run's had dddddddddddd",
        ),
        ({"tokenizer": "7" * 64}, "the tokenizer has fingerprint 777777777777, but the run's had eeeeeeeeeeee"),
    ):
        with pytest.raises(ResumeRefused) as caught:
            folder.open(other, {**DATA, **changed}, [])
        assert str(caught.value) == f"{words}; restore it or choose another run.name"
    assert folder.config.read_text() == before
    folder.open(run(tmp_path, "data.train=elsewhere"), DATA, [])  # the same data may lie elsewhere


def test_sources_may_join_and_none_may_leave(tmp_path, folder, tokenizer):
    two = 'data.train={train="shards/train", more="shards/more"}'
    mixture = "data.mixture=[{from_step=0, weights={train=1}}, {from_step=5, weights={more=1}}]"
    folder.open(run(tmp_path), DATA, [])
    begin(folder, tokenizer)
    joined = {**DATA, "data.more": "a" * 64}
    folder.open(run(tmp_path, two, mixture), joined, ["data.mixture"])
    folder.begin_attempt({"accepted": ["data.mixture"]}, joined, tokenizer)
    before = folder.config.read_text()
    with pytest.raises(ResumeRefused, match=r"^source more of data\.train has fingerprint 777777777777, but "):
        folder.open(run(tmp_path, two, mixture), {**joined, "data.more": "7" * 64}, [])
    with pytest.raises(ResumeRefused, match=r"^source train of data\.train is missing, but the run read it; "):
        folder.open(run(tmp_path, two, mixture), {key: joined[key] for key in ("tokenizer", "data.more")}, [])
    assert folder.config.read_text() == before


def test_the_latest_checkpoint_says_how_far_the_past_reaches(tmp_path, folder, tokenizer, monkeypatch):
    two = 'data.train={train="shards/train", more="shards/more"}'
    begins = "{from_step=0, weights={train=1}}"
    folder.open(run(tmp_path, two, f"data.mixture=[{begins}]"), DATA, [])
    monkeypatch.setattr(module.layout, "latest", lambda _: Found(6, folder.checkpoints))
    for first in (5, 6):
        changed = run(tmp_path, two, f"data.mixture=[{begins}, {{from_step={first}, weights={{more=1}}}}]")
        if first < 6:
            with pytest.raises(ResumeRefused, match=r"^data\.mixture: 6 steps are finished"):
                folder.open(changed, DATA, ["data.mixture"])
        else:
            assert folder.open(changed, DATA, ["data.mixture"]).data.mixture[1].from_step == 6


def test_attempts_are_numbered_and_taken_once(tmp_path, folder, tokenizer, monkeypatch):
    folder.open(run(tmp_path), DATA, [])
    assert begin(folder, tokenizer) == 1
    (folder.attempts / "attempt_0007.json").write_text("{}")
    assert begin(folder, tokenizer, accepted=["optim.lr"]) == 8
    record = json.loads((folder.attempts / "attempt_0008.json").read_text())
    assert (record["attempt"], record["accepted"]) == (8, ["optim.lr"])
    assert record["host"]
    monkeypatch.setattr(type(folder.attempts), "glob", lambda *_: iter(()))  # another has taken 1, unseen
    assert begin(folder, tokenizer) == 2


def test_the_run_keeps_its_tokenizer_and_what_it_was_made_from(tmp_path, folder, tokenizer):
    folder.open(run(tmp_path), DATA, [])
    (folder.path / "tokenizer.tmp").mkdir()  # a kill left it
    begin(folder, tokenizer)
    assert (folder.tokenizer / "tokenizer.json").read_text() == "{}"
    source = json.loads(folder.source.read_text())
    assert source["fingerprints"] == DATA
    assert source["versions"]["torch"]
    assert source["host"]


def test_code_outside_of_a_checkout_has_no_commit_of_a_strangers_repository(tmp_path, folder, tokenizer, monkeypatch):
    monkeypatch.setattr(module, "__file__", str(tmp_path / "site-packages" / "folder.py"))
    (tmp_path / "site-packages").mkdir()
    folder.open(run(tmp_path), DATA, [])
    begin(folder, tokenizer)
    source = json.loads(folder.source.read_text())
    assert (source["commit"], source["diff"]) == (None, None)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/tiny: cannot write the run folder: .*; choose another run\.dir"):
        RunFolder(tmp_path / "file" / "tiny").open(run(tmp_path), DATA, [])
