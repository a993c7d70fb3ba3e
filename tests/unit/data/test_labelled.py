"""Labelled shards: labels stand at their pieces, are made once per content, and damage is named."""

import hashlib
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest

from llm_dist.data import labelled
from llm_dist.data.examples import Columns, Task
from llm_dist.data.index import ShardSet, open_shards
from llm_dist.data.labelled import labelled_shards
from llm_dist.data.labels import Labels, open_labels
from llm_dist.data.output import Output
from llm_dist.data.shards import dataset_fingerprint
from llm_dist.tokenizer import KINDS, load
from llm_dist.tokenizer_training import train
from tests.unit.data.tiny_examples import json_lines, line_of, written

TEXT = "the quick brown fox jumps over the lazy dog and naïve quack ; it is so . "
REVIEWS = "the quick fox\tgood\nlazy dog jumps\tbad\nover the dog\tgood\n"
TAGGED = "the O\nquick B-x\nbrownish I-x\n; O\n\nfoxes B-y\njump;over O\n"
UNKNOWN_ID, CLS_ID, SEP_ID = 2, 3, 4


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One tokenizer of each kind, in a folder of its name."""
    folder = tmp_path_factory.mktemp("tokenizers")
    for kind in KINDS:
        train([TEXT * 20], kind, 80 if kind == "wordpiece" else 296, folder / kind)
    return folder


@pytest.fixture
def make(tmp_path: Path, tokenizers: Path) -> Callable[..., Path]:
    def make(path: Path, task: Task = "classify", *, kind: str = "byte-bpe", names: Any = None, **columns: str) -> Path:
        return labelled_shards(str(path), Columns(**columns), task, tokenizers / kind, tmp_path / "cache", names)

    return make


def opened(folder: Path) -> tuple[ShardSet, Labels]:
    shards = open_shards(folder)
    labels = open_labels(str(folder), shards.dataset)
    assert labels is not None
    return shards, labels


def documents(shards: ShardSet) -> list[list[int]]:
    starts = shards.document_starts(0, shards.num_tokens)
    return [part.tolist() for part in np.split(shards.tokens(0, shards.num_tokens), starts[1:])]


@pytest.mark.parametrize("kind", KINDS)
def test_texts_stand_between_their_marks_in_the_order_of_the_file(
    tmp_path: Path, make: Callable[..., Path], tokenizers: Path, kind: str
) -> None:
    path = json_lines(
        tmp_path / "a.jsonl",
        {"text": "the fox <|sep|>", "more": "é dog", "label": 10},
        {"text": "lazy", "more": "quick dog", "label": 9},
    )
    tokenizer = load(tokenizers / kind)
    first, more, lazy, quick = tokenizer.encode_batch(["the fox <|sep|>", "é dog", "lazy", "quick dog"])
    shards, labels = opened(make(path, kind=kind))
    assert documents(shards) == [[CLS_ID, *first, SEP_ID], [CLS_ID, *lazy, SEP_ID]]
    shards, labels = opened(make(path, kind=kind, text_pair="more"))
    assert documents(shards) == [[CLS_ID, *first, SEP_ID, *more, SEP_ID], [CLS_ID, *lazy, SEP_ID, *quick, SEP_ID]]
    assert shards.num_bytes == len("the fox <|sep|>lazyé dogquick dog".encode())
    assert (labels.per, labels.names) == ("document", ("9", "10"))
    assert labels.of_documents(np.array([1, 0, 0])).tolist() == [0, 1, 1]
    assert shards.dataset["made_from"]["longest_tokens"] == max(map(len, documents(shards)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_tag_stands_at_the_first_piece_of_its_word(
    tmp_path: Path, make: Callable[..., Path], tokenizers: Path, kind: str
) -> None:
    shards, labels = opened(make(written(tmp_path / "a.conll", TAGGED), "tag", kind=kind))
    tokenizer = load(tokenizers / kind)
    assert (labels.per, labels.names) == ("token", ("O", "B-x", "B-y", "I-x"))
    texts, starts = ["the quick brownish ;", "foxes jump;over"], shards.document_starts(0, shards.num_tokens)
    tags = [[0, 1, 3, 0], [2, 0]]
    assert shards.num_bytes == sum(map(len, texts))
    for ids, start, text, own in zip(documents(shards), starts.tolist(), texts, tags, strict=True):
        found = labels.of_tokens(start, len(ids))
        assert ids == [CLS_ID, *tokenizer.encode(text), SEP_ID]
        places = np.flatnonzero(found != -100)
        assert found[places].tolist() == own
        words = [tokenizer.decode(part.tolist()).strip() for part in np.split(ids[1:-1], places[1:] - 1)]
        assert [word.replace(" ", "") for word in words] == text.split(" ")
        assert found[[0, -1]].tolist() == [-100, -100]


def test_a_word_that_a_tokenizer_drops_keeps_its_tag(
    tmp_path: Path, make: Callable[..., Path], tokenizers: Path
) -> None:
    assert load(tokenizers / "wordpiece").encode("\x01") == []
    shards, labels = opened(make(written(tmp_path / "a.conll", "\x01\tB-x\n"), "tag", kind="wordpiece"))
    assert documents(shards) == [[CLS_ID, UNKNOWN_ID, SEP_ID]]
    assert labels.of_tokens(0, 3).tolist() == [-100, 0, -100]


def test_labels_of_tokens_are_a_circle(tmp_path: Path, make: Callable[..., Path]) -> None:
    shards, labels = opened(make(written(tmp_path / "a.conll", TAGGED), "tag"))
    whole, size = labels.of_tokens(0, shards.num_tokens).tolist(), shards.num_tokens
    for start, count in ((size - 2, 5), (3, 2 * size), (size, 4), (5 * size + 1, 3), (2, 0)):
        assert labels.of_tokens(start, count).tolist() == [whole[place % size] for place in range(start, start + count)]


def test_batches_change_nothing(tmp_path: Path, make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    reviews = written(tmp_path / "a.tsv", "the quick brown fox jumps over it\tgood\n" + REVIEWS * 9)
    tagged = written(tmp_path / "a.conll", (TAGGED + "\n") * 9)
    before = [opened(make(reviews))[0].dataset, opened(make(tagged, "tag"))[0].dataset]
    monkeypatch.setattr("llm_dist.data.example_ids._BATCH_EXAMPLES", 4)
    monkeypatch.setattr("llm_dist.data.example_ids._BATCH_CHARACTERS", 40)
    (tmp_path / "cache").rename(tmp_path / "before")
    assert [opened(make(reviews))[0].dataset, opened(make(tagged, "tag"))[0].dataset] == before


def test_names_give_the_ids_and_others_are_unknown(tmp_path: Path, make: Callable[..., Path]) -> None:
    path = written(tmp_path / "a.tsv", REVIEWS)
    labels = opened(make(path, names=["so", "good", "bad"]))[1]
    assert labels.names == ("so", "good", "bad")
    assert labels.of_documents(np.arange(3)).tolist() == [1, 2, 1]
    line = line_of(lambda: make(path, names=["good", "so"]))
    assert line == "a.tsv: line 2: label 'bad' is unknown; the model knows good, so"
    assert line_of(lambda: make(path, names=["good", "bad", "good"])).startswith("label 'good' is named twice")


@pytest.fixture
def count_made(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Folders that were written."""
    made = []
    write = labelled._write

    def counted(job: Any, names: list[str], folder: Path) -> None:
        made.append(folder)
        write(job, names, folder)

    monkeypatch.setattr(labelled, "_write", counted)
    return made


def test_shards_are_made_once_and_anew_when_anything_changes(
    tmp_path: Path, make: Callable[..., Path], count_made: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "a.tsv", REVIEWS)
    first = make(path)
    moved = written(tmp_path / "deep" / "a.tsv", REVIEWS)
    assert first == make(path) == make(moved)
    assert (len(count_made), first.parent.parent) == (1, tmp_path / "cache" / "labelled")
    folders = {first, make(path, names=["bad", "good"]), make(path, names=["good", "bad"]), make(path, kind="bpe")}
    folders.add(make(path, text="0", label="1"))
    folders.add(make(written(path, REVIEWS + "a dog\tbad\n")))
    monkeypatch.setattr(labelled, "VERSION", labelled.VERSION + 1)
    folders.add(make(moved))
    assert len(folders) == len(count_made) == 7
    monkeypatch.undo()
    assert make(written(path, REVIEWS)) == first


def test_the_fingerprint_covers_labels_and_their_names(tmp_path: Path, make: Callable[..., Path]) -> None:
    path = written(tmp_path / "a.tsv", REVIEWS)
    before = opened(make(path))[0]
    other_label = opened(make(written(path, REVIEWS.replace("jumps\tbad", "jumps\tgood")), names=["bad", "good"]))[0]
    other_name = opened(make(written(path, REVIEWS.replace("bad", "ugly")), names=["ugly", "good"]))[0]
    assert before.dataset["shards"] == other_label.dataset["shards"] == other_name.dataset["shards"]
    assert before.dataset["labels"]["sha256"] == other_name.dataset["labels"]["sha256"]
    assert len({shards.fingerprint for shards in (before, other_label, other_name)}) == 3
    shas = [shard["sha256"] for shard in before.dataset["shards"]]
    arguments = before.dataset["dtype"], before.dataset["tokenizer"], shas
    assert dataset_fingerprint(*arguments, before.dataset["labels"]) == before.fingerprint
    assert dataset_fingerprint(*arguments) != before.fingerprint


def test_the_labels_are_a_plain_array(tmp_path: Path, make: Callable[..., Path]) -> None:
    folder = make(written(tmp_path / "a.tsv", REVIEWS))
    array = np.load(folder / "labels.npy")
    assert (array.dtype, array.tolist()) == (np.dtype("<i4"), [1, 0, 1])
    sha256 = hashlib.sha256((folder / "labels.npy").read_bytes()).hexdigest()
    assert open_shards(folder).dataset["labels"] == {"per": "document", "names": ["bad", "good"], "sha256": sha256}


def test_damage_is_named(tmp_path: Path, make: Callable[..., Path]) -> None:
    folder = make(written(tmp_path / "a.tsv", REVIEWS))
    path, dataset = folder / "labels.npy", open_shards(folder).dataset
    content = path.read_bytes()
    for damaged, words in (
        (content[:-4], "truncated, 136 bytes instead of 140"),
        (content + b"\0", "too long, 141 bytes instead of 140"),
        (content[:-1] + b"\1", "damaged, not the one dataset.json names (sha256)"),
    ):
        path.write_bytes(damaged)
        line = line_of(lambda: open_labels(str(folder), dataset))
        assert line == f"{path}: {words}; restore it, or delete {folder.parent} to have it made anew"
    path.unlink()
    assert line_of(lambda: open_labels(str(folder), dataset)).startswith(f"{path}: missing; restore it, or delete")
    assert open_labels(str(folder), {key: value for key, value in dataset.items() if key != "labels"}) is None
    assert "a folder of this machine only" in line_of(lambda: open_labels("s3://bucket/train", dataset))


def test_what_a_kill_left_is_made_whole(tmp_path: Path, make: Callable[..., Path]) -> None:
    path = written(tmp_path / "a.tsv", REVIEWS)
    folder = make(path)
    (folder.parent / ".making").mkdir()
    folder.rename(folder.parent / ".making" / "train")
    assert make(path) == folder
    assert sorted(each.name for each in folder.parent.iterdir()) == ["train"]
    assert opened(folder)[1].of_documents(np.arange(3)).tolist() == [1, 0, 1]


def test_what_went_wrong_leaves_nothing_that_would_be_found(
    tmp_path: Path, make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "a.tsv", REVIEWS + "dog\n")
    assert "line 4: 1 columns" in line_of(lambda: make(path))
    written(path, REVIEWS)
    write = labelled._write
    monkeypatch.setattr(labelled, "_write", lambda *args: (write(*args), written(path, REVIEWS * 2)))
    assert line_of(lambda: make(path)) == f"{path}: changed while it was read; start again when it is whole"
    assert not list((tmp_path / "cache").rglob("dataset.json"))


def test_a_cache_that_cannot_be_written(tmp_path: Path, make: Callable[..., Path]) -> None:
    written(tmp_path / "cache", "a file")
    line = line_of(lambda: make(written(tmp_path / "a.tsv", REVIEWS)))
    assert line.startswith(f"data.cache={tmp_path}/cache: cannot be written")


def test_two_processes_at_once_find_the_same(tmp_path: Path, tokenizers: Path) -> None:
    path = written(tmp_path / "a.tsv", REVIEWS * 300)
    code = (
        "import sys\nfrom pathlib import Path\nfrom llm_dist.data.examples import Columns\n"
        "from llm_dist.data import labelled\nwrite = labelled._write\n"
        "labelled._write = lambda *args: (print('made'), write(*args))\n"
        "print(labelled.labelled_shards(sys.argv[1], Columns(), 'classify', sys.argv[2], Path(sys.argv[3]), None))\n"
    )
    command = [sys.executable, "-c", code, str(path), str(tokenizers / "byte-bpe"), str(tmp_path / "cache")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [process.communicate(timeout=120)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert sum(output.count("made") for output in outputs) == 1
    (folder,) = {output[-1] for output in outputs}
    assert opened(Path(folder))[0].num_documents == 900


def test_who_finds_another_making_them_waits(
    tmp_path: Path, make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "a.tsv", REVIEWS)
    folder = make(path)
    folder.rename(tmp_path / "finished")
    waits = []

    def other_finishes(seconds: float) -> None:
        waits.append(seconds)
        (tmp_path / "finished").rename(folder)

    monkeypatch.setattr(time, "sleep", other_finishes)
    with Output(folder.parent):
        assert make(path) == folder
    assert len(waits) == 1


def test_what_another_finished_a_moment_ago_is_not_made_again(
    tmp_path: Path, make: Callable[..., Path], count_made: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "a.tsv", REVIEWS)
    folder = make(path)
    folder.rename(tmp_path / "finished")

    class LateOutput(Output):
        def __enter__(self) -> Self:
            (tmp_path / "finished").rename(folder)
            return super().__enter__()

    monkeypatch.setattr(labelled, "Output", LateOutput)
    assert (make(path), len(count_made)) == (folder, 1)


@pytest.mark.data
def test_real_labelled_text(tmp_path: Path, make: Callable[..., Path], data_folder: Callable[[str], Path]) -> None:
    shards, labels = opened(make(data_folder("sst2") / "train.tsv"))
    assert np.bincount(labels.of_documents(np.arange(shards.num_documents))).tolist() == [3310, 3610]


@pytest.mark.data
@pytest.mark.parametrize("kind", ["byte-bpe", "wordpiece"])
def test_real_tagged_words(make: Callable[..., Path], data_folder: Callable[[str], Path], kind: str) -> None:
    shards, labels = opened(make(data_folder("ner_wnut17") / "train.conll", "tag", kind=kind))
    ids = labels.of_tokens(0, shards.num_tokens)
    assert (shards.num_documents, np.count_nonzero(ids != -100)) == (3394, 62730)
    assert len(labels.names) == 13
    assert np.count_nonzero(ids == labels.names.index("B-person")) == 660
