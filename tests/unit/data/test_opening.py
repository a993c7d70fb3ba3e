"""From the [data] section to opened sources: which are mixed how, what mistakes are called, and raw text."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from llm_dist import config
from llm_dist.data import tokenize as tokenizing
from llm_dist.data.opening import open_holdouts, open_reading
from llm_dist.data.reading import Reading
from llm_dist.errors import UserError
from llm_dist.tokenizer_training import train
from tests.unit.data.tiny_reading import write_source

TEXT = "the quick brown fox jumps over the lazy dog\n\n" * 30


def run_of(folder: Path, *overrides: str, **data: Any) -> config.Config:
    table = {
        "run": {"name": "tiny", "steps": 10},
        "model": {"layers": 1, "d_model": 8, "heads": 2},
        "data": {"train": str(folder / "a"), "sequence_tokens": 16, "cache": str(folder / "cache"), **data},
        "batch": {"tokens_per_step": 48},
    }
    return config.parse(table, overrides)


def mistake(run: config.Config) -> str:
    with pytest.raises(UserError) as caught:
        open_reading(run)
    (line,) = str(caught.value).splitlines()
    return line


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    folder = tmp_path_factory.mktemp("opening")
    for name, lengths in {"a": [40] * 20, "b": [3] * 100, "c": [100] * 3, "short": [4]}.items():
        write_source(folder / name, tiny_tokenizer, lengths)
    train([TEXT], "byte-bpe", 290, folder / "other-tokenizer")
    write_source(folder / "other", folder / "other-tokenizer", [40] * 20)
    return folder


def table_of(folder: Path, names: str) -> dict[str, str]:
    return {name: str(folder / name) for name in names}


def test_sources_are_mixed_as_the_run_file_says(folder: Path) -> None:
    mixture = [{"from_step": 0, "weights": {"a": 0.2, "b": 0.1}}, {"from_step": 4, "weights": {"c": 7}}]
    reading = open_reading(run_of(folder, train=table_of(folder, "abc"), mixture=mixture))
    assert [source.name for source in reading.sources] == ["a", "b", "c"]
    assert (reading.sequences_per_step, reading.sequence_tokens, reading.is_padded) == (3, 16, False)
    assert [reading.mixture.counts(step) for step in (3, 4, 6)] == [[6, 3, 0], [8, 4, 0], [8, 4, 6]]


def test_without_a_mixture_sources_are_read_at_the_same_rate(folder: Path) -> None:
    reading = open_reading(run_of(folder, train=table_of(folder, "abc")))
    sizes = [source.packing.num_windows for source in reading.sources]
    assert sizes == [820 // 16, 400 // 16, 303 // 16]
    assert reading.mixture.counts(sum(sizes)) == [3 * size for size in sizes]


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
@pytest.mark.parametrize(
    "mixture", [[], [{"from_step": 0, "weights": {"a": 1, "b": 1, "c": 0.5}}]], ids=["by size", "even"]
)
def test_the_order_in_which_a_table_names_its_sources_changes_nothing(folder: Path, packing: str, mixture: Any) -> None:
    """A run folder holds its config with sorted keys: a run begun from a file must go on from the folder."""
    more = {"packing": packing, "mixture": mixture}
    begun = run_of(folder, train=table_of(folder, "cab"), **more)
    gone_on = config.parse(json.loads(begun.to_json()))
    assert gone_on == begun
    assert counts_by_name(open_reading(gone_on)) == counts_by_name(open_reading(begun))
    assert open_reading(gone_on).order_hash(range(9)) == open_reading(begun).order_hash(range(9))


def counts_by_name(reading: Reading) -> list[dict[str, int]]:
    names = [source.name for source in reading.sources]
    counts = (zip(names, reading.mixture.counts(step), strict=True) for step in range(9))
    return [dict(sorted(each)) for each in counts]


def test_packing_and_mask_are_the_run_files(folder: Path) -> None:
    reading = open_reading(run_of(folder, "data.packing=best_fit", "data.document_mask=true"))
    assert (reading.is_padded, reading.document_mask) == (True, True)
    assert open_reading(run_of(folder, "run.seed=1")).order_hash(range(2)) != open_reading(run_of(folder)).order_hash(
        range(2)
    )


def test_what_cannot_be_read_is_named_by_its_key(folder: Path) -> None:
    assert mistake(run_of(folder, "data.train=nowhere")).startswith("data.train=nowhere: nowhere: no such shard folder")
    two = {"a": str(folder / "a"), "b": "nowhere"}
    assert mistake(run_of(folder, train=two)).startswith("data.train.b=nowhere: nowhere: no such shard folder")
    short = {"a": str(folder / "a"), "b": str(folder / "short")}
    assert mistake(run_of(folder, train=short)) == (
        f"data.train.b={folder}/short: {folder}/short has 5 tokens, fewer than data.sequence_tokens=16; "
        "lower data.sequence_tokens or add text"
    )
    other = {"a": str(folder / "a"), "b": str(folder / "other")}
    assert mistake(run_of(folder, train=other)) == (
        f"data.train.b={folder}/other was made with another tokenizer than {folder}/a; tokenize both with the same one"
    )


def test_held_out_folders_are_named_by_their_last_part_and_checked(folder: Path) -> None:
    (folder / "more").mkdir(exist_ok=True)
    shutil.copytree(folder / "b", folder / "more" / "b", dirs_exist_ok=True)
    run = run_of(folder, holdout=[str(folder / "b"), str(folder / "more" / "b"), str(folder / "c")])
    shards = open_reading(run).sources[0].shards
    assert list(open_holdouts(run, shards)) == ["b", "more_b", "c"]
    for place, words in (("other", "was made with another tokenizer than"), ("none", "no such shard folder")):
        with pytest.raises(UserError, match=rf"^data\.holdout={folder}/{place}.*{words}"):
            open_holdouts(run_of(folder, holdout=str(folder / place)), shards)


@pytest.fixture
def raw(tmp_path: Path, tiny_tokenizer: Path) -> config.Config:
    """A run on raw text."""
    (tmp_path / "x.txt").write_text(TEXT)
    return run_of(tmp_path, train=str(tmp_path / "x.txt"), tokenizer=str(tiny_tokenizer), split="blank-line")


def made(run: config.Config) -> list[str]:
    return sorted(path.name for path in (Path(run.data.cache) / "shards").iterdir())


def test_raw_text_becomes_shards_once(raw: config.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_reading(raw)
    assert first.sources[0].shards.num_documents == 30
    assert first.sources[0].shards.dataset["made_from"]["inputs"][0]["name"] == "x.txt"
    (folder,) = made(raw)
    before = (Path(raw.data.cache) / "shards" / folder / "train" / "dataset.json").stat()
    monkeypatch.setattr(tokenizing, "tokenize", lambda *_, **__: pytest.fail("made anew"))
    second = open_reading(raw)
    assert second.order_hash(range(4)) == first.order_hash(range(4))
    assert (Path(raw.data.cache) / "shards" / folder / "train" / "dataset.json").stat() == before


def test_another_text_tokenizer_or_split_is_other_shards(raw: config.Config, tmp_path: Path, folder: Path) -> None:
    prints = {open_reading(raw).sources[0].shards.fingerprint}
    for override in ("data.split=file", f"data.tokenizer={folder}/other-tokenizer"):
        changed = config.parse(json.loads(raw.to_json()), [override])
        prints.add(open_reading(changed).sources[0].shards.fingerprint)
    (tmp_path / "x.txt").write_text(TEXT + "one fox more")
    prints.add(open_reading(raw).sources[0].shards.fingerprint)
    assert len(prints) == 4
    (tmp_path / "x.txt").write_text(TEXT)
    assert open_reading(raw).sources[0].shards.fingerprint in prints
    assert len(made(raw)) == 4


def test_text_that_lies_elsewhere_is_the_same(raw: config.Config, tmp_path: Path) -> None:
    before = open_reading(raw).sources[0].shards.fingerprint
    (tmp_path / "deep").mkdir()
    (tmp_path / "x.txt").rename(tmp_path / "deep" / "x.txt")
    moved = config.parse(json.loads(raw.to_json()), [f"data.train={tmp_path}/deep/x.txt"])
    assert open_reading(moved).sources[0].shards.fingerprint == before
    assert len(made(raw)) == 1


def test_what_a_kill_left_in_the_cache_is_made_whole(raw: config.Config) -> None:
    before = open_reading(raw).order_hash(range(2))
    (folder,) = made(raw)
    (Path(raw.data.cache) / "shards" / folder / "train").rename(
        Path(raw.data.cache) / "shards" / folder / ".train.unfinished"
    )
    assert open_reading(raw).order_hash(range(2)) == before


def test_who_finds_another_making_the_same_shards_waits(raw: config.Config) -> None:
    """Other ranks of this host whose cache rank 0 does not share, or another run on the same text."""
    before = open_reading(raw).order_hash(range(2))
    out = Path(raw.data.cache) / "shards" / made(raw)[0]
    (out / "train").rename(out.parent.parent / "train")
    with ThreadPoolExecutor(1) as thread:
        descriptor = os.open(out, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        found = thread.submit(open_reading, raw)
        time.sleep(0.3)
        (out.parent.parent / "train").rename(out / "train")
        os.close(descriptor)
        assert found.result(timeout=60).order_hash(range(2)) == before


def test_raw_text_and_shards_are_mixed(raw: config.Config, tmp_path: Path, folder: Path) -> None:
    """Both made with one tokenizer."""
    both = run_of(
        tmp_path,
        train={"text": raw.data.train, "shards": str(folder / "a")},
        tokenizer=raw.data.tokenizer,
        split="blank-line",
    )
    found = {source.name: source.shards.num_documents for source in open_reading(both).sources}
    assert found == {"text": 30, "shards": 20}
    assert open_holdouts(
        config.parse(json.loads(raw.to_json()), [f"data.holdout={raw.data.train}"]), open_reading(raw).sources[0].shards
    ).keys() == {"x.txt"}


def test_a_saved_hugging_face_dataset_is_read(raw: config.Config, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the extra hf")
    texts = TEXT.strip().split("\n\n")
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / "saved")
    saved = config.parse(json.loads(raw.to_json()), [f"data.train={tmp_path}/saved"])
    shards = open_reading(saved).sources[0].shards
    assert shards.num_documents == len(texts)
    assert shards.num_bytes == sum(map(len, texts))
    before = made(raw)
    assert open_reading(saved).sources[0].shards.fingerprint == shards.fingerprint
    assert made(raw) == before


def test_raw_text_without_a_tokenizer_is_one_line_with_a_way_out(raw: config.Config) -> None:
    without = raw.model_copy(update={"data": raw.data.model_copy(update={"tokenizer": None})})
    line = mistake(without)
    assert line.startswith(f"data.train={raw.data.train}: ")
    assert "a file, not a shard folder" in line
    assert "data.tokenizer" in line


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.train=nowhere.txt"], ["data.train=nowhere.txt: ", "nowhere.txt: no such"]),
        (["data.train=-"], ["data.train=-: standard input cannot be read again; name a file or a folder"]),
        (["data.tokenizer=nowhere"], ["data.tokenizer", "nowhere"]),
        (["data.train={folder}/empty"], ["data.train={folder}/empty: ", "no file to read"]),
        (["data.train={folder}/blank.txt"], ["data.train={folder}/blank.txt: ", "no document"]),
        (["data.train={folder}/x.docx"], ["unknown type of file"]),
    ],
)
def test_what_is_no_text(raw: config.Config, tmp_path: Path, overrides: list[str], words: list[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text(" \n\n")
    (tmp_path / "x.docx").write_text("x")
    changed = config.parse(json.loads(raw.to_json()), [each.format(folder=tmp_path) for each in overrides])
    line = mistake(changed)
    for word in words:
        assert word.format(folder=tmp_path) in line


def test_the_folder_of_two_is_named_as_such_with_a_tokenizer_too(
    raw: config.Config, tmp_path: Path, folder: Path
) -> None:
    shutil.copytree(folder / "a", tmp_path / "two" / "train")
    changed = config.parse(json.loads(raw.to_json()), [f"data.train={tmp_path}/two"])
    assert f"name {tmp_path}/two/train" in mistake(changed)


def test_a_cache_that_may_not_be_written(raw: config.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tokenizing, "tokenize", refuse)
    assert f"data.cache={raw.data.cache}: cannot be written (Permission denied); " in mistake(raw)


def test_a_cache_that_is_a_file(raw: config.Config, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    changed = config.parse(json.loads(raw.to_json()), [f"data.cache={tmp_path}/file"])
    line = mistake(changed)
    assert "data.cache" in line
    assert "cannot be written" in line
