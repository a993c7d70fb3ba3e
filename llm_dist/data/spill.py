"""Shuffle more documents than memory holds: spill them to buckets on disk by a hash, then read bucket by bucket.

A document's hash is a pure function of (seed, number of the document). Reading gives the documents sorted by hash,
whatever the number of buckets. Knows ids and counts; not text, shards or who is held out.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, overload

import numpy as np
import numpy.typing as npt

BUCKET_BYTES = 128 << 20
MAX_BUCKETS = 256
"""Each is an open file; the usual limit is 1024 for the whole process."""

_HEADER = struct.Struct("<QQQQ")
_MASK = (1 << 64) - 1
Words = npt.NDArray[np.uint64]


class SpilledDocument(NamedTuple):
    """One document as it comes back."""

    number: int
    hash: int
    ids: npt.NDArray[np.integer[Any]]
    """Separator first; a view of the bucket, valid while it is read."""
    num_bytes: int


@overload
def mix64(word: int) -> int: ...
@overload
def mix64(word: Words) -> Words: ...
def mix64(word: Any) -> Any:
    """Bijection of 64-bit words whose every output bit depends on every input bit (finaliser of splitmix64, Vigna)."""
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _MASK
    return word ^ (word >> 31)


def document_hashes(seed: int, first_number: int, count: int) -> Words:
    """Hashes of documents [first_number, first_number + count); no two documents share one."""
    numbers = np.arange(first_number, first_number + count, dtype=np.uint64)
    return mix64(mix64(numbers + np.uint64(0x9E3779B97F4A7C15)) ^ np.uint64(mix64((seed + 1) & _MASK)))


def num_buckets(num_bytes: int) -> int:
    """Buckets for about that much text, so that each fits in memory."""
    return min(MAX_BUCKETS, 1 + num_bytes // BUCKET_BYTES)


class Spill:
    """Documents on their way through the shuffle; `write` all, then read `documents` once."""

    def __init__(self, folder: Path, buckets: int, dtype: np.dtype[Any]) -> None:
        folder.mkdir()
        self._paths = [folder / f"bucket-{number:03d}" for number in range(buckets)]
        self._files: list[BinaryIO] = [path.open("wb") for path in self._paths]
        self._dtype = dtype

    def write(
        self,
        first_number: int,
        hashes: Words,
        ids: npt.NDArray[np.integer[Any]],
        num_tokens: npt.NDArray[np.int64],
        num_bytes: npt.NDArray[np.int64],
    ) -> None:
        """Append documents numbered from `first_number`; `ids` holds them one after another, the rest is [n]."""
        ends = np.cumsum(num_tokens)
        each = zip(hashes.tolist(), ends.tolist(), num_tokens.tolist(), num_bytes.tolist(), strict=True)
        for number, (word, end, size, text_bytes) in enumerate(each, start=first_number):
            file = self._files[word * len(self._files) >> 64]
            file.write(_HEADER.pack(number, word, size, text_bytes))
            file.write(ids[end - size : end].data)

    def documents(self) -> Iterator[SpilledDocument]:
        """All documents, sorted by hash; each bucket is deleted when it has been read."""
        self.close()
        for path in self._paths:
            if path.stat().st_size:
                yield from self._bucket(np.asarray(np.memmap(path, np.uint8, "r")))
            path.unlink()

    def close(self) -> None:
        """Flush and close the files; a second call does nothing."""
        for file in self._files:
            file.close()

    def _bucket(self, content: npt.NDArray[np.uint8]) -> Iterator[SpilledDocument]:
        places = np.fromiter(self._places(content), np.uint64).reshape(-1, 2)
        for place in places[np.argsort(places[:, 0]), 1].tolist():
            number, word, size, text_bytes = _HEADER.unpack_from(content.data, place)
            first = place + _HEADER.size
            ids = content[first : first + size * self._dtype.itemsize].view(self._dtype)
            yield SpilledDocument(number, word, ids, text_bytes)

    def _places(self, content: npt.NDArray[np.uint8]) -> Iterator[int]:
        """Hash and place of each document, one after the other."""
        place = 0
        while place < len(content):
            _, word, size, _ = _HEADER.unpack_from(content.data, place)
            yield word
            yield place
            place += _HEADER.size + size * self._dtype.itemsize
