"""Readers: what a document is in each kind of file, and one line for whatever cannot be read."""

import gzip
import io
import json
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from llm_dist.data.documents import Document, Tally, read_documents
from llm_dist.errors import UserError

PACK: dict[str, Callable[[bytes], bytes]] = {
    "": lambda content: content,
    ".gz": lambda content: gzip.compress(content, mtime=0),
    ".zst": zstandard.compress,
}


def read(*inputs: Path | str, **options: object) -> list[Document]:
    return list(read_documents([str(each) for each in inputs], **options))  # type: ignore[arg-type]


def texts(*inputs: Path | str, **options: object) -> list[str]:
    return [document.text for document in read(*inputs, **options)]


def json_lines(*records: object) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def table(**columns: object) -> bytes:
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), buffer, row_group_size=2)
    return buffer.getvalue()


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", json_lines({"text": "eins\n"}, {"text": "zwei é", "id": 7})),
        ("a.parquet", table(text=["eins\n", "zwei é"], id=[None, "7"])),
    ],
)
def test_records_carry_text_and_id(tmp_path: Path, name: str, content: bytes, packing: str) -> None:
    path = tmp_path / f"{name}{packing}"
    path.write_bytes(PACK[packing](content))
    tally = Tally()
    assert read(path, tally=tally) == [
        Document("eins\n", path.name, f"{path.name}:1"),
        Document("zwei é", path.name, "7"),
    ]
    assert (tally.num_files, tally.num_documents, tally.num_bytes) == (1, 2, 12)


@pytest.mark.parametrize("packing", PACK)
def test_a_text_file_is_split_as_asked(tmp_path: Path, packing: str) -> None:
    content = "one\r\ntwo\n \t\n\n\nthree\x0bstill\u2028three\n"
    path = tmp_path / f"a.txt{packing}"
    path.write_bytes(PACK[packing](content.encode()))
    assert texts(path) == [content]
    assert texts(path, split="line") == ["one", "two", "three\x0bstill\u2028three"]
    by_paragraph = read(path, split="blank-line")
    assert [(each.text, each.id) for each in by_paragraph] == [
        ("one\ntwo", f"{path.name}:1"),
        ("three\x0bstill\u2028three", f"{path.name}:6"),
    ]


@settings(max_examples=40, deadline=None)
@given(text=st.text(min_size=1).filter(lambda text: not text.isspace() and not text.startswith("\ufeff")))
def test_any_text_survives_every_format(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    folder = tmp_path_factory.mktemp("any")
    (folder / "1.txt").write_bytes(text.encode())
    (folder / "2.jsonl").write_bytes(json_lines({"text": text}))
    (folder / "3.parquet").write_bytes(table(text=[text]))
    assert texts(folder) == [text] * 3


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    for name, content in (("1.txt", b"a"), ("2.jsonl", json_lines({"text": "a"}))):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content)
    assert texts(tmp_path) == texts(tmp_path, split="line") == ["a", "a"]


def test_folders_are_read_recursively_in_order_and_unknown_files_counted(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/10.txt", "a.txt", "c.pdf", ".hidden.txt", ".git/x.txt", "README"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (tmp_path / "in" / "b" / "loop").symlink_to(tmp_path / "in")
    tally = Tally()
    found = read(tmp_path / "in", tally=tally)
    assert [document.id for document in found] == ["in/a.txt:1", "in/b/10.txt:1", "in/b/2.txt:1"]
    assert (tally.num_files, tally.num_skipped_files) == (3, 4)


def test_globs_are_sorted_and_a_file_is_read_once(tmp_path: Path) -> None:
    for name in ("x/b.txt", "x/a.txt", "y/a.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    tally = Tally()
    found = read(tmp_path / "*" / "*.txt", tmp_path / "x", tally=tally)
    assert [document.text for document in found] == ["x/a.txt", "x/b.txt", "y/a.txt"]
    assert tally.num_skipped_files == 2


def test_files_of_the_same_name_keep_ids_apart(tmp_path: Path) -> None:
    for name in ("x/a.txt", "y/a.txt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(name)
    assert [each.id for each in read(tmp_path / "x/a.txt", tmp_path / "y/a.txt")] == ["a.txt:1", "a.txt~2:1"]


def test_standard_input_is_text() -> None:
    code = "from llm_dist.data.documents import read_documents as r; print([d.text for d in r(['-'], split='line')])"
    shown = subprocess.run(
        [sys.executable, "-c", code], input="eins\n\nzwei", capture_output=True, text=True, check=True
    )
    assert shown.stdout.strip() == "['eins', 'zwei']"


def test_reading_documents_loads_no_torch() -> None:
    code = "import sys, llm_dist.data.documents, llm_dist.data.tokenize; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_blank_documents_are_counted_and_dropped(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines({"text": ""}, {"text": " \n"}, {"text": "x"}))
    (tmp_path / "b.txt").write_bytes(b"")
    tally = Tally()
    assert texts(tmp_path, tally=tally) == ["x"]
    assert (tally.num_empty_documents, tally.num_bad_records) == (3, 0)


BAD = [
    ("a.jsonl", json_lines({"text": "x"}) + b"{oops\n", "a.jsonl: line 2: not JSON"),
    ("a.jsonl", b"[" * 200_000 + b"\n", "line 1: not JSON"),
    ("a.jsonl", json_lines({"text": "x"}, {"body": "x"}), "line 2: no field `text` (it has 'body')"),
    ("a.jsonl", json_lines({"text": 3}), "line 1: field `text` is a int, not a string"),
    ("a.jsonl", json_lines(["text"]), "line 1: a list, not a JSON object"),
    ("a.jsonl", json_lines({"text": "\ud800"}), "line 1: not valid Unicode"),
    ("a.jsonl", b'\n{"text": "\xff"}\n', "line 2: not UTF-8 (byte 0xff at column 11)"),
    ("a.txt", b"good\nbad \xe9t\xe9\n", "line 2: not UTF-8 (byte 0xe9 at offset 9)"),
    ("a.parquet", table(text=["x", None]), "row 2: field `text` is a NoneType, not a string"),
    ("a.parquet", table(text=[1]), "row 1: field `text` is a int, not a string"),
    ("a.parquet", table(body=["x"]), "no column `text` (it has 'body')"),
    ("a.parquet", b"PAR1 not at all", "broken .parquet file"),
    ("a.txt.gz", b"not gzip", "a.txt.gz: broken .gz file"),
    ("a.jsonl.gz", gzip.compress(json_lines({"text": "x" * 999}), mtime=0)[:-9], "a.jsonl.gz: broken .gz file"),
    ("a.txt.zst", b"not zstandard", "a.txt.zst: broken .zst file"),
    ("a.jsonl.zst", zstandard.compress(bytes(100_000))[:-3], "broken .zst file (it ends inside a frame)"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD)
def test_a_bad_record_stops_or_is_counted(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    (tmp_path / "z.txt").write_text("good")
    with pytest.raises(UserError) as stopped:
        read(tmp_path)
    assert message in str(stopped.value)
    assert "\n" not in str(stopped.value)
    tally = Tally()
    assert texts(tmp_path, on_bad="skip", tally=tally)[-1] == "good"
    assert tally.num_bad_records == 1
    assert tally.first_bad is not None
    assert message in tally.first_bad


def test_what_precedes_a_broken_end_is_kept_when_skipping(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstandard.compress(json_lines({"text": "x"})) + zstandard.compress(json_lines({"text": "y"}))[:-2])
    tally = Tally()
    assert texts(path, on_bad="skip", tally=tally) == ["x"]
    assert tally.num_bad_records == 1


@pytest.mark.parametrize(
    ("given_input", "message"),
    [
        ("missing.txt", "missing.txt: no such file or folder"),
        ("*.txt", "*.txt: matches no file"),
        ("a.pdf", "a.pdf: unknown type of file; inputs are .txt, .jsonl, .parquet, .tar or .arrow"),
        ("only_unknown", "only_unknown: no file to read, 1 skipped"),
        ("blank.jsonl", "blank.jsonl: holds no document (1 files, 1 blank documents"),
    ],
)
def test_inputs_that_give_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given_input: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.pdf").write_bytes(b"%PDF")
    (tmp_path / "only_unknown").mkdir()
    (tmp_path / "only_unknown" / "a.pdf").write_bytes(b"%PDF")
    (tmp_path / "blank.jsonl").write_bytes(json_lines({"text": " "}))
    with pytest.raises(UserError) as stopped:
        read(given_input)
    assert str(stopped.value).startswith(message)
    assert "\n" not in str(stopped.value)


def test_an_unknown_split_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match="--split word: must be one of file, blank-line, line"):
        read(tmp_path / "a.txt", split="word")


@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_memory_does_not_follow_what_a_file_unpacks_to(tmp_path: Path, packing: str) -> None:
    path = tmp_path / f"bomb.txt{packing}"
    line = b"0123456789" * 100 + b"\n"
    path.write_bytes(PACK[packing](line * 30_000))
    tracemalloc.start()
    count = sum(1 for _ in read_documents([str(path)], split="line"))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 30_000
    assert peak_bytes < 10_000_000
