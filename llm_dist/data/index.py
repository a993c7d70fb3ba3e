"""Open a shard folder and read its token stream at random, at the speed of memory.

The stream is every shard's chunks one after another, a circle: past its end it begins again. Tars are memory-mapped and
never parsed: offsets, lengths and checksums come from the indices beside them. Opening reads dataset.json and the
indices (48 bytes per chunk) and looks at file sizes; a chunk's checksum is proved when it is first touched, so damage
is named before the step that would use it. Knows no order, no sequence length and no torch.
"""

from __future__ import annotations

import mmap
import os
import threading
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llm_dist.data.folder import (
    CONTINUES,
    DTYPES,
    FORMAT,
    INDEX_ROW,
    check_counts,
    check_shard,
    check_tokenizer,
    index_path,
    read_dataset,
    read_index,
    stored_dtype,
)
from llm_dist.errors import UserError

__all__ = ["CONTINUES", "DTYPES", "FORMAT", "INDEX_ROW", "ShardSet", "index_path", "open_shards", "read_dataset"]

MAX_OPEN_SHARDS = 256
"""A map holds a file descriptor; the usual limit is 1024 for the whole process."""

Integers = npt.NDArray[np.integer[Any]]


def open_shards(folder: str | Path) -> ShardSet:
    """Open a finished shard folder and prove what is cheap to prove: files, sizes, indices, counts, dtype.

    Raises:
        UserError: what is missing, truncated or of another format, and the way out.
    """
    path = Path(folder)
    dataset = read_dataset(path)
    check_counts(path, dataset)
    rows = [read_index(path, shard) for shard in dataset["shards"]]
    for shard, index in zip(dataset["shards"], rows, strict=True):
        check_shard(path, shard, index, DTYPES[dataset["dtype"]])
    check_tokenizer(path, dataset["tokenizer"])
    return ShardSet(path, dataset, rows)


class ShardSet:
    """The token stream of one shard folder; `open_shards` makes it. Safe to read from several threads."""

    def __init__(self, folder: Path, dataset: dict[str, Any], rows: list[np.ndarray]) -> None:
        self.folder = folder
        self.dataset = dataset
        self.num_tokens: int = dataset["num_tokens"]
        self.num_documents: int = dataset["num_documents"]
        self.num_bytes: int = dataset["num_bytes"]
        self.vocabulary_tokens: int = dataset["vocabulary_tokens"]
        self.fingerprint: str = dataset["fingerprint"]
        self.tokenizer_fingerprint: str = dataset["tokenizer"]
        self.dtype: np.dtype[Any] = DTYPES[dataset["dtype"]]
        self._rows = np.concatenate(rows)
        self._shard_of = np.repeat(np.arange(len(rows), dtype=np.int32), [len(index) for index in rows])
        self._first_token = np.zeros(len(self._rows) + 1, np.int64)
        np.cumsum(self._rows["num_tokens"], out=self._first_token[1:])
        self._shift = self._rows["token_offset"].astype(np.int64) // self.dtype.itemsize - self._first_token[:-1]
        self._docs = np.stack([self._rows["docs_offset"] // np.uint64(4), self._rows["num_documents"]], axis=1)
        self._tokens_checked = np.zeros(len(self._rows), np.bool_)
        self._documents_checked = np.zeros(len(self._rows), np.bool_)
        self._maps: dict[int, Integers] = {}
        self._lock = threading.Lock()
        self._closed = False

    @property
    def tokenizer_folder(self) -> Path:
        """The tokenizer that made the tokens."""
        return self.folder / "tokenizer"

    @property
    def num_chunks(self) -> int:
        """Chunks over all shards."""
        return len(self._rows)

    def tokens(self, start: int, count: int) -> Integers:
        """`count` tokens from `start` on, circular, in the stored dtype; read-only and not copied inside a chunk.

        Raises:
            UserError: a chunk among them is damaged.
        """
        pieces = []
        position, left = start % self.num_tokens, count
        while left:
            chunk = self.chunk_at(position)
            self._check_tokens(np.array([chunk]))
            size = min(left, int(self._first_token[chunk + 1]) - position)
            first = position + int(self._shift[chunk])
            pieces.append(self._shard(int(self._shard_of[chunk]))[first : first + size])
            position, left = (position + size) % self.num_tokens, left - size
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces) if pieces else np.empty(0, self.dtype)

    def gather(self, starts: Integers, count: int, out: Integers) -> None:
        """Write the `count` tokens from each of `starts` [n] on, circular, into `out` [n, count] of any integer dtype.

        Raises:
            UserError: a chunk among them is damaged.
        """
        starts = np.asarray(starts, np.int64) % self.num_tokens
        chunks = self._first_token.searchsorted(starts, side="right") - 1
        self._check_tokens(chunks)
        elements = (starts + self._shift[chunks]).tolist()
        across = starts + count > self._first_token[chunks + 1]
        for row, (shard, element) in enumerate(zip(self._shard_of[chunks].tolist(), elements, strict=True)):
            piece = self._shard(shard)[element : element + count]
            out[row, : len(piece)] = piece
        for row in np.flatnonzero(across).tolist() if across.any() else ():
            out[row] = self.tokens(int(starts[row]), count)

    def document_starts(self, start: int, count: int) -> npt.NDArray[np.int64]:
        """Positions in [0, count), relative to `start`, at which a document begins (its separator stands); circular.

        They come from the stored document ends, by binary search; token ids are not looked at.

        Raises:
            UserError: the document ends of a chunk among them are damaged.
        """
        pieces = []
        position, done = start % self.num_tokens, 0
        while done < count:
            chunk = self.chunk_at(position)
            base = int(self._first_token[chunk])
            low, high = position - base, min(position - base + count - done, int(self._first_token[chunk + 1]) - base)
            ends = self.document_ends(chunk)[:-1]
            inside = ends[ends.searchsorted(np.uint32(low)) : ends.searchsorted(np.uint32(high))]
            if low == 0 and not self.continues(chunk):
                pieces.append(np.array([done], np.int64))
            pieces.append(inside.astype(np.int64) + (done - low))
            done += high - low
            position = (base + high) % self.num_tokens
        return np.concatenate(pieces) if pieces else np.empty(0, np.int64)

    def document_marks(self, starts: Integers, count: int) -> npt.NDArray[np.int64]:
        """`document_starts` of many rows at once: [n, count], 1 where a document begins and 0 elsewhere.

        Raises:
            UserError: the document ends of a chunk among them are damaged.
        """
        starts = np.asarray(starts, np.int64) % self.num_tokens
        chunks = self._first_token.searchsorted(starts, side="right") - 1
        offsets = starts - self._first_token[chunks]
        # Between a chunk's first token and its last, documents begin where others end, and nowhere else.
        inside = (offsets > 0) & (starts + count <= self._first_token[chunks + 1])
        bounds = np.stack([offsets, offsets + count], axis=1).astype(np.uint32)
        pieces = [np.empty(0, np.uint32)]
        for chunk, bound in zip(chunks[inside].tolist(), bounds[inside], strict=True):
            ends = self.document_ends(chunk)
            first, last = ends.searchsorted(bound).tolist()
            pieces.append(ends[first:last])
        to_row = (np.flatnonzero(inside) * count - offsets[inside]).repeat([len(piece) for piece in pieces[1:]])
        marks = np.zeros(len(starts) * count, np.int64)
        marks[np.concatenate(pieces) + to_row] = 1
        rows = marks.reshape(len(starts), count)
        for row in np.flatnonzero(~inside).tolist():
            rows[row, self.document_starts(int(starts[row]), count)] = 1
        return rows

    def document_ends(self, chunk: int) -> npt.NDArray[np.uint32]:
        """Cumulative document ends inside one chunk, the last being its number of tokens; read-only."""
        first, size = self._docs[chunk].tolist()
        ends = self._shard(int(self._shard_of[chunk])).view(np.uint32)[first : first + size]
        if not self._documents_checked[chunk]:
            if zlib.crc32(ends.data) != self._rows["crc_docs"][chunk]:
                raise UserError(self._damage(chunk, "document ends"))
            self._documents_checked[chunk] = True
        return ends

    def chunk_at(self, position: int) -> int:
        """Number of the chunk, over all shards, that holds token `position` of the stream."""
        return int(self._first_token.searchsorted(position, side="right")) - 1

    def first_token(self, chunk: int) -> int:
        """Where a chunk begins in the stream."""
        return int(self._first_token[chunk])

    def first_documents(self) -> npt.NDArray[np.int64]:
        """[num_chunks]: number, in the stream, of the document to which each chunk's first token belongs."""
        counts = self._rows["num_documents"].astype(np.int64)
        continued = (self._rows["flags"] & CONTINUES).astype(np.int64)
        first: npt.NDArray[np.int64] = np.cumsum(counts) - counts - np.cumsum(continued)
        return first

    def place_of(self, chunk: int) -> tuple[str, int]:
        """Name of the shard that holds a chunk, and the chunk's number inside it."""
        shard = int(self._shard_of[chunk])
        return self.dataset["shards"][shard]["name"], chunk - int(self._shard_of.searchsorted(shard))

    def continues(self, chunk: int) -> bool:
        """Whether the chunk's first document began in an earlier chunk."""
        return bool(self._rows["flags"][chunk] & CONTINUES)

    def close(self) -> None:
        """Give the maps back; a second call does nothing. Arrays handed out stay valid."""
        with self._lock:
            self._closed = True
            self._maps.clear()

    def _check_tokens(self, chunks: Integers) -> None:
        checked = self._tokens_checked[chunks]
        if checked.all():
            return
        for chunk in np.unique(chunks[~checked]).tolist():
            first, end = (self._first_token[chunk : chunk + 2] + self._shift[chunk]).tolist()
            tokens = self._shard(int(self._shard_of[chunk]))[first:end]
            if zlib.crc32(tokens.data) != self._rows["crc_tokens"][chunk]:
                raise UserError(self._damage(chunk, "tokens"))
            self._tokens_checked[chunk] = True

    def _damage(self, chunk: int, what: str) -> str:
        name, within = self.place_of(chunk)
        found = stored_dtype(
            self._shard(int(self._shard_of[chunk])).view(np.uint8), int(self._rows["token_offset"][chunk])
        )
        why = "checksum differs" if found in (None, self.dtype) else f"stored as {found}, not {self.dtype}"
        return (
            f"{self.folder / name}: chunk {within} is damaged ({what}: {why}); "
            f"restore the shard, or tokenize again; llm-dist data verify {self.folder} names all damage"
        )

    def _shard(self, shard: int) -> Integers:
        """The whole tar as an array of tokens: one view serves all its chunks, their payloads being aligned."""
        content = self._maps.get(shard)
        return self._map(shard) if content is None else content

    def _map(self, shard: int) -> Integers:
        assert not self._closed, "read from a closed ShardSet"
        entry = self.dataset["shards"][shard]
        path = self.folder / entry["name"]
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise UserError(f"{path}: the shard is missing; restore it or tokenize again") from None
        try:
            content = np.frombuffer(mmap.mmap(descriptor, 0, prot=mmap.PROT_READ), self.dtype)
        finally:
            os.close(descriptor)
        if content.nbytes != entry["bytes"]:
            raise UserError(f"{path}: {content.nbytes} bytes instead of {entry['bytes']}; it changed while in use")
        with self._lock:
            # The oldest goes, not the least used: hits then need no lock.
            while len(self._maps) >= MAX_OPEN_SHARDS:
                del self._maps[next(iter(self._maps))]
            return self._maps.setdefault(shard, content)
