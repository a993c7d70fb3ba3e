"""Labelled examples: what each kind of file gives."""

import gzip
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from llm_dist.data.examples import Columns, read_examples
from llm_dist.errors import UserError
from tests.unit.data.tiny_examples import WRITERS, json_lines, mistake, pairs, read, sentences, table, written


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


def test_examples_are_read_one_after_another(tmp_path: Path) -> None:
    path = written(tmp_path / "a.tsv", "a\t1\n" * 3 + "broken")
    examples = read_examples(str(path), Columns(), "classify")
    assert [next(examples).where for _ in range(3)] == [f"a.tsv: line {number}" for number in (1, 2, 3)]
    with pytest.raises(UserError):
        next(examples)


def test_reading_loads_no_torch() -> None:
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
