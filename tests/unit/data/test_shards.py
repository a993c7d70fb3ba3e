"""The shard format: stock tools read it, the same documents give the same bytes, its framing is small."""

import gc
import hashlib
import io
import json
import os
import subprocess
import tarfile
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from llm_dist.data import shards
from llm_dist.data.folder import BLOCK_TOKENS, CONTINUES
from llm_dist.data.shards import CHUNK_TOKENS, ShardWriter, dataset_fingerprint, dtype_name

Documents = Sequence[tuple[np.ndarray, int]]


def write(folder: Path, documents: Documents, vocabulary_tokens: int = 1000, **sizes: int) -> dict[str, Any]:
    with ShardWriter(folder, vocabulary_tokens, "tokenizer-sha", **sizes) as writer:
        for ids, num_bytes in documents:
            writer.add(ids, num_bytes)
        return writer.close([Path(__file__)], {"seed": 3})


def some_documents(lengths: Sequence[int]) -> Documents:
    stream = np.random.default_rng(0).integers(1, 1000, sum(lengths) + 1)
    ends = np.cumsum(lengths)
    return [(stream[end - length : end], 3 * length + 1) for end, length in zip(ends, lengths, strict=True)]


def members(folder: Path) -> list[tuple[str, tarfile.TarInfo, bytes]]:
    found = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            found += [(path.name, member, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
    return found


def arrays(folder: Path, extension: str) -> list[np.ndarray]:
    return [np.load(io.BytesIO(body)) for _, member, body in members(folder) if member.name.endswith(extension)]


def test_the_stock_webdataset_reads_every_token(tmp_path: Path) -> None:
    documents = some_documents([5, 60, 7, 300, 1, 40])
    dataset = write(tmp_path / "out", documents, chunk_tokens=64, shard_bytes=8000)
    urls = [str(tmp_path / "out" / shard["name"]) for shard in dataset["shards"]]
    assert len(urls) > 1
    with warnings.catch_warnings():
        # webdataset leaves files open for the collector.
        warnings.simplefilter("ignore", ResourceWarning)
        samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
        gc.collect()
    stream = np.concatenate([sample["tokens.npy"] for sample in samples])
    assert stream.dtype == np.uint16
    assert stream.tolist() == np.concatenate([ids for ids, _ in documents]).tolist()
    assert [sample["__key__"] for sample in samples] == [f"{number:09d}" for number in range(len(samples))]
    assert sum(sample["json"]["num_tokens"] for sample in samples) == dataset["num_tokens"] == len(stream)
    assert sum(sample["json"]["num_bytes"] for sample in samples) == dataset["num_bytes"]


@pytest.mark.parametrize(
    ("lengths", "sizes"),
    [
        ([5, 60, 7, 300, 1, 40], {"chunk_tokens": 64, "shard_bytes": 8000}),
        ([5, 2 * BLOCK_TOKENS, 70_000, 400_000, 1], {"chunk_tokens": 3 * BLOCK_TOKENS + 5, "shard_bytes": 600_000}),
    ],
)
def test_the_index_says_where_everything_lies(tmp_path: Path, lengths: list[int], sizes: dict[str, int]) -> None:
    out = tmp_path / "out"
    dataset = write(out, some_documents(lengths), **sizes)
    assert len(dataset["shards"]) > 1
    found = iter(zip(arrays(out, ".tokens.npy"), arrays(out, ".docs.npy"), strict=True))
    rows = iter(read_table(out, "index", dataset))
    checksums = iter(read_table(out, "checksums", dataset).tolist())
    for shard in dataset["shards"]:
        content = (out / shard["name"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == shard["sha256"]
        assert len(content) == shard["bytes"]
        for _ in range(shard["num_chunks"]):
            row, (tokens, ends) = next(rows), next(found)
            assert row["token_offset"] % 64 == 0
            assert np.frombuffer(content, "<u2", row["num_tokens"], row["token_offset"]).tolist() == tokens.tolist()
            assert np.frombuffer(content, "<u4", row["num_documents"], row["docs_offset"]).tolist() == ends.tolist()
            assert row["docs_checksum"] == xxh3_64_intdigest(ends)
            for first in range(0, len(tokens), BLOCK_TOKENS):
                assert next(checksums) == xxh3_64_intdigest(tokens[first : first + BLOCK_TOKENS])
    assert next(found, None) is next(rows, None) is next(checksums, None) is None


def read_table(folder: Path, name: str, dataset: dict[str, Any]) -> np.ndarray:
    content = (folder / f"{name}.npy").read_bytes()
    assert hashlib.sha256(content).hexdigest() == dataset[f"{name}_sha256"]
    table: np.ndarray = np.load(io.BytesIO(content))
    assert (table.ndim, table.dtype.itemsize) == (1, {"index": 44, "checksums": 8}[name])
    return table


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=40), chunk_tokens=st.integers(1, 32))
def test_documents_stay_whole_unless_longer_than_a_chunk(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], chunk_tokens: int
) -> None:
    out = tmp_path_factory.mktemp("shards") / "out"
    documents = some_documents(lengths)
    with patch("os.fsync"):
        dataset = write(out, documents, chunk_tokens=chunk_tokens, shard_bytes=6000)
    rows = np.load(out / "index.npy")
    found: list[list[int]] = []
    for row, tokens, ends in zip(rows, arrays(out, ".tokens.npy"), arrays(out, ".docs.npy"), strict=True):
        pieces = [piece.tolist() for piece in np.split(tokens, ends[:-1])]
        assert ends[-1] == len(tokens) <= chunk_tokens
        if row["flags"] & CONTINUES:
            found[-1] += pieces.pop(0)
            assert len(found[-1]) > chunk_tokens
        found += pieces
    assert found == [ids.tolist() for ids, _ in documents]
    totals = sum(lengths), len(lengths), sum(num_bytes for _, num_bytes in documents)
    assert (dataset["num_tokens"], dataset["num_documents"], dataset["num_bytes"]) == totals
    assert int(rows["num_bytes"].sum()) == totals[2]


def chunks_of(lengths: Sequence[int], chunk_tokens: int) -> list[list[int]]:
    """The rule by which documents go to chunks, in plain words: lengths of the pieces of each chunk."""
    chunks: list[list[int]] = [[]]
    for length in lengths:
        if length > chunk_tokens - sum(chunks[-1]):
            chunks.append([])
        chunks[-1].append(min(length, chunk_tokens))
        chunks += [[min(length - done, chunk_tokens)] for done in range(chunk_tokens, length, chunk_tokens)]
    return chunks[not chunks[0] :]


@settings(max_examples=100, deadline=None)
@given(
    groups=st.lists(st.lists(st.integers(1, 40), max_size=12), min_size=1, max_size=6).filter(any),
    chunk_tokens=st.integers(1, 32),
)
def test_many_at_once_give_the_bytes_of_one_by_one(
    tmp_path_factory: pytest.TempPathFactory, groups: list[list[int]], chunk_tokens: int
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    documents = iter(some_documents([length for group in groups for length in group]))
    lengths = [length for group in groups for length in group]
    sizes = {"chunk_tokens": chunk_tokens, "shard_bytes": 6000}
    with patch("os.fsync"):
        one_by_one = write(folder / "one", some_documents(lengths), **sizes)
        with ShardWriter(folder / "many", 1000, "tokenizer-sha", **sizes) as writer:
            for group in groups:
                own = [next(documents) for _ in group]
                ids = np.concatenate([np.empty(0, np.int64), *(ids for ids, _ in own)])
                # The caller's array is its own again as soon as the call is over.
                writer.add_many(ids, np.array(group, np.int64), np.array([size for _, size in own], np.int64))
                ids[:] = 999
            many = writer.close([Path(__file__)], {"seed": 3})
    assert many == one_by_one
    for path in (folder / "one").iterdir():
        assert path.is_dir() or path.read_bytes() == (folder / "many" / path.name).read_bytes()
    ends = arrays(folder / "many", ".docs.npy")
    assert [np.diff(each, prepend=0).tolist() for each in ends] == chunks_of(lengths, chunk_tokens)


def test_a_thread_that_cannot_write_stops_the_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards._Shard, "append", full)
    with (
        pytest.raises(OSError, match="No space left"),
        ShardWriter(tmp_path / "out", 1000, "tokenizer-sha", chunk_tokens=4) as writer,
    ):
        for _ in range(3):
            writer.add(np.arange(4), 4)
    assert not (tmp_path / "out" / "dataset.json").exists()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("shard-writer")]


def test_the_same_documents_give_the_same_bytes(tmp_path: Path) -> None:
    documents = some_documents([30] * 50)
    first, second = (write(tmp_path / name, documents, chunk_tokens=64, shard_bytes=9000) for name in ("a", "b"))
    assert first == second
    for path in (tmp_path / "a").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()


def test_members_are_plain_ustar_without_time_or_owner(tmp_path: Path) -> None:
    write(tmp_path / "out", some_documents([3]))
    for _, member, _ in members(tmp_path / "out"):
        assert (member.mtime, member.uid, member.gid, member.mode) == (0, 0, 0, 0o444)
        assert not member.pax_headers
    listed = subprocess.run(
        ["tar", "tf", tmp_path / "out" / "shard-000000.tar"], capture_output=True, text=True, check=True
    )
    assert listed.stdout.split() == ["000000000.tokens.npy", "000000000.docs.npy", "000000000.json"]
    assert not listed.stderr


def test_framing_costs_at_most_half_a_percent(tmp_path: Path) -> None:
    document = np.arange(600, dtype=np.uint16)
    dataset = write(tmp_path / "out", [(document, 2400)] * (4 * (CHUNK_TOKENS // 600)))
    # The tokenizer is a copy whose size has nothing to do with the format.
    files = [path for path in (tmp_path / "out").iterdir() if path.is_file()]
    payload_bytes = 2 * dataset["num_tokens"]
    assert {path.name for path in files} == {"shard-000000.tar", "index.npy", "checksums.npy", "dataset.json"}
    assert payload_bytes < sum(path.stat().st_size for path in files) <= 1.005 * payload_bytes


@pytest.mark.parametrize(("vocabulary_tokens", "dtype"), [(65_536, "uint16"), (65_537, "uint32")])
def test_the_smallest_dtype_that_holds_every_id(tmp_path: Path, vocabulary_tokens: int, dtype: str) -> None:
    assert dtype_name(vocabulary_tokens) == dtype
    ids = np.array([0, vocabulary_tokens - 1])
    dataset = write(tmp_path / "out", [(ids, 1)], vocabulary_tokens)
    (tokens,) = arrays(tmp_path / "out", ".tokens.npy")
    assert (tokens.dtype.name, tokens.tolist()) == (dtype, ids.tolist())
    assert (dataset["dtype"], dataset["vocabulary_tokens"]) == (dtype, vocabulary_tokens)


def test_the_fingerprint_names_tokens_order_and_meaning(tmp_path: Path) -> None:
    one, other = some_documents([5, 6])
    dataset = write(tmp_path / "a", [one, other])
    assert dataset["fingerprint"] == dataset_fingerprint("uint16", "tokenizer-sha", [dataset["shards"][0]["sha256"]])
    assert dataset["fingerprint"] != write(tmp_path / "b", [other, one])["fingerprint"]
    assert dataset["fingerprint"] != dataset_fingerprint("uint16", "another", [dataset["shards"][0]["sha256"]])
    assert json.loads((tmp_path / "a" / "dataset.json").read_text()) == dataset
    assert dataset["made_from"] == {"seed": 3}


def test_everything_is_durable_before_dataset_json_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, synced, renamed = tmp_path / "out", set[str](), list[str]()
    sync, rename = os.fsync, Path.rename

    def watch_sync(descriptor: int) -> None:
        synced.add(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        sync(descriptor)

    def watch_rename(path: Path, target: Path) -> Path:
        assert path.name in synced, f"{path} is renamed before it is durable"
        renamed.append(target.name)
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", watch_sync)
    monkeypatch.setattr(Path, "rename", watch_rename)
    write(out, some_documents([30] * 20), chunk_tokens=64, shard_bytes=9000)
    assert renamed[-1] == "dataset.json"
    assert sorted(renamed) == sorted(path.name for path in out.rglob("*") if path.is_file())


def test_an_unfinished_folder_has_no_dataset_json(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "out", 1000, "tokenizer-sha", chunk_tokens=4) as writer:
        writer.add(np.arange(9), 9)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["shard-000000.tar.tmp"]
