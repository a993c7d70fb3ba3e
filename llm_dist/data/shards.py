"""Write token shards: plain USTAR WebDataset tars, one index of them all, dataset.json last.

The same documents give the same bytes: member headers carry no time and no owner. A file stands under its own name
only when it is whole and durable, and a folder is a shard folder if and only if it has dataset.json. Knows ids and
byte counts; not text, tokenizers or order. `folder` holds the format's names.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterable, Mapping
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

CHUNK_TOKENS = 1 << 20
"""Fewer cost disk (framing), more cost the stock reader memory; 2-4 MB is also a good range request."""
SHARD_BYTES = 256 << 20

_BLOCK_BYTES = 512
_UNFINISHED = ".tmp"


def dtype_name(vocabulary_tokens: int) -> str:
    """The smallest stored dtype that holds every id."""
    return "uint16" if vocabulary_tokens <= 1 << 16 else "uint32"


def dataset_fingerprint(dtype: str, tokenizer: str, shard_sha256s: Iterable[str]) -> str:
    """Sha256 that names the token stream: which tokens, in which order, and what they mean."""
    return hashlib.sha256("\n".join([dtype, tokenizer, *shard_sha256s]).encode()).hexdigest()


class ShardWriter:
    """Writes one shard folder: in a `with` block, `add` documents in stream order, then `close`.

    Memory: one chunk. A document longer than a chunk is continued in the next ones and begins a chunk of its own;
    every other document is whole inside its chunk.
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
        self._chunk = _Chunk(self._dtype, chunk_tokens)
        self._shard_bytes = shard_bytes
        self._shard: _Shard | None = None
        self._shards: list[dict[str, Any]] = []
        self._rows: list[tuple[int, ...]] = []
        self._checksums: list[int] = []

    def add(self, ids: npt.NDArray[np.integer[Any]], num_bytes: int) -> None:
        """Append a document, separator first: ids [n], which come from `num_bytes` bytes of UTF-8 text."""
        assert len(ids), "a document has at least its separator"
        if len(ids) > self._chunk.room:
            self._flush()
        done = 0
        while done < len(ids):
            until = min(len(ids), done + self._chunk.room)
            # Bytes are dealt to the pieces by length, by a rule whose sum is exact.
            piece_bytes = num_bytes * until // len(ids) - num_bytes * done // len(ids)
            self._chunk.add(ids[done:until], piece_bytes, continues=done > 0)
            done = until
            if done < len(ids):
                self._flush()

    def close(self, tokenizer_files: Iterable[Path], made_from: Mapping[str, Any]) -> dict[str, Any]:
        """Finish the last shard, copy the tokenizer's files, write dataset.json; return its content."""
        self._flush()
        self._close_shard()
        assert self._shards, "a shard folder holds at least one document"
        tokenizer = self._folder / TOKENIZER
        tokenizer.mkdir()
        for path in tokenizer_files:
            publish(tokenizer / path.name, path.read_bytes())
        index, checksums = _npy(np.array(self._rows, INDEX_ROW)), _npy(np.array(self._checksums, "<u8"))
        publish(self._folder / INDEX, index)
        publish(self._folder / CHECKSUMS, checksums)
        dataset = {
            "format": FORMAT,
            "dtype": self._dtype.name,
            "tokenizer": self._tokenizer,
            "vocabulary_tokens": self._vocabulary_tokens,
            **{key: sum(shard[key] for shard in self._shards) for key in ("num_tokens", "num_documents", "num_bytes")},
            "fingerprint": dataset_fingerprint(
                self._dtype.name, self._tokenizer, (shard["sha256"] for shard in self._shards)
            ),
            "index_sha256": hashlib.sha256(index).hexdigest(),
            "checksums_sha256": hashlib.sha256(checksums).hexdigest(),
            "made_from": dict(made_from),
            "shards": self._shards,
        }
        publish(self._folder / DATASET, (json.dumps(dataset, indent=1, sort_keys=True) + "\n").encode())
        return dataset

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Give an open file back; what was not closed stays unfinished."""
        if self._shard is not None:
            self._shard.file.close()
            self._shard = None

    def _flush(self) -> None:
        if not self._chunk.num_tokens:
            return
        if self._shard is None:
            self._shard = _Shard(self._folder / f"shard-{len(self._shards):06d}.tar")
        self._rows.append(self._shard.append(f"{len(self._rows):09d}", self._chunk, self._tokenizer))
        self._checksums += self._chunk.checksums()
        self._chunk.clear()
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
        self.ends: list[int] = []
        self.flags = 0

    @property
    def room(self) -> int:
        """Tokens that still fit."""
        return len(self.tokens) - self.num_tokens

    def checksums(self) -> list[int]:
        """Checksum of each block of tokens."""
        tokens = self.tokens[: self.num_tokens]
        return [checksum(tokens[first : first + BLOCK_TOKENS].data) for first in range(0, len(tokens), BLOCK_TOKENS)]

    def add(self, ids: npt.NDArray[np.integer[Any]], num_bytes: int, *, continues: bool) -> None:
        end = self.num_tokens + len(ids)
        self.tokens[self.num_tokens : end] = ids
        self.num_tokens = end
        self.num_bytes += num_bytes
        self.ends.append(end)
        if continues:
            assert len(self.ends) == 1, "only a chunk's first document continues another"
            self.flags |= CONTINUES


class _Shard:
    """One tar being written under its unfinished name."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.file: BinaryIO = path.with_name(path.name + _UNFINISHED).open("wb")
        self._sha256 = hashlib.sha256()
        self._counts: Counter[str] = Counter()
        self.num_bytes = 0

    def append(self, key: str, chunk: _Chunk, tokenizer: str) -> tuple[int, ...]:
        """Write a chunk's members; return its row of the index."""
        tokens = chunk.tokens[: chunk.num_tokens]
        ends = np.array(chunk.ends, "<u4")
        about = {
            "format": FORMAT,
            "dtype": tokens.dtype.name,
            "tokenizer": tokenizer,
            "num_tokens": chunk.num_tokens,
            "num_documents": len(ends),
            "num_bytes": chunk.num_bytes,
            "continues": bool(chunk.flags & CONTINUES),
        }
        token_offset = self._member(f"{key}.tokens.npy", _npy(tokens)) - tokens.nbytes
        docs_offset = self._member(f"{key}.docs.npy", _npy(ends)) - ends.nbytes
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
            _sync_file(file)
        Path(self.file.name).rename(self._path)
        sync_folder(self._path.parent)
        return {
            "name": self._path.name,
            "bytes": self.num_bytes,
            "sha256": self._sha256.hexdigest(),
            **self._counts,
        }

    def _member(self, name: str, payload: bytes) -> int:
        """Append a file to the tar; return where its payload ends."""
        header = tarfile.TarInfo(name)
        header.size, header.mode, header.mtime = len(payload), 0o444, 0
        self._write(header.tobuf(tarfile.USTAR_FORMAT))
        self._write(payload)
        end = self.num_bytes
        self._write(bytes(-len(payload) % _BLOCK_BYTES))
        return end

    def _write(self, content: bytes) -> None:
        self.file.write(content)
        self._sha256.update(content)
        self.num_bytes += len(content)


def _npy(array: npt.NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def publish(path: Path, content: bytes) -> None:
    """Make `content` durable under a temporary name, then rename it to `path`."""
    unfinished = path.with_name(path.name + _UNFINISHED)
    with unfinished.open("wb") as file:
        file.write(content)
        _sync_file(file)
    unfinished.rename(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_file(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
