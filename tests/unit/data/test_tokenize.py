"""The job: text in, two shard folders out; a pure function of (inputs, tokenizer, seed); safe to kill at any moment."""

import io
import itertools
import json
import multiprocessing
import os
import random
import signal
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_dist import tokenizer as tokenizers
from llm_dist.data import encoding, output, shards, spill
from llm_dist.data import tokenize as job
from llm_dist.data.documents import Document
from llm_dist.data.folder import CONTINUES
from llm_dist.data.parts import tail
from llm_dist.data.spill import Documents, Spill, document_hashes
from llm_dist.data.tokenize import Progress, TokenizeReport, tokenize
from llm_dist.errors import UserError
from llm_dist.tokenizer_fast import MISSING

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "while", "é", "and", "狐", "look"]


def some_texts(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [f"{number} " + " ".join(draw.choices(WORDS, k=draw.randint(1, 60))) for number in range(count)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    records = [json.dumps({"text": text}) for text in some_texts(300)]
    (folder / "a.jsonl").write_text("\n".join(records[:200]))
    (folder / "b.jsonl").write_text("\n".join(records[200:]))
    return folder


def stored(folder: Path) -> list[list[int]]:
    """Documents as they are stored, read by the format's text alone."""
    documents: list[list[int]] = []
    rows = iter(np.load(folder / "index.npy"))
    for shard in json.loads((folder / "dataset.json").read_text())["shards"]:
        content = (folder / shard["name"]).read_bytes()
        for row in itertools.islice(rows, shard["num_chunks"]):
            tokens = np.frombuffer(content, "<u2", row["num_tokens"], row["token_offset"])
            ends = np.frombuffer(content, "<u4", row["num_documents"], row["docs_offset"])
            pieces = [piece.tolist() for piece in np.split(tokens, ends[:-1])]
            if row["flags"] & CONTINUES:
                documents[-1] += pieces.pop(0)
            documents += pieces
    assert next(rows, None) is None
    return documents


def texts(folder: Path) -> list[str]:
    tokenizer = tokenizers.load(folder / "tokenizer")
    documents = stored(folder)
    assert all(ids[0] == tokenizer.separator_id not in ids[1:] for ids in documents)
    return [tokenizer.decode(ids[1:]) for ids in documents]


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(corpus: Path | str, tokenizer: Path, out: Path, **options: object) -> TokenizeReport:
    return tokenize([str(corpus)], tokenizer, out, **{"workers": 1, **options})  # type: ignore[arg-type]


def test_every_document_is_stored_once_and_whole(corpus: Path, tiny_tokenizer: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = run(corpus, tiny_tokenizer, out, holdout=0.1)
    assert report.holdout is not None
    assert sorted(texts(out / "train") + texts(out / "holdout")) == sorted(some_texts(300))
    for part, shown in (("train", report.train), ("holdout", report.holdout)):
        found = texts(out / part)
        assert (shown.num_documents, shown.num_bytes) == (len(found), sum(len(text.encode()) for text in found))
        assert shown.num_tokens == sum(map(len, stored(out / part)))
    share = report.holdout.num_bytes / (report.holdout.num_bytes + report.train.num_bytes)
    assert 0.05 <= share <= 0.2
    assert report.holdout_how.startswith("whole documents chosen by hash")
    assert json.loads(json.dumps(asdict(report)))["num_files"] == 2
    assert sorted(path.name for path in out.iterdir()) == ["holdout", "train"]


def test_documents_are_shuffled_by_the_seed(corpus: Path, tiny_tokenizer: Path, tmp_path: Path) -> None:
    orders = []
    for seed in (0, 1):
        run(corpus, tiny_tokenizer, tmp_path / str(seed), holdout=0, seed=seed)
        assert not (tmp_path / str(seed) / "holdout").exists()
        orders.append([int(text.split()[0]) for text in texts(tmp_path / str(seed) / "train")])
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(300))
    assert orders[0] != orders[1]
    # Neighbours of the input are no neighbours any more: the rank correlation of a shuffle is near 0.
    assert all(abs(np.corrcoef(order, range(300))[0, 1]) < 0.2 for order in orders)


def test_the_result_depends_on_neither_workers_nor_batches_nor_buckets(
    corpus: Path, tiny_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(corpus, tiny_tokenizer, tmp_path / "one")
    monkeypatch.setattr(encoding, "BATCH_DOCUMENTS", 7)
    monkeypatch.setattr(spill, "BUCKET_BYTES", 1000)
    monkeypatch.setattr(spill, "RECORD_TOKENS", 1000)
    monkeypatch.setattr(spill, "BLOCK_TOKENS", 300)
    run(corpus, tiny_tokenizer, tmp_path / "two", workers=2)
    assert content(tmp_path / "one") == content(tmp_path / "two")


@settings(max_examples=100, deadline=None)
@given(
    batches=st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=8), min_size=1, max_size=8),
    buckets=st.integers(1, 5),
    record_tokens=st.integers(1, 100),
    block_tokens=st.integers(1, 60),
    dtype=st.sampled_from(["<u2", "<u4"]),
)
def test_blocks_are_all_documents_in_order_of_hash(
    tmp_path_factory: pytest.TempPathFactory,
    batches: list[list[int]],
    buckets: int,
    record_tokens: int,
    block_tokens: int,
    dtype: str,
) -> None:
    expected: dict[int, tuple[int, int, list[int]]] = {}
    number = 0
    with patch.object(spill, "RECORD_TOKENS", record_tokens), patch.object(spill, "BLOCK_TOKENS", block_tokens):
        shuffle = Spill(tmp_path_factory.mktemp("spill") / "s", buckets, np.dtype(dtype))
        for sizes in batches:
            hashes = document_hashes(1, number, len(sizes))
            texts = [[number + place, *range(1, size)] for place, size in enumerate(sizes)]
            numbers = np.arange(number, number + len(sizes))
            ids = np.array([id_ for text in texts for id_ in text], dtype)
            shuffle.write(Documents(numbers, hashes, np.array(sizes), np.array(sizes) * 3, ids))
            rows = zip(numbers.tolist(), [3 * size for size in sizes], texts, strict=True)
            expected |= dict(zip(hashes.tolist(), rows, strict=True))
            number += len(sizes)
        found = {}
        for block in shuffle.blocks():
            assert len(block.ids) <= block_tokens or len(block.numbers) == 1
            assert block.ids.dtype == dtype
            texts = [piece.tolist() for piece in np.split(block.ids, np.cumsum(block.num_tokens)[:-1])]
            rows = zip(block.numbers.tolist(), block.num_bytes.tolist(), texts, strict=True)
            found |= dict(zip(block.hashes.tolist(), rows, strict=True))
    assert list(found) == sorted(expected)
    assert found == expected


def test_what_is_large_is_neither_copied_nor_dealt_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spill, "BLOCK_TOKENS", 100)
    shuffle = Spill(tmp_path / "s", 1, np.dtype("<u2"))
    ids = np.arange(1060, dtype=np.uint16)
    hashes = np.array([5, 9, 7], np.uint64)
    shuffle.write(Documents(np.arange(3), hashes, np.array([50, 1000, 10]), np.array([1, 2, 3]), ids))
    small, large = shuffle.blocks()
    assert (small.numbers.tolist(), large.numbers.tolist()) == ([0, 2], [1])
    assert not large.ids.flags.owndata
    assert large.ids.tolist() == ids[50:1050].tolist()
    assert np.shares_memory(large.take(np.array([True])).ids, large.ids)
    assert not list((tmp_path / "s").iterdir()), "read buckets are gone"


def test_documents_are_taken_in_any_order() -> None:
    sizes = np.array([2, 3, 1, 4])
    documents = Documents(np.arange(4), np.arange(4, dtype=np.uint64), sizes, 10 * sizes, np.arange(10))
    taken = documents.take(np.array([3, 0, 1]))
    assert taken.ids.tolist() == [6, 7, 8, 9, 0, 1, 2, 3, 4]
    assert (taken.numbers.tolist(), taken.num_tokens.tolist()) == ([3, 0, 1], [4, 2, 3])
    assert documents.take(np.array([False, True, True, False])).ids.tolist() == [2, 3, 4, 5]
    assert documents.take(np.zeros(4, np.bool_)).ids.tolist() == []


def test_the_result_does_not_depend_on_what_encodes(
    corpus: Path, tiny_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = run(corpus, tiny_tokenizer, tmp_path / "slow")
    monkeypatch.setattr(job, "FAST_BYTES", 0)
    joined = []
    encode = encoding._JoinedTexts.encode
    monkeypatch.setattr(
        encoding._JoinedTexts, "encode", lambda self, each: joined.append(len(each)) or encode(self, each)
    )
    for most_threads in (4, 0):
        monkeypatch.setattr(encoding, "MOST_THREADS", most_threads)
        out = tmp_path / str(most_threads)
        fast, again = (run(corpus, tiny_tokenizer, out, workers=2) for _ in range(2))
        assert (slow.encoder, fast.encoder, again.encoder) == ("tokenizers", "tiktoken", None)
        assert content(out) == content(tmp_path / "slow")
        assert sum(joined) == 300, "processes cannot be watched"
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    missing = run(corpus, tiny_tokenizer, tmp_path / "missing")
    assert missing.encoder == f"tokenizers ({MISSING})"
    assert content(tmp_path / "missing") == content(tmp_path / "slow")


GOLDEN_HASHES = [5199774590669546748, 4158004636484536377, 9787839334247058293]


def test_document_hashes_are_the_golden_ones() -> None:
    assert document_hashes(0, 0, 3).tolist() == GOLDEN_HASHES
    assert document_hashes(0, 1, 2).tolist() == GOLDEN_HASHES[1:]
    assert len(np.unique(document_hashes(5, 0, 10_000))) == 10_000
    assert document_hashes(1, 0, 1)[0] != GOLDEN_HASHES[0]


# --- what is held out


def test_one_long_document_gives_its_tail(tiny_tokenizer: Path, tmp_path: Path) -> None:
    paragraphs = [f"{text}\nand on.\n\n" for text in some_texts(200)]
    (tmp_path / "a.txt").write_text("".join(paragraphs))
    report = run(tmp_path / "a.txt", tiny_tokenizer, tmp_path / "out", holdout=0.05)
    (head,), (end,) = texts(tmp_path / "out" / "train"), texts(tmp_path / "out" / "holdout")
    assert head + end == "".join(paragraphs)
    assert any(end == "".join(paragraphs[number:]) for number in range(200))
    assert 0.04 < len(end.encode()) / len((head + end).encode()) < 0.06
    assert report.holdout_how.endswith("cut in a.txt:1 at a blank line")
    assert report.train.num_bytes == len(head.encode())


def test_a_few_documents_are_cut_between_where_that_makes_the_share(tiny_tokenizer: Path, tmp_path: Path) -> None:
    given_texts = ["a" * 1000, "b" * 800, "c" * 100]
    (tmp_path / "a.txt").write_text("\n".join(given_texts))
    report = run(tmp_path / "a.txt", tiny_tokenizer, tmp_path / "out", holdout=0.05, split="line", seed=1)
    assert report.holdout_how.endswith("cut between documents")
    assert texts(tmp_path / "out" / "holdout") == given_texts[2:]
    assert Counter(texts(tmp_path / "out" / "train")) == Counter(given_texts[:2])


@pytest.mark.parametrize(
    ("text", "border", "expected"),
    [
        ("one two.\nthree\n\nfour five", "a blank line", "four five"),
        ("one two. three four\nfive", "a line end", "five"),
        ("one two three. four five", "a sentence end", "four five"),
        ("一二三四。五六七", "a sentence end", "五六七"),
        ("one two three four five", "a space", "four five"),
        ("一二三四五六七八", "a character", "六七八"),
        ("ab", "a character", "b"),
    ],
)
def test_a_text_is_cut_at_the_best_border(text: str, border: str, expected: str) -> None:
    parts = tail([Document(text, "a.txt", "a.txt:1")], len(text.encode()), 0.38)
    assert parts.how.endswith(f"cut in a.txt:1 at {border}")
    assert parts.cut == (text.removesuffix(expected), expected)


@settings(max_examples=200, deadline=None)
@given(
    documents=st.lists(st.text(alphabet="ab. \n一é", min_size=1).filter(lambda text: not text.isspace()), min_size=1),
    share=st.sampled_from([0.001, 0.1, 0.5, 0.9]),
)
def test_no_part_is_ever_empty_or_loses_text(documents: list[str], share: float) -> None:
    sizes = [len(text.encode()) for text in documents]
    given_documents = [Document(text, "a.txt", str(number)) for number, text in enumerate(documents)]
    try:
        parts = tail(given_documents, sum(sizes), share)
    except UserError as error:
        assert len(documents) == 1
        assert len(documents[0].strip()) == 1
        assert "--holdout 0" in str(error)
        return
    train, held = [], []
    for number, text in enumerate(documents):
        head, end = parts.cut_of(number) or (("", text) if parts.holds(number, 0) else (text, ""))
        train.append(head)
        held.append(end)
    assert "".join(train).strip()
    assert "".join(held).strip()
    assert "".join(train) + "".join(held) == "".join(documents)


# --- killed, repeated, refused


def kill_at_call(owner: object, name: str, calls: int) -> None:
    """Make the process die at the n-th call of a function."""
    function, counted = getattr(owner, name), itertools.count(1)

    def counting(*arguments: object, **named: object) -> object:
        if next(counted) == calls:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **named)

    setattr(owner, name, counting)


KILLS = {
    "while inputs are hashed": (output.Hashing, "_content", 2),
    "while documents are spilled": (spill.Spill, "write", 2),
    "while they are dealt to buckets": (spill, "_write_record", 7),
    "while buckets are read": (spill, "_blocks", 3),
    "while a block is gathered": (spill, "gather", 40),
    "while chunks are filled": (shards.ShardWriter, "add_many", 7),
    "while a thread writes a chunk": (shards._Shard, "_member", 2),
    "while a thread ends a shard": (shards._Shard, "close", 1),
    "before train is renamed into place": (Path, "rename", -1),
}


def tokenize_and_die(corpus: Path, tokenizer: Path, out: Path, when: str, calls: int) -> None:
    encoding.BATCH_DOCUMENTS, spill.BUCKET_BYTES, spill.RECORD_TOKENS, spill.BLOCK_TOKENS = 50, 8000, 2000, 500
    owner, name, fixed = KILLS[when]
    kill_at_call(owner, name, calls if fixed < 0 else fixed)
    run(corpus, tokenizer, out)


@pytest.mark.parametrize("when", KILLS)
def test_a_killed_job_leaves_nothing_that_a_relaunch_does_not_mend(
    corpus: Path, tiny_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    renames = []
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda path, target: renames.append(target) or rename(path, target))
    run(corpus, tiny_tokenizer, tmp_path / "whole")
    monkeypatch.undo()
    out = tmp_path / "out"
    child = multiprocessing.get_context("spawn").Process(
        target=tokenize_and_die, args=(corpus, tiny_tokenizer, out, when, len(renames))
    )
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert not (out / "train").exists()
    assert (out / "holdout").exists() == (when == "before train is renamed into place")
    assert (out / ".making").exists()
    report = run(corpus, tiny_tokenizer, out)
    assert not report.already_made
    assert content(out) == content(tmp_path / "whole")


def test_a_finished_job_is_not_done_again(corpus: Path, tiny_tokenizer: Path, tmp_path: Path) -> None:
    first = run(corpus, tiny_tokenizer, tmp_path / "out")
    before = content(tmp_path / "out")
    os.utime(corpus / "a.jsonl")
    again = run(corpus, tiny_tokenizer, tmp_path / "out", workers=2)
    assert (first.already_made, again.already_made) == (False, True)
    assert (again.train, again.holdout, again.holdout_how) == (first.train, first.holdout, first.holdout_how)
    assert content(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("change", "named"),
    [({"seed": 1}, "seed"), ({"holdout": 0.2}, "holdout"), ({"split": "line"}, "split"), ({}, "inputs")],
)
def test_a_folder_made_from_something_else_is_refused(
    corpus: Path, tiny_tokenizer: Path, tmp_path: Path, change: dict[str, object], named: str
) -> None:
    run(corpus, tiny_tokenizer, tmp_path / "out")
    before = content(tmp_path / "out")
    if not change:
        path = corpus / "b.jsonl"
        path.write_text(path.read_text().replace("fox", "cat", 1))
    with pytest.raises(UserError, match=rf"made from something else \({named} differs\); choose another --out"):
        run(corpus, tiny_tokenizer, tmp_path / "out", **change)
    assert content(tmp_path / "out") == before


def test_two_jobs_do_not_fill_one_folder(corpus: Path, tiny_tokenizer: Path, tmp_path: Path) -> None:
    def meanwhile(_: Progress) -> None:
        with pytest.raises(UserError, match="another process is filling it"):
            run(corpus, tiny_tokenizer, tmp_path / "out")

    run(corpus, tiny_tokenizer, tmp_path / "out", progress=meanwhile)
    assert len(texts(tmp_path / "out" / "train")) > 250


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("x", {}, "a.txt: 1 bytes of text are too few to hold out a part; add text, or .* --holdout 0"),
        ("x y", {"holdout": 1.0}, "--holdout 1.0: must be a share"),
        ("x y", {"workers": 0}, "--workers 0: must be at least 1"),
        (" ", {}, "holds no document"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_leaves_nothing(
    tiny_tokenizer: Path, tmp_path: Path, text: str, options: dict[str, object], message: str
) -> None:
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(UserError, match=message) as stopped:
        run(tmp_path / "a.txt", tiny_tokenizer, tmp_path / "out", **options)
    assert "\n" not in str(stopped.value)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_full_disk_is_one_line_and_leaves_nothing(
    corpus: Path, tiny_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "publish", full)
    with pytest.raises(UserError, match="the disk is full; nothing was kept"):
        run(corpus, tiny_tokenizer, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_an_out_that_is_a_file_is_refused(corpus: Path, tiny_tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UserError, match="a file stands in the way; choose another --out"):
        run(corpus, tiny_tokenizer, tmp_path / "out")


# --- inputs and size


def test_bad_records_are_left_out_and_reported(tiny_tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one two three"}\n{oops\n{"text": "four five"}\n{"text": ""}\n')
    report = run(tmp_path / "a.jsonl", tiny_tokenizer, tmp_path / "out", on_bad="skip", holdout=0)
    assert (report.num_bad_records, report.num_empty_documents) == (1, 1)
    assert report.first_bad is not None
    assert "line 2" in report.first_bad
    assert sorted(texts(tmp_path / "out" / "train")) == ["four five", "one two three"]


def test_standard_input_is_read_as_a_file_would_be(
    tiny_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "\n".join(some_texts(50))
    for out in ("first", "first", "second"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        report = run("-", tiny_tokenizer, tmp_path / out, split="line")
    assert content(tmp_path / "first") == content(tmp_path / "second")
    assert report.num_files == 1
    with pytest.raises(UserError, match="inputs differs"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"other text\nthan before")))
        run("-", tiny_tokenizer, tmp_path / "first", split="line")


def test_a_document_longer_than_a_chunk_is_continued(tiny_tokenizer: Path, tmp_path: Path) -> None:
    long = "the lazy dog. " * 300_000
    (tmp_path / "a.txt").write_text(f"short\n{long}\nlast")
    report = run(tmp_path / "a.txt", tiny_tokenizer, tmp_path / "out", split="line", holdout=0)
    assert sorted(texts(tmp_path / "out" / "train"), key=len) == ["last", "short", long]
    assert report.train.num_tokens > 1 << 20
    assert (report.train.num_documents, report.train.num_bytes) == (3, len(long) + 9)
