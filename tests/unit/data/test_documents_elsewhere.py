"""Documents of what others made: WebDataset tars and Hugging Face `datasets` folders."""

import gzip
import io
import json
import re
import tarfile
from pathlib import Path

import pyarrow
import pytest

from llm_dist.data.documents import Document, Tally, read_documents
from llm_dist.errors import UserError


def read(*inputs: Path, **options: object) -> list[Document]:
    return list(read_documents([str(each) for each in inputs], **options))  # type: ignore[arg-type]


def tar(*members: tuple[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            file.addfile(header, io.BytesIO(content))
    return buffer.getvalue()


MEMBERS = (
    ("a/1.txt", b"one"),
    ("a/1.json", b'{"text": "not this one"}'),
    ("a/1.jpg", b"\xff\xd8"),
    ("a/2.json", b'{"text": "two", "id": 7}'),
    ("a/3.cls", b"4"),
    ("b.json", b'{"text": "three"}'),
    ("c.seg.txt", b"no text of a sample"),
    ("d.txt", b"four"),
    ("d.txt", b"five"),
)


@pytest.mark.parametrize("packed", [False, True])
def test_a_webdataset_sample_is_a_document(tmp_path: Path, packed: bool) -> None:
    path = tmp_path / ("x.tar.gz" if packed else "x.tar")
    path.write_bytes(gzip.compress(tar(*MEMBERS)) if packed else tar(*MEMBERS))
    found = [(document.text, document.id) for document in read(path)]
    assert found == [("one", "a/1"), ("two", "7"), ("three", "b"), ("four", "d"), ("five", "d")]


def test_what_webdataset_writes_is_read(tmp_path: Path) -> None:
    import webdataset

    with (tmp_path / "x.tar").open("wb") as file, webdataset.TarWriter(file) as writer:
        for number in range(3):
            writer.write({"__key__": f"{number:04d}", "txt": f"text {number}", "json": {"n": number}})
    assert [document.text for document in read(tmp_path / "x.tar")] == ["text 0", "text 1", "text 2"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (tar(("a.txt", b"good"), ("b.json", b"{}")), "x.tar: sample b: no field `text` (it has none)"),
        (tar(("a.txt", b"good"), ("b.json", b"[1]")), "x.tar: sample b: a list, not a JSON object"),
        (tar(("a.txt", b"good"), ("b.json", b"{")), "x.tar: sample b: not JSON"),
        (tar(("a.txt", b"good"), ("b.txt", b"\xff")), "x.tar: sample b: not UTF-8 (at offset 0 of its .txt)"),
        (tar(("a.txt", b"good"), ("b.txt", b"x" * 5000))[:2048], "x.tar: broken .tar file (unexpected end of data)"),
    ],
)
def test_a_broken_sample_is_one_line_or_left_out(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(message)) as stopped:
        read(path)
    assert "\n" not in str(stopped.value)
    tally = Tally()
    assert [document.text for document in read(path, on_bad="skip", tally=tally)] == ["good"]
    assert tally.num_bad_records == 1


def test_a_tar_that_is_none_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"no tar at all")
    with pytest.raises(UserError, match=r"x.tar: broken .tar file \(.*\); fetch it again"):
        read(tmp_path / "x.tar")
    (tmp_path / "x.tar").write_bytes(tar(("a.jpg", b"1")))
    with pytest.raises(UserError, match="holds no document"):
        read(tmp_path / "x.tar")


def save(folder: Path, *tables: dict[str, list[object]]) -> None:
    """As `datasets.Dataset.save_to_disk` does, with a leftover of its cache."""
    folder.mkdir(parents=True)
    names = [f"data-{number:05d}-of-{len(tables):05d}.arrow" for number in range(len(tables))]
    for name, columns in zip([*names, "cache-0123.arrow"], [*tables, {"text": ["cached"]}], strict=True):
        table = pyarrow.table(columns)
        with pyarrow.ipc.new_stream(str(folder / name), table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    (folder / "dataset_info.json").write_text("{}")
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))


def test_a_saved_dataset_is_read_in_its_order(tmp_path: Path) -> None:
    save(tmp_path / "set", {"text": ["one", "two", "é"], "id": [4, 5, 6]}, {"text": ["three"], "id": [7]})
    assert [(document.text, document.id) for document in read(tmp_path / "set")] == [
        ("one", "4"),
        ("two", "5"),
        ("é", "6"),
        ("three", "7"),
    ]


def test_what_datasets_saves_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the extra hf")
    source = datasets.Dataset.from_dict({"text": ["one", "two", "three"], "label": [0, 1, 0]})
    source.select([2, 0]).save_to_disk(str(tmp_path / "set"))
    assert [document.text for document in read(tmp_path / "set")] == ["three", "one"]
    both = datasets.DatasetDict({"train": source, "test": source.select([1])})
    both.save_to_disk(str(tmp_path / "both"))
    with pytest.raises(UserError, match=r"both: a dataset of train, test; name one of them, .*both/train"):
        read(tmp_path / "both")
    assert [document.text for document in read(tmp_path / "both" / "train")] == ["one", "two", "three"]


def test_an_arrow_file_is_read_in_both_formats(tmp_path: Path) -> None:
    table = pyarrow.table({"text": ["one", "two"]})
    with pyarrow.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    assert [(document.text, document.id) for document in read(tmp_path / "a.arrow")] == [
        ("one", "a.arrow:1"),
        ("two", "a.arrow:2"),
    ]


def test_broken_datasets_are_one_line(tmp_path: Path) -> None:
    save(tmp_path / "set", {"content": ["one"]})
    with pytest.raises(UserError, match=r"no column `text` \(it has 'content'\)"):
        read(tmp_path / "set")
    (tmp_path / "set" / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"set: its dataset_dict.json or state.json is broken; save the dataset again"):
        read(tmp_path / "set")
    (tmp_path / "a.arrow").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match=r"a.arrow: broken .arrow file"):
        read(tmp_path / "a.arrow")
