"""Labelled examples: what each kind of file gives, and one line for whatever cannot be used."""

import gzip
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow
import pytest
import zstandard
from pyarrow import feather, ipc, parquet

from llm_dist.data.examples import Columns, Example, Task, read_examples
from llm_dist.errors import UserError


def read(path: Path | str, task: Task = "classify", **columns: str) -> list[Example]:
    return list(read_examples(str(path), Columns(**columns), task))


def pairs(path: Path | str, **columns: str) -> list[tuple[str, ...]]:
    return [(*example.texts, *example.labels) for example in read(path, **columns)]


def sentences(path: Path | str, **columns: str) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    return [(example.texts, example.labels) for example in read(path, "tag", **columns)]


def mistake(path: Path | str, task: Task = "classify", **columns: str) -> str:
    with pytest.raises(UserError) as caught:
        read(path, task, **columns)
    (line,) = str(caught.value).splitlines()
    return line


def written(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def json_lines(path: Path, *records: object) -> Path:
    return written(path, "".join(json.dumps(record) + "\n" for record in records))


WRITERS: dict[str, Callable[[pyarrow.Table, Path], None]] = {
    "a.parquet": parquet.write_table,
    "file.arrow": lambda table, path: feather.write_feather(table, path, "uncompressed"),
    "stream.arrow": lambda table, path: ipc.new_stream(path, table.schema).write_table(table),
}


def table(path: Path, columns: dict[str, Sequence[object]], features: object = None) -> Path:
    made = pyarrow.table(columns)
    if features is not None:
        made = made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    WRITERS[path.name](made, path)
    return path


@pytest.mark.parametrize(
    "header", ["", "text\tlabel\n", "Sentence\tLABEL\n", "words\ttags\n", "\ufefftokens\tlabel\r\n"]
)
def test_a_tsv_has_a_header_or_none_and_its_quotes_are_characters(tmp_path: Path, header: str) -> None:
    path = written(tmp_path / "a.tsv", f'{header}"so good\tgood\n\nhe said ""no""\t 0 \r\n')
    assert pairs(path) == [('"so good', "good"), ('he said ""no""', "0")]
    first = 2 if header else 1
    assert [example.where for example in read(path)] == [f"a.tsv: line {first}", f"a.tsv: line {first + 2}"]


def test_a_csv_is_quoted_and_named_by_the_line_at_which_a_record_begins(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", 'label,id,text\npos,1,"a ""b"",\nc"\nneg,2,d\n')
    assert pairs(path) == [('a "b",\nc', "pos"), ("d", "neg")]
    assert [example.where for example in read(path)] == ["a.csv: line 2", "a.csv: line 4"]


def test_a_text_of_a_csv_may_be_long(tmp_path: Path) -> None:
    text = "word " * 100_000
    assert pairs(written(tmp_path / "a.csv", f"{text},pos\n")) == [(text, "pos")]


def test_columns_are_named_or_numbered(tmp_path: Path) -> None:
    named = written(tmp_path / "a.tsv", "id\tquestion\tanswer\tstars\n7\tq\ta\t5\n")
    assert pairs(named, text="question", text_pair="answer", label="stars") == [("q", "a", "5")]
    assert pairs(named, text="1", text_pair="answer", label="3") == [("q", "a", "5")]
    numbered = written(tmp_path / "b.tsv", "5\tq\ttext\tlabel\n")
    assert pairs(numbered, text="1", text_pair="2", label="0") == [("q", "text", "5")]
    assert pairs(numbered, label="3") == [("5", "label")]


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
def test_json_lines(tmp_path: Path, packing: str) -> None:
    path = json_lines(
        tmp_path / "a.jsonl",
        {"text": "x\ty", "label": 3},
        {"label": True, "sentence": " z "},
        {"text": "é", "label": "n"},
    )
    content = path.read_bytes() + b" \n"
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[packing]
    path = written(tmp_path / f"a.jsonl{packing}", pack(content))
    assert pairs(path) == [("x\ty", "3"), (" z ", "true"), ("é", "n")]
    assert read(path)[1].where == f"a.jsonl{packing}: line 2"


@pytest.mark.parametrize("name", WRITERS)
def test_parquet_and_arrow(tmp_path: Path, name: str) -> None:
    path = table(tmp_path / name, {"id": [1, 2], "sentence": ["a", "b"], "label": [0, 1], "stars": ["x", "y"]})
    assert pairs(path) == [("a", "0"), ("b", "1")]
    assert pairs(path, text="stars", text_pair="sentence", label="id") == [("x", "a", "1"), ("y", "b", "2")]
    assert read(path)[1].where == f"{name}: row 2"


@pytest.mark.parametrize("name", WRITERS)
def test_integers_of_a_class_label_become_its_names(tmp_path: Path, name: str) -> None:
    feature = {"names": ["neg", "pos"], "_type": "ClassLabel"}
    path = table(tmp_path / name, {"text": ["a", "b"], "label": [1, 0]}, {"label": feature})
    assert pairs(path) == [("a", "pos"), ("b", "neg")]


@pytest.mark.parametrize("kind", ["List", "Sequence", "old"])
def test_integers_of_a_list_of_class_labels_become_their_names(tmp_path: Path, kind: str) -> None:
    feature = {"names": ["O", "B-x"], "_type": "ClassLabel"}
    listed = [feature] if kind == "old" else {"feature": feature, "_type": kind}
    columns = {"tokens": [["a", "b"]], "ner_tags": [[0, 1]]}
    assert sentences(table(tmp_path / "a.parquet", columns, {"ner_tags": listed})) == [(("a", "b"), ("O", "B-x"))]


def test_what_datasets_saves_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the extra hf")
    label = datasets.ClassLabel(names=["neg", "pos"])
    tags = datasets.Sequence(datasets.ClassLabel(names=["O", "B-x"]))
    features = {"text": datasets.Value("string"), "label": label, "words": datasets.Sequence(datasets.Value("string"))}
    made = datasets.Dataset.from_dict(
        {"text": ["a", "b"], "label": [1, 0], "words": [["c"], ["d", "e"]], "tags": [[1], [0, 1]]},
        features=datasets.Features({**features, "tags": tags}),
    )
    made.save_to_disk(tmp_path / "saved")
    assert pairs(tmp_path / "saved") == [("a", "pos"), ("b", "neg")]
    assert sentences(tmp_path / "saved") == [(("c",), ("B-x",)), (("d", "e"), ("O", "B-x"))]
    made.select([0]).cast_column("label", datasets.Value("int64")).save_to_disk(tmp_path / "plain")
    assert pairs(tmp_path / "plain") == [("a", "1")]


@pytest.mark.parametrize("name", ["a.conll", "a.bio", "a.iob", "a.iob2", "a.txt", "a.CONLL"])
def test_conll(tmp_path: Path, name: str) -> None:
    content = (
        '-DOCSTART- O\n\nEU NNP B-org\nrejects  VBZ O\r\n \t\n\n-DOCSTART-\tO\n#x\tI-a b\nNew York\tE-loc\t\n"\tS-x'
    )
    path = written(tmp_path / name, content)
    assert sentences(path) == [
        (("EU", "rejects"), ("B-org", "O")),
        (("#x", "New York", '"'), ("I-a b", "E-loc", "S-x")),
    ]
    assert [example.where for example in read(path, "tag")] == [f"{name}: line 3", f"{name}: line 8"]


def test_columns_of_conll_may_be_numbered(tmp_path: Path) -> None:
    path = written(tmp_path / "a.conll", "1 EU B-org x\n2 is O x\n")
    assert sentences(path, text="1", label="2") == [(("EU", "is"), ("B-org", "O"))]


def test_lists_of_words_and_tags(tmp_path: Path) -> None:
    path = json_lines(
        tmp_path / "a.jsonl",
        {"tokens": ["a", "b"], "tags": ["O", "B-x"]},
        {"words": ["c"], "ner_tags": [7]},
    )
    assert sentences(path) == [(("a", "b"), ("O", "B-x")), (("c",), ("7",))]
    path = table(tmp_path / "a.parquet", {"w": [["a"], ["b", "c"]], "t": [["O"], ["S-x", "O"]]})
    assert sentences(path, text="w", label="t") == [(("a",), ("O",)), (("b", "c"), ("S-x", "O"))]


def test_folders_and_globs_of_one_kind(tmp_path: Path) -> None:
    written(tmp_path / "d" / "2.tsv", "b\t1\n")
    written(tmp_path / "d" / "1.tsv", "text\tlabel\na\t0\n")
    for name in ("README.md", ".3.tsv", ".git/4.tsv"):
        written(tmp_path / "d" / name, "c\t2\n")
    assert pairs(tmp_path / "d") == pairs(f"{tmp_path}/d/*.tsv") == [("a", "0"), ("b", "1")]
    assert [example.where for example in read(tmp_path / "d")] == ["d/1.tsv: line 2", "d/2.tsv: line 1"]
    written(tmp_path / "d" / "x.csv", "b,1\n")
    line = mistake(tmp_path / "d")
    assert all(words in line for words in (f"{tmp_path}/d: ", "several kinds (.csv, .tsv)", "name one kind"))
    assert pairs(f"{tmp_path}/d/*.csv") == [("b", "1")]


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
    ("a.jsonl.gz", gzip.compress(b'{"text": "a", "label": 1}')[:-4], {}, ["broken .gz file", "fetch it again"]),
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
    ("a.conll", "x O\n\na O\nb NOUN\n", {}, [": line 4: tag 'NOUN' is not BIO", "O, or B-, I-, E- or S-"]),
    ("a.conll", "a B-\n", {}, [": line 1: tag 'B-' is not BIO"]),
    ("a.conll", "a Other\n", {}, [": line 1: tag 'Other' is not BIO"]),
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


def test_examples_are_read_one_after_another(tmp_path: Path) -> None:
    path = written(tmp_path / "a.tsv", "a\t1\n" * 3 + "broken")
    examples = read_examples(str(path), Columns(), "classify")
    assert [next(examples).where for _ in range(3)] == [f"a.tsv: line {number}" for number in (1, 2, 3)]
    with pytest.raises(UserError):
        next(examples)


def test_reading_loads_no_torch() -> None:
    import subprocess

    code = "import sys, llm_dist.data.labelled; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.data
def test_the_stanford_sentiment_treebank(data_folder: Callable[[str], Path]) -> None:
    labels = Counter(example.labels for example in read(data_folder("sst2") / "train.tsv"))
    assert labels == {("0",): 3310, ("1",): 3610}


@pytest.mark.data
def test_the_names_of_wnut_17(data_folder: Callable[[str], Path]) -> None:
    found = read(data_folder("ner_wnut17") / "train.conll", "tag")
    assert (len(found), sum(len(example.texts) for example in found)) == (3394, 62730)
    assert Counter(label for example in found for label in example.labels)["B-person"] == 660
