"""Open a shard folder and read its token stream at random, at the speed of memory.

The stream is every shard's chunks one after another, a circle: past its end it begins again. Opening reads
dataset.json, the index and the checksums and looks at file sizes; a block's checksum is proved when it is first
touched, so damage is named before the step that would use it. The bytes come from a `TokenReader`: `local`'s here, and
`remote`'s where the folder is a URL (`places`). Knows no order, no sequence length and no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from llm_dist.data.chunks import Chunks, Integers
from llm_dist.data.folder import (
    CONTINUES,
    TOKENIZER,
    check_counts,
    check_files,
    check_index,
    check_tokenizer,
    read_checksums,
    read_dataset,
    read_index,
)
from llm_dist.data.labels import open_labels
from llm_dist.data.local import LocalTokens

__all__ = ["ShardSet", "TokenReader", "open_shards", "read_chunks"]


class TokenReader(Protocol):
    """Where the bytes of chunks come from; what is read is proved."""

    is_remote: bool

    def piece(self, chunk: int, first: int, count: int) -> Integers:
        """`count` tokens of a chunk from its token `first` on; read-only."""

    def gather(self, chunks: Integers, firsts: Integers, count: int, out: Integers, rows: Integers) -> None:
        """Copy `count` tokens from token `firsts` [n] of `chunks` [n] on, inside it, to `rows` [n] of `out`."""

    def ends(self, chunk: int) -> npt.NDArray[np.uint32]:
        """Cumulative document ends inside a chunk; read-only."""

    def prefetch(self, spans: list[tuple[int, int, int]]) -> None:
        """Tokens that will be asked for soon: (chunk, first, count)."""

    def close(self) -> None:
        """Let go of files and threads."""


def open_shards(folder: str | Path) -> ShardSet:
    """Open a finished shard folder and prove what is cheap to prove: files, sizes, index, counts, dtype.

    Raises:
        UserError: what is missing, truncated or of another format, and the way out.
    """
    path = Path(folder)
    dataset = read_dataset(path)
    check_files(path, dataset)
    chunks = read_chunks(path, dataset, str(folder))
    return ShardSet(path, dataset, chunks, LocalTokens(path, chunks))


def read_chunks(metadata: Path, dataset: dict[str, Any], shown: str) -> Chunks:
    """Prove and read the tables beside dataset.json; `metadata` holds them and the tokenizer.

    Raises:
        UserError: what is missing or damaged.
    """
    check_counts(shown, dataset)
    rows = read_index(metadata, dataset)
    check_index(metadata, dataset, rows)
    checksums = read_checksums(metadata, dataset, rows)
    check_tokenizer(metadata, dataset["tokenizer"])
    return Chunks(shown, dataset, rows, checksums)


class ShardSet:
    """The token stream of one shard folder; `open_shards` makes it. Safe to read from several threads."""

    def __init__(self, metadata: Path, dataset: dict[str, Any], chunks: Chunks, reader: TokenReader) -> None:
        """`metadata` is a folder of this machine with the tokenizer."""
        self.folder = chunks.shown
        """As messages name it: a path or a URL."""
        self.dataset = dataset
        self.num_tokens: int = dataset["num_tokens"]
        self.num_documents: int = dataset["num_documents"]
        self.num_bytes: int = dataset["num_bytes"]
        self.vocabulary_tokens: int = dataset["vocabulary_tokens"]
        self.fingerprint: str = dataset["fingerprint"]
        self.tokenizer_fingerprint: str = dataset["tokenizer"]
        self.tokenizer_folder = metadata / TOKENIZER
        """The tokenizer that made the tokens."""
        self.dtype: np.dtype[Any] = chunks.dtype
        self.is_remote = reader.is_remote
        """Whether reading goes over a network, so that it helps to say what will be read."""
        self.chunks = chunks
        self.labels = open_labels(chunks.shown, dataset)
        """Of documents or of tokens, where they have any."""
        self._reader = reader

    def tokens(self, start: int, count: int) -> Integers:
        """`count` tokens from `start` on, circular, in the stored dtype; read-only and not copied inside a chunk.

        Raises:
            UserError: a block among them is damaged.
        """
        pieces = [self._reader.piece(*span) for span in self.spans(start, count)]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces) if pieces else np.empty(0, self.dtype)

    def spans(self, start: int, count: int) -> list[tuple[int, int, int]]:
        """The parts of chunks that make up `count` tokens from `start` on, circular: (chunk, first token, tokens)."""
        spans = []
        position, left = start % self.num_tokens, count
        while left:
            chunk = self.chunks.at(position)
            first = position - int(self.chunks.first_token[chunk])
            size = min(left, int(self.chunks.first_token[chunk + 1]) - position)
            spans.append((chunk, first, size))
            position, left = (position + size) % self.num_tokens, left - size
        return spans

    def gather(self, starts: Integers, count: int, out: Integers) -> None:
        """Write the `count` tokens from each of `starts` [n] on, circular, into `out` [n, count] of any integer dtype.

        Raises:
            UserError: a block among them is damaged.
        """
        if not len(starts):
            return
        chunks, firsts = self.chunks.locate(starts % self.num_tokens)
        crosses = firsts + count > self.chunks.num_tokens[chunks]
        rows = np.flatnonzero(~crosses)
        if len(rows) == len(chunks):
            self._reader.gather(chunks, firsts, count, out, rows)
            return
        self._reader.gather(chunks[rows], firsts[rows], count, out, rows)
        for row in np.flatnonzero(crosses).tolist():
            out[row] = self.tokens(int(starts[row]), count)

    def prefetch(self, start: int, count: int) -> None:
        """Say that `count` tokens from `start` on, circular, will be asked for soon."""
        self._reader.prefetch(self.spans(start, count))

    def document_starts(self, start: int, count: int) -> npt.NDArray[np.int64]:
        """Positions in [0, count), relative to `start`, at which a document begins (its separator stands); circular.

        They come from the stored document ends, by binary search; token ids are not looked at.

        Raises:
            UserError: the document ends of a chunk among them are damaged.
        """
        pieces = []
        done = 0
        for chunk, first, size in self.spans(start, count):
            ends = self.document_ends(chunk)[:-1]
            inside = ends[ends.searchsorted(np.uint32(first)) : ends.searchsorted(np.uint32(first + size))]
            if first == 0 and not self.chunks.continues(chunk):
                pieces.append(np.array([done], np.int64))
            pieces.append(inside.astype(np.int64) + (done - first))
            done += size
        return np.concatenate(pieces) if pieces else np.empty(0, np.int64)

    def document_ids(self, starts: Integers, count: int) -> npt.NDArray[np.int32]:
        """For rows of `count` tokens from `starts` [n] on: how many documents have begun in the row, [n, count].

        Raises:
            UserError: the document ends of a chunk among them are damaged.
        """
        borders, num_borders = self._borders(starts, count)
        # A row is cut at its borders into runs of one id, the first of which is empty where a document begins it.
        first_runs = np.cumsum(num_borders + 1) - num_borders - 1
        bounds = np.empty(len(borders) + len(starts) + 1, np.int64)
        is_border = np.ones(len(bounds), np.bool_)
        is_border[first_runs] = is_border[-1] = False
        bounds[is_border] = borders
        bounds[first_runs] = np.arange(len(starts)) * count
        bounds[-1] = len(starts) * count
        ids = (np.arange(len(bounds) - 1) - np.repeat(first_runs, num_borders + 1)).astype(np.int32)
        return np.repeat(ids, np.diff(bounds)).reshape(len(starts), count)

    def _borders(self, starts: Integers, count: int) -> tuple[Integers, Integers]:
        """Where documents begin in rows laid end to end, and how many do in each row: [borders], [n]."""
        chunks, firsts = self.chunks.locate(starts % self.num_tokens)
        # Between a chunk's first token and its last, documents begin where others end, and nowhere else.
        inside = (firsts > 0) & (firsts + count <= self.chunks.num_tokens[chunks])
        bounds = np.stack([firsts, firsts + count], axis=1).astype(np.uint32)
        pieces: list[Integers] = [np.empty(0, np.int64)]
        for row, (chunk, is_inside, bound) in enumerate(zip(chunks.tolist(), inside.tolist(), bounds, strict=True)):
            if is_inside:
                ends = self._reader.ends(chunk)
                low, high = ends.searchsorted(bound).tolist()
                pieces.append(ends[low:high])
            else:
                pieces.append(self.document_starts(int(starts[row]), count) + firsts[row])
        num_borders = np.array([len(piece) for piece in pieces[1:]], np.int64)
        to_row = np.repeat(np.arange(len(starts)) * count - firsts, num_borders)
        return np.concatenate(pieces) + to_row, num_borders

    def document_ends(self, chunk: int) -> npt.NDArray[np.uint32]:
        """Cumulative document ends inside one chunk, the last being its number of tokens; read-only.

        Raises:
            UserError: they are damaged.
        """
        return self._reader.ends(chunk)

    def first_documents(self) -> npt.NDArray[np.int64]:
        """[chunks]: number, in the stream, of the document to which each chunk's first token belongs."""
        counts = self.chunks.rows["num_documents"].astype(np.int64)
        continued = (self.chunks.rows["flags"] & CONTINUES).astype(np.int64)
        first: npt.NDArray[np.int64] = np.cumsum(counts) - counts - np.cumsum(continued)
        return first

    def close(self) -> None:
        """Let go of files and threads; a second call does nothing. Arrays handed out stay valid."""
        self._reader.close()
