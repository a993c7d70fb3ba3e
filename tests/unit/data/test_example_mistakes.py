"""Labelled examples: one line for whatever cannot be used, with the file, the line and the way out."""

import gzip
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from tests.unit.data.tiny_examples import mistake, table, written

PACKED = gzip.compress(b'{"text": "a", "label": 1}', mtime=0)  # else the time would stand in it
CLASSIFY_MISTAKES: list[tuple[str, str | bytes, dict[str, str], list[str]]] = [
    ("a.docx", "", {}, ["unknown type of file", ".tsv, .csv, .jsonl"]),
    ("a.conll", "", {}, ["holds words with tags", ".tsv, .csv, .jsonl"]),
    ("a.tsv", "", {}, ["holds no example", ".tsv"]),
    ("a.tsv", "text\tlabel\n", {}, ["holds no example"]),
    ("a.jsonl", "\n", {}, ["holds no example"]),
    ("a.tsv", "text\tlabel\na\t1", {"label": "stars"}, ["data.label_column=stars: no such column", "text, label"]),
    ("a.tsv", "q\tlabel\na\t1", {"text_pair": "x"}, ["no column text or sentence", "q, label", "data.text_column"]),
    ("a.tsv", "text\tlabel\na\t1", {"text_pair": "x"}, ["data.text_pair_column=x: no such column", "text, label"]),
    ("a.tsv", "text\tlabel\na\t1", {"text": "Text", "label": "label"}, ["data.text_column=Text", "text, label"]),
    ("a.tsv", "a\t1", {"text": "1"}, ["data.text_column and data.label_column", "1, 1", "different"]),
    ("a.tsv", "t\tl\na\t1", {"text": "t", "label": "t"}, ["data.text_column and data.label_column", "column t"]),
    ("a.tsv", "a\t1\nb\n", {}, [": line 2: 1 columns", "number 1", "data.label_column"]),
    ("a.tsv", "a\t1\n", {"label": "4"}, [": line 1: 2 columns", "number 4", "data.label_column"]),
    ("a.tsv", "a\t1\nb\tc\t0\n", {}, [": line 2: 3 columns, the first line has 2", "tab out of the text"]),
    ("a.csv", "a,1\nb,c,0\n", {}, [": line 2: 3 columns, the first line has 2", "quote the text"]),
    ("a.csv", 'a,1\n"b,0\nc,1\n', {}, [": line 2: not CSV", "quote"]),
    ("a.tsv", "a\t1\n \t1\n", {}, [": line 2: the text (data.text_column) is empty", "leave the example out"]),
    ("a.tsv", "a\t \n", {}, [": line 1: the label (data.label_column) is empty", "leave the example out"]),
    ("a.tsv", "a\tb\t1\na\t\t1\n", {"text": "0", "text_pair": "1", "label": "2"}, ["line 2", "data.text_pair_column"]),
    ("a.tsv", b"a\t1\nb\xff\t0\n", {}, [": line 2: not UTF-8", "0xff", "column 2", "convert"]),
    ("a.csv", b"a,1\nb\xff,0\n", {}, [": line 2: not UTF-8", "convert"]),
    ("a.jsonl", b'{"text": "\xff"}\n', {}, [": line 1: not UTF-8", "convert"]),
    ("a.jsonl", '{"text": "a", "label": 1}\n{"text"\n', {}, [": line 2: not JSON", "mend or delete the line"]),
    ("a.jsonl", "[1]\n", {}, [": line 1: a list, not a JSON object"]),
    ("a.jsonl", '{"a": 1, "label": 1}', {}, [": line 1: no column text or sentence", "a, label", "data.text_column"]),
    ("a.jsonl", '{"text": "a", "x": 1}', {}, [": line 1: no column label", "text, x", "data.label_column"]),
    ("a.jsonl", '{"text": "a"}', {"label": "stars"}, [": line 1: data.label_column=stars: no such column", "text"]),
    ("a.jsonl", '{"text": "a", "label": 1}', {"label": "0"}, ["data.label_column=0: no such column"]),
    ("a.jsonl", '{"text": null, "label": 1}', {}, [": line 1: the text (data.text_column) is empty"]),
    ("a.jsonl", '{"text": 3, "label": 1}', {}, [": line 1: the text (data.text_column) is a int, not a string"]),
    ("a.jsonl", '{"text": "\\ud800", "label": 1}', {}, [": line 1: the text (data.text_column) is not valid Unicode"]),
    ("a.jsonl", '{"text": "a", "label": null}', {}, [": line 1: the label (data.label_column) is empty"]),
    ("a.jsonl", '{"text": "a", "label": 0.5}', {}, ["data.label_column", "a float", "a string nor an integer"]),
    ("a.jsonl", '{"text": "a", "label": ["x"]}', {}, ["data.label_column", "a list", "a string nor an integer"]),
    ("a.jsonl.gz", PACKED[:-4], {}, ["broken .gz file", "fetch it again"]),
    ("a.parquet", b"PAR1 but no more", {}, ["broken .parquet file", "fetch it again"]),
]


@pytest.mark.parametrize(("name", "content", "columns", "words"), CLASSIFY_MISTAKES)
def test_what_cannot_be_classified(
    tmp_path: Path, name: str, content: str | bytes, columns: dict[str, str], words: list[str]
) -> None:
    path = written(tmp_path / name, content)
    line = mistake(path, **columns)
    assert line.startswith(str(path))
    assert [word for word in words if word not in line] == [], line


TAG_MISTAKES: list[tuple[str, str | bytes, dict[str, str], list[str]]] = [
    ("a.tsv", "a\tO", {}, ["a table holds no words with tags", ".conll", ".jsonl"]),
    ("a.docx", "", {}, ["unknown type of file", ".conll, .bio"]),
    ("a.conll", "\n\n", {}, ["holds no example"]),
    ("a.conll", "-DOCSTART- O\n", {}, ["holds no example"]),
    ("a.conll", "a O\nb\n", {}, [": line 2: too few columns", "'b'", "a tab and its tag"]),
    ("a.conll", "a O\n\tO\n", {}, [": line 2: too few columns", "'O'"]),
    ("a.conll", "a O\n", {"label": "2"}, [": line 1: 2 columns", "number 2", "data.label_column"]),
    ("a.conll", "a O\n", {"label": "tag"}, ["data.label_column=tag", "no names of columns", "leave the key out"]),
    ("a.conll", "a\tO\n \tO\n", {}, [": line 2: the word (data.text_column) is empty"]),
    ("a.conll", "x O\n\na O\nb NOUN\n", {}, [": line 4: tag 'NOUN' is not BIO", "tags are B-, I-, E- or S-"]),
    ("a.conll", "x O\na B-\n", {}, [": line 2: tag 'B-' is not BIO"]),
    ("a.conll", "x O\na Other\n", {}, [": line 2: tag 'Other' is not BIO"]),
    ("a.conll", b"a O\nb\xe9 O\n", {}, [": line 2: not UTF-8"]),
    ("a.jsonl", '{"tokens": ["a", "b"], "tags": ["O"]}', {}, [": line 1: 2 words but 1 tags", "one tag per word"]),
    ("a.jsonl", '{"tokens": [], "tags": []}', {}, [": line 1: no word", "delete the line"]),
    ("a.jsonl", '{"tokens": "a b", "tags": ["O"]}', {}, [": line 1: data.text_column", "a str, not a list"]),
    ("a.jsonl", '{"tokens": ["a"], "tags": "O"}', {}, [": line 1: data.label_column", "a str, not a list"]),
    ("a.jsonl", '{"tokens": ["a", ""], "tags": ["O", "O"]}', {}, [": line 1: word 2: the word", "is empty"]),
    ("a.jsonl", '{"tokens": ["a", "b"], "tags": ["O", "X-a"]}', {}, [": line 1: word 2: tag 'X-a' is not BIO"]),
    ("a.jsonl", '{"tokens": ["a"], "tags": [null]}', {}, [": line 1: word 1: the label (data.label_column) is empty"]),
    ("a.jsonl", '{"text": ["a"], "tags": ["O"]}', {}, ["no column tokens or words", "text, tags", "data.text_column"]),
]


@pytest.mark.parametrize(("name", "content", "columns", "words"), TAG_MISTAKES)
def test_what_cannot_be_tagged(
    tmp_path: Path, name: str, content: str | bytes, columns: dict[str, str], words: list[str]
) -> None:
    path = written(tmp_path / name, content)
    line = mistake(path, "tag", **columns)
    assert line.startswith(str(path))
    assert [word for word in words if word not in line] == [], line


def test_words_with_tags_have_no_pair(tmp_path: Path) -> None:
    line = mistake(written(tmp_path / "a.conll", "a O\n"), "tag", text_pair="x")
    assert line == "data.text_pair_column=x: words with tags have no second text; leave the key out"


def test_what_is_not_there(tmp_path: Path) -> None:
    assert mistake(tmp_path / "a.tsv") == f"{tmp_path}/a.tsv: no such file or folder"
    assert "matches no file" in mistake(tmp_path / "*.tsv")
    (tmp_path / "empty").mkdir()
    assert "no file to read" in mistake(tmp_path / "empty")
    assert "standard input cannot be read again" in mistake("-")


def test_columns_of_parquet_that_cannot_be_used(tmp_path: Path) -> None:
    path = table(tmp_path / "a.parquet", {"text": ["a"], "stars": [1]})
    assert mistake(path) == f"{path}: no column label; the columns are text, stars; name one with data.label_column"
    assert "data.label_column=x: no such column; the columns are text, stars" in mistake(path, label="x")
    feature = {"names": ["neg", "pos"], "_type": "ClassLabel"}
    path = table(tmp_path / "a.parquet", {"text": ["a", "b"], "label": [1, -1]}, {"label": feature})
    assert mistake(path).startswith(f"{path}: row 2: the label (data.label_column) is empty")
    bad = pyarrow.array([b"ok", b"\xff"]).cast(pyarrow.string(), safe=False)
    parquet.write_table(pyarrow.table({"text": bad, "label": [0, 1]}), path)
    assert mistake(path).startswith(f"{path}: row 2: not UTF-8")
