"""Read chunks of a shard folder on this machine: memory maps of the tars, proved block by block at first touch.

Tars are never parsed: where tokens lie comes from the index. Safe to use from several threads. Knows no order.
"""

from __future__ import annotations

import mmap
import os
import threading
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llm_dist.data.chunks import Chunks, Integers
from llm_dist.data.folder import BLOCK_TOKENS, stored_dtype
from llm_dist.errors import UserError

MAX_OPEN_SHARDS = 256
"""A map holds a file descriptor; the usual limit is 1024 for the whole process."""
_ROWS_WORTH_A_WINDOW = 4
"""Of one shard: fewer are copied one by one."""
_ROWS_AT_ONCE = 16
"""What is gathered stands between its shard and its rows for a moment; more would be new memory every time."""
_ENDS_KEPT = 2048
"""Proved document ends that are found without looking: views of the maps, of which none must outlive many others."""


class LocalTokens:
    """Tokens and document ends by chunk."""

    is_remote = False

    def __init__(self, folder: Path, chunks: Chunks) -> None:
        self._folder = folder
        self._chunks = chunks
        self._is_proved = np.zeros(int(chunks.first_block[-1]), np.bool_)
        self._ends: dict[int, npt.NDArray[np.uint32]] = {}
        self._maps: dict[int, Integers] = {}
        self._lock = threading.Lock()
        self._is_closed = False

    def piece(self, chunk: int, first: int, count: int) -> Integers:
        """`count` tokens of a chunk from its token `first` on; read-only, not copied.

        Raises:
            UserError: a block among them is damaged.
        """
        self._prove(chunk, first, count)
        element = int(self._chunks.first_element[chunk]) + first
        return self._shard(int(self._chunks.shard_of[chunk]))[element : element + count]

    def gather(self, chunks: Integers, firsts: Integers, count: int, out: Integers, rows: Integers) -> None:
        """Copy `count` tokens from token `firsts` [n] of `chunks` [n] on, inside it, to `rows` [n] of `out`.

        Raises:
            UserError: a block among them is damaged.
        """
        self._prove_all(chunks, firsts, count)
        shards, elements = self._chunks.shard_of[chunks], firsts + self._chunks.first_element[chunks]
        found = set(shards.tolist())
        if len(found) * _ROWS_WORTH_A_WINDOW > len(chunks):
            maps = {shard: self._shard(shard) for shard in found}
            for row, shard, first in zip(rows.tolist(), shards.tolist(), elements.tolist(), strict=True):
                out[row] = maps[shard][first : first + count]
            return
        for shard in found:
            own = np.flatnonzero(shards == shard) if len(found) > 1 else np.arange(len(shards))
            windows = self._windows(shard, count)
            for first in range(0, len(own), _ROWS_AT_ONCE):
                some = own[first : first + _ROWS_AT_ONCE]
                out[rows[some]] = windows[elements[some]]

    def _prove_all(self, chunks: Integers, firsts: Integers, count: int) -> None:
        blocks = self._chunks.first_block[chunks]
        first_proved, last_proved = (
            self._is_proved[blocks + tokens // BLOCK_TOKENS] for tokens in (firsts, firsts + count - 1)
        )
        are_proved = first_proved & last_proved if count <= BLOCK_TOKENS else np.zeros(len(chunks), np.bool_)
        if not are_proved.all():
            for place in np.flatnonzero(~are_proved).tolist():
                self._prove(int(chunks[place]), int(firsts[place]), count)

    def _windows(self, shard: int, count: int) -> Integers:
        """Every run of `count` tokens of a shard: rows of it are gathered in one call, without a loop in Python."""
        content = self._shard(shard)
        shape, strides = (len(content) - count + 1, count), 2 * content.strides
        return np.ndarray(shape, content.dtype, content, 0, strides)

    def ends(self, chunk: int) -> npt.NDArray[np.uint32]:
        """Cumulative document ends inside a chunk; read-only.

        Raises:
            UserError: they are damaged.
        """
        ends = self._ends.get(chunk)
        return self._prove_ends(chunk) if ends is None else ends

    def prefetch(self, spans: list[tuple[int, int, int]]) -> None:
        """The kernel reads ahead by itself."""

    def close(self) -> None:
        """Give the maps back; a second call does nothing. Arrays handed out stay valid."""
        with self._lock:
            self._is_closed = True
            self._maps.clear()
            self._ends.clear()

    def _prove(self, chunk: int, first: int, count: int) -> None:
        known, first_block = self._chunks, int(self._chunks.first_block[chunk])
        for block in range(first // BLOCK_TOKENS, -(-(first + count) // BLOCK_TOKENS)):
            if self._is_proved[first_block + block]:
                continue
            low, high = (int(known.first_element[chunk]) + bound for bound in known.block_bounds(chunk, block))
            shard = self._shard(int(known.shard_of[chunk]))
            if not known.block_is_whole(chunk, block, shard[low:high].data):
                raise known.damage(chunk, "tokens", self._why(shard, chunk))
            self._is_proved[first_block + block] = True

    def _prove_ends(self, chunk: int) -> npt.NDArray[np.uint32]:
        row = self._chunks.rows[chunk]
        first, size = int(row["docs_offset"]) // 4, int(row["num_documents"])
        ends = self._shard(int(self._chunks.shard_of[chunk])).view(np.uint32)[first : first + size]
        if not self._chunks.ends_are_whole(chunk, ends.data):
            raise self._chunks.damage(chunk, "document ends", "checksum differs")
        with self._lock:
            while len(self._ends) >= _ENDS_KEPT:
                del self._ends[next(iter(self._ends))]
            return self._ends.setdefault(chunk, ends)

    def _why(self, shard: Integers, chunk: int) -> str:
        found = stored_dtype(shard.view(np.uint8), int(self._chunks.rows["token_offset"][chunk]))
        dtype = self._chunks.dtype
        return "checksum differs" if found in (None, dtype) else f"stored as {found}, not {dtype}"

    def _shard(self, shard: int) -> Integers:
        """The whole tar as an array of tokens: one view serves all its chunks, their payloads being aligned."""
        content = self._maps.get(shard)
        return self._map(shard) if content is None else content

    def _map(self, shard: int) -> Integers:
        assert not self._is_closed, "read from closed shards"
        entry = self._chunks.shards[shard]
        path = self._folder / entry["name"]
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise UserError(f"{path}: the shard is missing; restore it or tokenize again") from None
        try:
            content = np.frombuffer(mmap.mmap(descriptor, 0, prot=mmap.PROT_READ), self._chunks.dtype)
        finally:
            os.close(descriptor)
        if content.nbytes != entry["bytes"]:
            raise UserError(f"{path}: {content.nbytes} bytes instead of {entry['bytes']}; it changed while in use")
        with self._lock:
            # The oldest goes, not the least used: hits then need no lock.
            while len(self._maps) >= MAX_OPEN_SHARDS:
                del self._maps[next(iter(self._maps))]
            return self._maps.setdefault(shard, content)
