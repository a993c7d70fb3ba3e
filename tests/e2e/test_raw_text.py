"""Straight from raw text: shards are made in the cache when a run starts, once per content."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llm_dist.data import tokenize as tokenizing
from tests.e2e.commands import LAUNCH, llm_dist, losses, run

pytestmark = pytest.mark.e2e


@pytest.fixture
def text(corpus: Path, tmp_path: Path) -> Path:
    """The corpus as plain text, a blank line between documents."""
    path = tmp_path / "x.txt"
    documents = [json.loads(line)["text"] for line in corpus.read_text(encoding="utf-8").splitlines()]
    path.write_text("\n\n".join(document.replace("\n\n", "\n") for document in documents), encoding="utf-8")
    return path


@pytest.fixture
def words(text: Path, tokenizer: Path, tmp_path: Path) -> tuple[str, ...]:
    """Overrides of a run on it."""
    cache = f"data.cache={tmp_path}/cache"
    return f"data.train={text}", f"data.tokenizer={tokenizer}", cache, "data.split=blank-line", "data.holdout=[]"


def in_cache(tmp_path: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file()}


def test_a_run_on_raw_text_trains_and_goes_on_from_what_it_made(
    run_file: Path, run_folder: Path, words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = llm_dist("train", run_file, *words, "run.steps=2", "optim.total_steps=8")
    assert said.code == 0, said.err
    before = in_cache(tmp_path)
    monkeypatch.setattr(tokenizing, "tokenize", lambda *_, **__: pytest.fail("made anew"))
    said = llm_dist("train", run_folder, "run.steps=4")
    assert said.code == 0, said.err
    assert "attempt 2: resumed at step 2 of 4 steps" in said.err
    assert sorted(losses(run_folder)) == [1, 2, 3, 4]
    assert in_cache(tmp_path) == before
    (dataset,) = (tmp_path / "cache").rglob("dataset.json")
    fingerprints = json.loads((run_folder / "source.json").read_text())["fingerprints"]
    assert fingerprints["data.train"] == json.loads(dataset.read_text())["fingerprint"]
    found = llm_dist("data", "trace", run_folder, "--step", 4, "--json").json
    assert {document["file"] for document in found["documents"]} == {"x.txt"}


def test_a_changed_text_is_refused_on_resume(
    run_file: Path, run_folder: Path, words: tuple[str, ...], text: Path
) -> None:
    assert llm_dist("train", run_file, *words, "run.steps=2").code == 0
    before = {path: path.read_bytes() for path in run_folder.rglob("*") if path.is_file()}
    content = text.read_bytes()
    text.write_bytes(content + b"\n\nOne document more.")
    mistake = llm_dist("train", run_folder, "run.steps=4").mistake
    assert mistake.startswith("source train of data.train has fingerprint ")
    assert mistake.endswith("; restore it or choose another run.name")
    assert {path: path.read_bytes() for path in run_folder.rglob("*") if path.is_file()} == before
    text.write_bytes(content)
    assert llm_dist("train", run_folder, "run.steps=4").code == 0


def test_two_ranks_make_the_shards_once(
    run_file: Path, run_folder: Path, words: tuple[str, ...], tmp_path: Path
) -> None:
    said = run([*LAUNCH, run_file, "--ranks", "2", *words, "run.steps=2"])
    assert said.code == 0, said.err
    assert sorted(losses(run_folder)) == [1, 2]
    assert len(list((tmp_path / "cache").rglob("dataset.json"))) == 1


def test_a_saved_hugging_face_dataset_trains(
    run_file: Path, run_folder: Path, words: tuple[str, ...], corpus: Path, tmp_path: Path
) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the extra hf")
    texts = [json.loads(line)["text"] for line in corpus.read_text(encoding="utf-8").splitlines()]
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / "saved")
    said = llm_dist("train", run_file, *words, f"data.train={tmp_path}/saved", "run.steps=2")
    assert said.code == 0, said.err
    before = in_cache(tmp_path)
    assert llm_dist("train", run_folder, "run.steps=3").code == 0
    assert in_cache(tmp_path) == before


def test_without_a_tokenizer_one_line_says_which_key_is_missing(
    run_file: Path, run_folder: Path, words: tuple[str, ...], text: Path
) -> None:
    mistake = llm_dist("train", run_file, *(word for word in words if not word.startswith("data.tokenizer="))).mistake
    assert mistake.startswith(f"data.train={text}: ")
    assert "data.tokenizer" in mistake
    assert not run_folder.exists()


def test_evaluation_and_training_may_both_be_raw(
    run_file: Path, run_folder: Path, words: tuple[str, ...], text: Path, tmp_path: Path
) -> None:
    held_out = tmp_path / "held.txt"
    held_out.write_text("Return the number of items.\n\nReturn the items that are left.\n")
    said = llm_dist("train", run_file, *words, "run.steps=2", f"data.holdout={held_out}")
    assert said.code == 0, said.err
    assert "step 2: held.txt loss" in said.err
