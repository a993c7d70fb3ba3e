"""Read chunks of a shard folder behind a URL: blocks come by range requests and stay in a cache on this host's disk.

What is asked for and what will be asked for is fetched by two sets of threads, so that the first never waits for the
second. Every block is proved by its checksum when it arrives and when it is first found in the cache. The order of the
data is that of the same folder on a disk. Knows no order.
"""

from __future__ import annotations

import hashlib
import tempfile
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llm_dist import tokenizer
from llm_dist.data.cache import BlockCache
from llm_dist.data.chunks import Chunks, Integers
from llm_dist.data.fetch import Fetcher
from llm_dist.data.folder import BLOCK_TOKENS, CHECKSUMS, DATASET, INDEX, TOKENIZER, parse_dataset
from llm_dist.data.index import ShardSet, read_chunks
from llm_dist.errors import UserError

THREADS = 16
"""Requests at once, of what is asked for and of what will be."""
_ENDS_KEPT = 4096
_ARRIVALS = 3
"""How often a block may arrive damaged before its shard is called so."""

Run = tuple[int, range]
"""Neighbouring blocks of a chunk."""


def open_remote(url: str, cache: Path, cache_gigabytes: float) -> ShardSet:
    """Open a shard folder behind a URL; its tables and tokenizer are kept under `cache`, by fingerprint.

    Raises:
        UserError: it is not there, or not a shard folder of this format, or damaged; the cache cannot be written.
    """
    fetcher = Fetcher(url)
    dataset = remote_dataset(fetcher)
    folder = cache / "remote" / dataset["fingerprint"]
    _keep(fetcher, folder, INDEX, dataset["index_sha256"])
    _keep(fetcher, folder, CHECKSUMS, dataset["checksums_sha256"])
    for name in tokenizer.FILES:
        _keep(fetcher, folder, f"{TOKENIZER}/{name}", None)
    chunks = read_chunks(folder, dataset, fetcher.url)
    blocks = BlockCache(cache / "blocks", int(cache_gigabytes * 1e9))
    return ShardSet(folder, dataset, chunks, RemoteTokens(fetcher, blocks, chunks, dataset["fingerprint"]))


def remote_dataset(fetcher: Fetcher) -> dict[str, Any]:
    """dataset.json behind a URL."""
    try:
        content = fetcher.read(DATASET)
    except UserError as error:
        raise UserError(f"{error} (llm-dist tokenize makes shard folders; copy one there as it is)") from None
    return parse_dataset(content.decode(errors="replace"), fetcher.url)


def _keep(fetcher: Fetcher, folder: Path, name: str, sha256: str | None) -> None:
    """Fetch a file of the folder, unless it is there and whole."""
    path = folder / name
    if path.is_file() and (sha256 is None or hashlib.sha256(path.read_bytes()).hexdigest() == sha256):
        return
    content = fetcher.read(name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(content)
        Path(file.name).rename(path)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another data.cache") from None


class RemoteTokens:
    """Tokens and document ends by chunk, as `local.LocalTokens` gives them."""

    is_remote = True

    def __init__(self, fetcher: Fetcher, cache: BlockCache, chunks: Chunks, fingerprint: str) -> None:
        self._fetcher = fetcher
        self._cache = cache
        self._chunks = chunks
        self._prefix = fingerprint[:16]
        self._itemsize = chunks.dtype.itemsize
        self._lock = threading.Lock()
        self._proved: set[int] = set()
        """Blocks, numbered over all chunks, that have been in the cache and whole."""
        self._coming: dict[int, Future[None]] = {}
        self._asked = ThreadPoolExecutor(THREADS, "data.asked")
        self._ahead = ThreadPoolExecutor(THREADS, "data.ahead")
        self.ends = lru_cache(_ENDS_KEPT)(self._fetch_ends)

    def piece(self, chunk: int, first: int, count: int) -> Integers:
        """`count` tokens of a chunk from its token `first` on.

        Raises:
            UserError: they cannot be fetched, or are damaged at their source.
        """
        self._await([(chunk, _blocks(first, count))])
        return self._cached(chunk, first, count)

    def gather(self, chunks: Integers, firsts: Integers, count: int, out: Integers, rows: Integers) -> None:
        """Copy `count` tokens from token `firsts` [n] of `chunks` [n] on, each inside its chunk, to `rows` [n] of `out`.

        Their blocks are fetched side by side.

        Raises:
            UserError: they cannot be fetched, or are damaged at their source.
        """
        places = list(zip(chunks.tolist(), firsts.tolist(), strict=True))
        self._await((chunk, _blocks(first, count)) for chunk, first in places)
        for row, (chunk, first) in zip(rows.tolist(), places, strict=True):
            out[row] = self._cached(chunk, first, count)

    def prefetch(self, spans: list[tuple[int, int, int]]) -> None:
        """Begin to fetch what will be asked for: (chunk, first, count) each."""
        for chunk, first, count in spans:
            self._request((chunk, _blocks(first, count)), self._ahead)

    def close(self) -> None:
        """Stop fetching; a second call does nothing."""
        for threads in (self._asked, self._ahead):
            threads.shutdown(wait=True, cancel_futures=True)
        self._fetcher.close()

    def _await(self, runs: Iterable[Run]) -> None:
        """Have blocks in the cache."""
        for future in [future for run in runs for future in self._request(run, self._asked)]:
            future.result()

    def _request(self, run: Run, threads: ThreadPoolExecutor) -> list[Future[None]]:
        """Let threads fetch those blocks that are neither in the cache nor on their way; all that are on their way."""
        chunk, blocks = run
        base = int(self._chunks.first_block[chunk])
        with self._lock:
            coming = {self._coming[base + block] for block in blocks if base + block in self._coming}
            missing = [block for block in blocks if base + block not in self._proved | self._coming.keys()]
            for neighbours in _neighbours(missing):
                future = threads.submit(self._fetch, chunk, neighbours)
                coming.add(future)
                self._coming.update((base + block, future) for block in neighbours)
        return list(coming)

    def _fetch(self, chunk: int, blocks: range) -> None:
        """Bring neighbouring blocks of a chunk into the cache, by one request for each gap in it."""
        base = int(self._chunks.first_block[chunk])
        try:
            absent = [block for block in blocks if not self._is_cached(chunk, block)]
            for neighbours in _neighbours(absent):
                self._download(chunk, neighbours)
            with self._lock:
                self._proved.update(base + block for block in blocks)
        finally:
            with self._lock:
                for block in blocks:
                    self._coming.pop(base + block, None)

    def _is_cached(self, chunk: int, block: int) -> bool:
        name = self._name(chunk, block)
        content = self._cache.read(name)
        if content is None or not self._chunks.block_is_whole(chunk, block, content):
            return False
        self._cache.touch(name)
        return True

    def _download(self, chunk: int, blocks: range) -> None:
        bounds = [self._chunks.block_bounds(chunk, block) for block in blocks]
        begin = bounds[0][0]
        shard, _ = self._chunks.place_of(chunk)
        offset = int(self._chunks.rows["token_offset"][chunk])
        for _ in range(_ARRIVALS):
            first_byte, end_byte = (offset + bound * self._itemsize for bound in (begin, bounds[-1][1]))
            content = memoryview(self._fetcher.read(shard, first_byte, end_byte))
            parts = [content[(low - begin) * self._itemsize : (high - begin) * self._itemsize] for low, high in bounds]
            whole = [self._chunks.block_is_whole(chunk, block, part) for block, part in zip(blocks, parts, strict=True)]
            if all(whole):
                for block, part in zip(blocks, parts, strict=True):
                    self._cache.write(self._name(chunk, block), part)
                return
        raise self._chunks.damage(chunk, "tokens", "checksum differs")

    def _cached(self, chunk: int, first: int, count: int) -> Integers:
        """Tokens of blocks that were just in the cache; those that were evicted since are fetched again."""
        parts = []
        for block in _blocks(first, count):
            begin, end = self._chunks.block_bounds(chunk, block)
            low, high = max(first, begin), min(first + count, end)
            where = (low - begin) * self._itemsize, (high - low) * self._itemsize
            while (content := self._cache.read(self._name(chunk, block), *where)) is None:
                with self._lock:
                    self._proved.discard(int(self._chunks.first_block[chunk]) + block)
                self._await([(chunk, range(block, block + 1))])
            parts.append(np.frombuffer(content, self._chunks.dtype))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _fetch_ends(self, chunk: int) -> npt.NDArray[np.uint32]:
        """Cumulative document ends inside a chunk.

        Raises:
            UserError: they cannot be fetched, or are damaged at their source.
        """
        name = f"{self._prefix}-{chunk}-docs"
        content = self._cache.read(name)
        if content is None or not self._chunks.ends_are_whole(chunk, content):
            shard, _ = self._chunks.place_of(chunk)
            row = self._chunks.rows[chunk]
            first, size = int(row["docs_offset"]), 4 * int(row["num_documents"])
            for _ in range(_ARRIVALS):
                content = self._fetcher.read(shard, first, first + size)
                if self._chunks.ends_are_whole(chunk, content):
                    self._cache.write(name, content)
                    break
            else:
                raise self._chunks.damage(chunk, "document ends", "checksum differs")
        return np.frombuffer(content, np.uint32)

    def _name(self, chunk: int, block: int) -> str:
        return f"{self._prefix}-{chunk}-{block}"


def _blocks(first: int, count: int) -> range:
    return range(first // BLOCK_TOKENS, -(-(first + count) // BLOCK_TOKENS))


def _neighbours(blocks: list[int]) -> Iterator[range]:
    """Runs of numbers without a gap among rising `blocks`."""
    first = 0
    for place in range(1, len(blocks) + 1):
        if place == len(blocks) or blocks[place] != blocks[place - 1] + 1:
            yield range(blocks[first], blocks[place - 1] + 1)
            first = place
