"""Write token shards: plain USTAR WebDataset tars, one index of them all, dataset.json last.

The same documents give the same bytes: member headers carry no time and no owner. A file stands under its own name
only when it is whole and durable, and a folder is a shard folder if and only if it has dataset.json. Knows ids and
byte counts; not text, tokenizers or order. `folder` holds the format's names.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt

from llm_dist.data.folder import (
    BLOCK_TOKENS,
    CHECKSUMS,
    CONTINUES,
    DATASET,
    DTYPES,
    FORMAT,
    INDEX,
    INDEX_ROW,
    TOKENIZER,
    checksum,
)
from llm_dist.data.output import UNFINISHED, publish, sync_file, sync_folder

CHUNK_TOKENS = 1 << 20
"""Fewer cost disk (framing), more cost the stock reader memory; 2-4 MB is also a good range request."""
SHARD_BYTES = 256 << 20

Ids = npt.NDArray[np.integer[Any]]
Numbers = npt.NDArray[np.int64]
Table = Mapping[str, Any]

_BLOCK_BYTES = 512


def dtype_name(vocabulary_tokens: int) -> str:
    """The smallest stored dtype that holds every id."""
    return "uint16" if vocabulary_tokens <= 1 << 16 else "uint32"


def dataset_fingerprint(dtype: str, tokenizer: str, shard_sha256s: Iterable[str], labels: Table | None = None) -> str:
    """Sha256 that names the token stream: which tokens, in which order, what they mean and how they are labelled."""
    parts = [dtype, tokenizer, *shard_sha256s] + ([json.dumps(labels, sort_keys=True)] if labels else [])
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


class ShardWriter:
    """Writes one shard folder: in a `with` block, add documents in stream order, then `close`.

    A thread hashes and writes a chunk while the next is filled. Memory: two chunks. A document longer than a chunk is
    continued in the next ones and begins a chunk of its own; every other document is whole inside its chunk.
    """

    def __init__(
        self,
        folder: Path,
        vocabulary_tokens: int,
        tokenizer_fingerprint: str,
        chunk_tokens: int = CHUNK_TOKENS,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        assert not any(folder.iterdir()), f"{folder} must be empty: one writer makes one folder"
        self._folder = folder
        self._vocabulary_tokens = vocabulary_tokens
        self._tokenizer = tokenizer_fingerprint
        self._dtype = DTYPES[dtype_name(vocabulary_tokens)]
        self._chunk, self._spare = (_Chunk(self._dtype, chunk_tokens) for _ in range(2))
        self._shard_bytes = shard_bytes
        self._shard: _Shard | None = None
        self._shards: list[dict[str, Any]] = []
        self._rows: list[tuple[int, ...]] = []
        self._checksums: list[int] = []
        self._thread = ThreadPoolExecutor(1, "shard-writer")
        self._written: Future[None] | None = None

    def add(self, ids: Ids, num_bytes: int) -> None:
        """Append a document, separator first: ids [n], which come from `num_bytes` bytes of UTF-8 text."""
        self.add_many(ids, np.array([len(ids)]), np.array([num_bytes]))

    def add_many(self, ids: Ids, num_tokens: Numbers, num_bytes: Numbers) -> None:
        """Append n documents: their ids one after another, tokens and bytes of each [n]."""
        assert (num_tokens > 0).all(), "a document has at least its separator"
        ends, bytes_ends = np.cumsum(num_tokens), np.cumsum(num_bytes)
        first = begin = bytes_begin = 0
        while first < len(ends):
            last = int(ends.searchsorted(begin + self._chunk.room, side="right"))
            if last == first and self._chunk.num_tokens:
                self._flush()
                continue
            last = max(last, first + 1)
            end, bytes_end = int(ends[last - 1]), int(bytes_ends[last - 1])
            if end - begin > self._chunk.room:
                self._add_long(ids[begin:end], bytes_end - bytes_begin)
            else:
                self._chunk.add(ids[begin:end], ends[first:last] - begin, bytes_end - bytes_begin)
            first, begin, bytes_begin = last, end, bytes_end

    def close(self, tokenizer_files: Iterable[Path], made_from: Table, labels: Table | None = None) -> dict[str, Any]:
        """Finish the last shard, copy the tokenizer's files, write dataset.json, `labels` too; return its content."""
        self._flush()
        self._wait()
        self._close_shard()
        assert self._shards, "a shard folder holds at least one document"
        tokenizer = self._folder / TOKENIZER
        tokenizer.mkdir()
        for path in tokenizer_files:
            publish(tokenizer / path.name, path.read_bytes())
        tables = np.array(self._rows, INDEX_ROW), np.array(self._checksums, "<u8")
        index, checksums = (_npy_header(table) + table.tobytes() for table in tables)
        publish(self._folder / INDEX, index)
        publish(self._folder / CHECKSUMS, checksums)
        sha256s = [shard["sha256"] for shard in self._shards]
        dataset = {
            "format": FORMAT,
            "dtype": self._dtype.name,
            "tokenizer": self._tokenizer,
            "vocabulary_tokens": self._vocabulary_tokens,
            **{key: sum(shard[key] for shard in self._shards) for key in ("num_tokens", "num_documents", "num_bytes")},
            "fingerprint": dataset_fingerprint(self._dtype.name, self._tokenizer, sha256s, labels),
            "index_sha256": hashlib.sha256(index).hexdigest(),
            "checksums_sha256": hashlib.sha256(checksums).hexdigest(),
            "made_from": dict(made_from),
            "shards": self._shards,
            **({"labels": dict(labels)} if labels else {}),
        }
        publish(self._folder / DATASET, (json.dumps(dataset, indent=1, sort_keys=True) + "\n").encode())
        return dataset

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Give thread and open file back; what was not closed stays unfinished."""
        self._thread.shutdown()
        if self._shard is not None:
            self._shard.file.close()
            self._shard = None

    def _add_long(self, ids: Ids, num_bytes: int) -> None:
        """A document that an empty chunk cannot hold: to as many as it fills."""
        for first in range(0, len(ids), self._chunk.room):
            if first:
                self._flush()
            piece = ids[first : first + self._chunk.room]
            # Bytes are dealt to the pieces by length, by a rule whose sum is exact.
            end = first + len(piece)
            piece_bytes = num_bytes * end // len(ids) - num_bytes * first // len(ids)
            self._chunk.add(piece, np.array([len(piece)]), piece_bytes, continues=first > 0)

    def _flush(self) -> None:
        """Hand the chunk to the thread, go on with the one it is done with."""
        if self._chunk.num_tokens:
            self._wait()
            self._written = self._thread.submit(self._write, self._chunk)
            self._chunk, self._spare = self._spare, self._chunk
            self._chunk.clear()

    def _wait(self) -> None:
        if self._written is not None:
            self._written.result()
            self._written = None

    def _write(self, chunk: _Chunk) -> None:
        if self._shard is None:
            self._shard = _Shard(self._folder / f"shard-{len(self._shards):06d}.tar")
        self._rows.append(self._shard.append(f"{len(self._rows):09d}", chunk, self._tokenizer))
        self._checksums += chunk.checksums()
        if self._shard.num_bytes >= self._shard_bytes:
            self._close_shard()

    def _close_shard(self) -> None:
        if self._shard is not None:
            self._shards.append(self._shard.close())
            self._shard = None


class _Chunk:
    """Documents waiting to be written together."""

    def __init__(self, dtype: np.dtype[Any], capacity_tokens: int) -> None:
        self.tokens = np.empty(capacity_tokens, dtype)
        self.clear()

    def clear(self) -> None:
        self.num_tokens = 0
        self.num_bytes = 0
        self.flags = 0
        self._ends: list[Numbers] = []

    @property
    def room(self) -> int:
        """Tokens that still fit."""
        return len(self.tokens) - self.num_tokens

    def ends(self) -> npt.NDArray[np.uint32]:
        """Where each document ends."""
        return np.concatenate(self._ends).astype("<u4")

    def checksums(self) -> list[int]:
        """Checksum of each block of tokens."""
        tokens = self.tokens[: self.num_tokens]
        return [checksum(tokens[first : first + BLOCK_TOKENS].data) for first in range(0, len(tokens), BLOCK_TOKENS)]

    def add(self, ids: Ids, ends: Numbers, num_bytes: int, *, continues: bool = False) -> None:
        """Append documents that end at `ends` of `ids`."""
        if continues:
            assert not self.num_tokens, "only a chunk's first document continues another"
            self.flags |= CONTINUES
        end = self.num_tokens + len(ids)
        self.tokens[self.num_tokens : end] = ids
        self._ends.append(ends + self.num_tokens)
        self.num_tokens = end
        self.num_bytes += num_bytes


class _Shard:
    """One tar being written under its unfinished name."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.file: BinaryIO = path.with_name(path.name + UNFINISHED).open("wb")
        self._sha256 = hashlib.sha256()
        self._counts: Counter[str] = Counter()
        self.num_bytes = 0

    def append(self, key: str, chunk: _Chunk, tokenizer: str) -> tuple[int, ...]:
        """Write a chunk's members; return its row of the index."""
        tokens = chunk.tokens[: chunk.num_tokens]
        ends = chunk.ends()
        about = {
            "format": FORMAT,
            "dtype": tokens.dtype.name,
            "tokenizer": tokenizer,
            "num_tokens": chunk.num_tokens,
            "num_documents": len(ends),
            "num_bytes": chunk.num_bytes,
            "continues": bool(chunk.flags & CONTINUES),
        }
        token_offset = self._member(f"{key}.tokens.npy", _npy_header(tokens), tokens.data) - tokens.nbytes
        docs_offset = self._member(f"{key}.docs.npy", _npy_header(ends), ends.data) - ends.nbytes
        self._member(f"{key}.json", json.dumps(about).encode())
        assert token_offset % 64 == docs_offset % 64 == 0, "memory maps of any dtype need aligned payloads"
        continued = chunk.flags & CONTINUES
        self._counts.update(
            num_chunks=1, num_tokens=len(tokens), num_documents=len(ends) - continued, num_bytes=chunk.num_bytes
        )
        offsets = token_offset, docs_offset
        return (*offsets, chunk.num_bytes, checksum(ends.data), len(tokens), len(ends), chunk.flags)

    def close(self) -> dict[str, Any]:
        """End the tar and publish it; return the shard's entry in dataset.json."""
        self._write(bytes(2 * _BLOCK_BYTES))
        with self.file as file:
            sync_file(file)
        Path(self.file.name).rename(self._path)
        sync_folder(self._path.parent)
        return {
            "name": self._path.name,
            "bytes": self.num_bytes,
            "sha256": self._sha256.hexdigest(),
            **self._counts,
        }

    def _member(self, name: str, *parts: bytes | memoryview) -> int:
        """Append a file to the tar; return where its payload ends."""
        header = tarfile.TarInfo(name)
        header.size, header.mode, header.mtime = sum(memoryview(part).nbytes for part in parts), 0o444, 0
        self._write(header.tobuf(tarfile.USTAR_FORMAT))
        for part in parts:
            self._write(part)
        end = self.num_bytes
        self._write(bytes(-header.size % _BLOCK_BYTES))
        return end

    def _write(self, content: bytes | memoryview) -> None:
        self.file.write(content)
        self._sha256.update(content)
        self.num_bytes += memoryview(content).nbytes


def _npy_header(array: npt.NDArray[Any]) -> bytes:
    """What stands before the array's bytes in an .npy file."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    return header.getvalue()
