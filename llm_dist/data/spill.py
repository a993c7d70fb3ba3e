"""Shuffle more documents than memory holds: spill them to buckets on disk by a hash, then read bucket by bucket.

A document's hash is a pure function of (seed, number of the document). Reading gives the documents sorted by hash,
whatever the number of buckets. Knows ids and counts; not text, shards or who is held out.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, overload

import numpy as np
import numpy.typing as npt

BUCKET_BYTES = 128 << 20
MAX_BUCKETS = 256
"""Each is an open file; the usual limit is 1024 for the whole process."""
RECORD_TOKENS = 1 << 22
"""Tokens collected before they are dealt to the buckets, so that even the last of many buckets gets long runs."""
BLOCK_TOKENS = 1 << 22
"""Tokens given back at once; a longer document is a block of its own, and is not copied."""

_HEADER = struct.Struct("<QQ")
"""Documents and tokens of a record. Behind it stand numbers, hashes, sizes and bytes in 8-byte words, then all ids."""
_WORD = 8
_MASK = (1 << 64) - 1
Words = npt.NDArray[np.uint64]
Numbers = npt.NDArray[np.int64]
Ids = npt.NDArray[np.integer[Any]]


class Documents(NamedTuple):
    """Documents one after another."""

    numbers: Numbers
    """[n]; places in the input."""
    hashes: Words
    """[n]"""
    num_tokens: Numbers
    """[n]; separators count."""
    num_bytes: Numbers
    """[n]; UTF-8 bytes of the texts."""
    ids: Ids
    """[sum of `num_tokens`]; of each document its separator first."""

    def take(self, places: Numbers | npt.NDArray[np.bool_]) -> Documents:
        """The documents at `places`, in that order."""
        starts = np.cumsum(self.num_tokens) - self.num_tokens
        sizes = self.num_tokens[places]
        ids = gather(self.ids, starts[places], sizes)
        return Documents(self.numbers[places], self.hashes[places], sizes, self.num_bytes[places], ids)


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
    """Documents on their way through the shuffle; `write` all, then read `blocks` once."""

    def __init__(self, folder: Path, buckets: int, dtype: np.dtype[Any]) -> None:
        folder.mkdir()
        self._paths = [folder / f"bucket-{number:03d}" for number in range(buckets)]
        self._files: list[BinaryIO] = [path.open("wb") for path in self._paths]
        self._dtype = dtype
        self._waiting: list[Documents] = []

    def write(self, documents: Documents) -> None:
        """Append documents; `ids` are in the spill's dtype."""
        assert documents.ids.dtype == self._dtype, "ids are stored as they come"
        self._waiting.append(documents)
        if sum(len(waiting.ids) for waiting in self._waiting) >= RECORD_TOKENS:
            self._deal()

    def blocks(self) -> Iterator[Documents]:
        """All documents sorted by hash; valid until the next block. A bucket is deleted when it has been read."""
        self._deal()
        self.close()
        for path in self._paths:
            if path.stat().st_size:
                yield from _blocks(np.asarray(np.memmap(path, np.uint8, "r")), self._dtype)
            path.unlink()

    def close(self) -> None:
        """Close the files; a second call does nothing."""
        for file in self._files:
            file.close()

    def _deal(self) -> None:
        """Append what waits to the buckets."""
        if not self._waiting:
            return
        documents = Documents(*(np.concatenate(columns) for columns in zip(*self._waiting, strict=True)))
        self._waiting.clear()
        # The hash's high half decides, so that buckets follow one another in order of hash.
        buckets = (documents.hashes >> np.uint64(32)) * np.uint64(len(self._files)) >> np.uint64(32)
        order = np.argsort(buckets, kind="stable")
        bounds = buckets[order].searchsorted(np.arange(len(self._files) + 1, dtype=np.uint64)).tolist()
        for file, (first, end) in zip(self._files, pairwise(bounds), strict=True):
            if first < end:
                _write_record(file, documents.take(order[first:end]))


def _write_record(file: BinaryIO, documents: Documents) -> None:
    file.write(_HEADER.pack(len(documents.numbers), len(documents.ids)))
    for column in documents[:4]:
        file.write(column.data)
    file.write(documents.ids.data)
    file.write(bytes(-documents.ids.nbytes % _WORD))


def _blocks(content: npt.NDArray[np.uint8], dtype: np.dtype[Any]) -> Iterator[Documents]:
    """The documents of a bucket's file, sorted by hash; the file is mapped, never read as a whole."""
    numbers, words, sizes, num_bytes, starts = np.concatenate(list(_records(content, dtype.itemsize)), axis=1)
    hashes = words.view(np.uint64)
    order = np.argsort(hashes)
    ends = np.cumsum(sizes[order])
    ids = content[: len(content) // dtype.itemsize * dtype.itemsize].view(dtype)
    first = done = 0
    while first < len(order):
        last = max(first + 1, int(ends.searchsorted(done + BLOCK_TOKENS, side="right")))
        places = order[first:last]
        columns = numbers[places], hashes[places], sizes[places], num_bytes[places]
        yield Documents(*columns, gather(ids, starts[places], columns[2]))
        first, done = last, int(ends[last - 1])


def _records(content: npt.NDArray[np.uint8], itemsize: int) -> Iterator[Numbers]:
    """Per record [5, n]: its four columns, and where in the file each document's ids begin, counted in ids."""
    place = 0
    while place < len(content):
        num_documents, num_ids = _HEADER.unpack_from(content.data, place)
        place += _HEADER.size
        columns = content[place : place + 4 * _WORD * num_documents].view(np.int64).reshape(4, num_documents)
        place += columns.nbytes
        starts = place // itemsize + np.cumsum(columns[2]) - columns[2]
        yield np.concatenate([columns, starts[np.newaxis]])
        place += -(-num_ids * itemsize // _WORD) * _WORD


def gather(ids: Ids, starts: Numbers, sizes: Numbers) -> Ids:
    """Runs of `ids` one after another; neighbours are copied together, and one run alone is not copied."""
    if not len(starts):
        return ids[:0]
    ends = starts + sizes
    firsts = np.flatnonzero(np.append(True, starts[1:] != ends[:-1]))
    lasts = np.append(firsts[1:], len(starts)) - 1
    runs = [ids[start:end] for start, end in zip(starts[firsts].tolist(), ends[lasts].tolist(), strict=True)]
    return runs[0] if len(runs) == 1 else np.concatenate(runs)
