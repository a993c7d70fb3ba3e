"""Read chunks of a shard folder behind a URL: blocks come by range requests and stay in a cache on this host's disk.

What is asked for and what will be asked for is fetched by two sets of threads, and what is asked for never waits behind
the other. Every item, a block of tokens or a chunk's document ends, is proved by its checksum when it arrives and when
it is first found in the cache. The order of the data is that of the same folder on a disk. Knows no order.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llm_dist import tokenizer
from llm_dist.data.cache import BlockCache
from llm_dist.data.chunks import Chunks, Integers
from llm_dist.data.fetch import Fetcher, NotThere
from llm_dist.data.folder import BLOCK_TOKENS, CHECKSUMS, DATASET, INDEX, TOKENIZER, parse_dataset
from llm_dist.data.index import ShardSet, read_chunks
from llm_dist.errors import UserError

ASKED_REQUESTS, AHEAD_REQUESTS = 32, 16
"""At once, of what is asked for and of what will be; the first are small, and somebody waits for them."""
_ENDS_KEPT = 4096
_ARRIVALS = 3
"""How often something may arrive damaged before its source is called so."""
_OPENING_PAUSE_SECONDS = 3.0
"""A URL that does not answer at the start is more likely wrong than out of order."""

Run = tuple[int, range]
"""A chunk, and neighbouring items of it."""

_cache_at = lru_cache(maxsize=None)(BlockCache)
"""One for all sources of a process, so that it knows what they add."""


def open_remote(url: str, cache: Path, cache_gigabytes: float) -> ShardSet:
    """Open a shard folder behind a URL; its tables and tokenizer are kept under `cache`, by fingerprint.

    Raises:
        UserError: it is not there, or not a shard folder of this format, or damaged; the cache cannot be written.
    """
    fetcher = Fetcher(url)
    with ThreadPoolExecutor() as threads:
        try:
            opening = threads.submit(_cache_at, cache / "blocks", int(cache_gigabytes * 1e9))
            dataset = remote_dataset(fetcher)
            folder, blocks = cache / "remote" / dataset["fingerprint"], opening.result()
            coming = [
                threads.submit(_keep, fetcher, blocks, folder, INDEX, _has_sha256(dataset["index_sha256"])),
                threads.submit(_keep, fetcher, blocks, folder, CHECKSUMS, _has_sha256(dataset["checksums_sha256"])),
                threads.submit(_keep_tokenizer, fetcher, blocks, folder, dataset["tokenizer"]),
            ]
            for each in coming:
                each.result()
            chunks = read_chunks(folder, dataset, fetcher.url)
        except BaseException:
            fetcher.close()  # so that no thread waits for the rest
            raise
    return ShardSet(folder, dataset, chunks, RemoteTokens(fetcher, blocks, chunks, dataset["fingerprint"]))


def remote_dataset(fetcher: Fetcher) -> dict[str, Any]:
    """dataset.json behind a URL.

    Raises:
        UserError: it is not there, or not of this format.
    """
    for arrival in range(1, _ARRIVALS + 1):
        try:
            content = fetcher.read(DATASET, longest_pause_seconds=_OPENING_PAUSE_SECONDS)
        except NotThere as error:
            raise UserError(f"{error} (llm-dist tokenize makes shard folders; copy one there as it is)") from None
        try:
            return parse_dataset(content.decode(errors="replace"), fetcher.url)
        except UserError:
            if arrival == _ARRIVALS:
                raise
    raise AssertionError


def _keep(fetcher: Fetcher, blocks: BlockCache, folder: Path, name: str, is_right: Callable[[bytes], bool]) -> None:
    """Fetch a file of the shard folder, unless it is there and right."""
    path = folder / name
    if path.is_file() and is_right(path.read_bytes()):
        return
    for _ in range(_ARRIVALS):
        content = fetcher.read(name, longest_pause_seconds=_OPENING_PAUSE_SECONDS)
        if is_right(content):
            blocks.write_beside(path, content)
            return
    raise UserError(f"{fetcher.url}/{name}: not the one that {DATASET} was written with; upload the whole folder again")


def _has_sha256(wanted: str) -> Callable[[bytes], bool]:
    return lambda content: hashlib.sha256(content).hexdigest() == wanted


def _keep_tokenizer(fetcher: Fetcher, blocks: BlockCache, folder: Path, fingerprint: str) -> None:
    """Fetch the tokenizer, unless it is there; it was proved when it came."""
    if all((folder / TOKENIZER / name).is_file() for name in tokenizer.FILES):
        return
    kinds: list[str] = []

    def describes(content: bytes) -> bool:
        table = _table(content)
        kinds.append(str(table.get("kind")))
        return bool(table.get("fingerprint") == fingerprint)

    def defines(content: bytes) -> bool:
        return tokenizer.fingerprint_of(_table(content), kinds[-1]) == fingerprint

    rules: dict[str, Callable[[bytes], bool]] = {
        tokenizer.DESCRIPTION_FILE: describes,
        tokenizer.DEFINITION_FILE: defines,
        tokenizer.HUGGING_FACE_FILE: lambda content: bool(_table(content)),
    }
    for name, is_right in rules.items():
        _keep(fetcher, blocks, folder, f"{TOKENIZER}/{name}", is_right)


def _table(content: bytes) -> dict[str, Any]:
    """The table in a JSON file; empty where there is none."""
    try:
        table = json.loads(content)
    except ValueError:
        return {}
    return table if isinstance(table, dict) else {}


class _Lane:
    """Requests of one urgency."""

    def __init__(self, name: str, requests: int) -> None:
        self.threads = ThreadPoolExecutor(requests, name)
        self.coming: dict[int, Future[None]] = {}
        """By item."""


class RemoteTokens:
    """Tokens and document ends by chunk, as `local.LocalTokens` gives them.

    Items are numbered over the whole folder: the blocks of all chunks, then the document ends of each.
    """

    is_remote = True

    def __init__(self, fetcher: Fetcher, cache: BlockCache, chunks: Chunks, fingerprint: str) -> None:
        self._fetcher = fetcher
        self._cache = cache
        self._chunks = chunks
        self._prefix = fingerprint[:16]
        self._itemsize = chunks.dtype.itemsize
        self._num_blocks = int(chunks.first_block[-1])
        self._is_proved = np.zeros(self._num_blocks + len(chunks), np.bool_)
        """Items that have been in the cache and whole; they may have been evicted since."""
        self._lock = threading.Lock()
        self._asked, self._ahead = _Lane("data.asked", ASKED_REQUESTS), _Lane("data.ahead", AHEAD_REQUESTS)
        self._wants_ends = False
        """Whether document ends have been asked for, so that they should come with their chunk's tokens."""
        self._lately: Integers = np.empty(0, np.int64)
        """Chunks that were last read together."""
        self.ends = lru_cache(_ENDS_KEPT)(self._read_ends)

    def piece(self, chunk: int, first: int, count: int) -> Integers:
        """`count` tokens of a chunk from its token `first` on.

        Raises:
            UserError: they cannot be fetched, or are damaged at their source.
        """
        self._await([(chunk, self._blocks(chunk, first, count))])
        return self._cached(chunk, first, count)

    def gather(self, chunks: Integers, firsts: Integers, count: int, out: Integers, rows: Integers) -> None:
        """Copy `count` tokens from token `firsts` [n] of `chunks` [n] on to `rows` [n] of `out`, fetched side by side.

        Raises:
            UserError: they cannot be fetched, or are damaged at their source.
        """
        self._lately = chunks
        places = list(zip(chunks.tolist(), firsts.tolist(), strict=True))
        self._await([(chunk, self._blocks(chunk, first, count)) for chunk, first in places])
        for row, (chunk, first) in zip(rows.tolist(), places, strict=True):
            out[row] = self._cached(chunk, first, count)

    def _read_ends(self, chunk: int) -> npt.NDArray[np.uint32]:
        """Cumulative document ends inside a chunk.

        Raises:
            UserError: they cannot be fetched, or are damaged at their source.
        """
        self._wants_ends = True
        # Those of the rows beside this one will be asked for next, one by one.
        self._request([self._ends_run(each) for each in np.unique(self._lately).tolist()], self._asked)
        run = self._ends_run(chunk)
        self._await([run])
        content = self._cache.read(self._name(run[1].start))
        return np.frombuffer(self._download(*run)[0] if content is None else content, np.uint32)

    def prefetch(self, spans: list[tuple[int, int, int]]) -> None:
        """Begin to fetch what will be asked for: (chunk, first, count) each."""
        runs = [(chunk, self._blocks(chunk, first, count)) for chunk, first, count in spans]
        if self._wants_ends:
            runs += [self._ends_run(chunk) for chunk, _, _ in spans]
        for _, items in runs:
            for item in items:
                if self._is_proved[item] and not self._cache.touch(self._name(item)):
                    self._is_proved[item] = False
        self._request(runs, self._ahead)

    def close(self) -> None:
        """Stop fetching; a second call does nothing."""
        self._fetcher.close()  # first, so that no thread waits for an answer
        for lane in (self._asked, self._ahead):
            lane.threads.shutdown(wait=True, cancel_futures=True)

    def _await(self, runs: Sequence[Run]) -> None:
        """Have items brought into the cache, from which they may be evicted at once."""
        while True:
            own, others = self._request(runs, self._asked)
            for future in own:
                future.result()
            # Not by `wait`, which never ends for one that is cancelled. Theirs may be the mistake of another item.
            if not any(future.exception() for future in others):
                return

    def _request(self, runs: Sequence[Run], lane: _Lane) -> tuple[list[Future[None]], list[Future[None]]]:
        """Let threads fetch those items that are neither proved nor on their way; these requests, and those found."""
        own: list[Future[None]] = []
        others: set[Future[None]] = set()
        if all(self._is_proved[items.start : items.stop].all() for _, items in runs):
            return own, []
        with self._lock:
            for chunk, items in runs:
                missing = []
                for item in (item for item in items if not self._is_proved[item]):
                    if (future := self._on_its_way(item, lane)) is None:
                        missing.append(item)
                    else:
                        others.add(future)
                for neighbours in _neighbours(missing):
                    future = lane.threads.submit(self._fetch, chunk, neighbours, lane)
                    lane.coming.update(dict.fromkeys(neighbours, future))
                    own.append(future)
        return own, [future for future in others if future not in own]

    def _on_its_way(self, item: int, lane: _Lane) -> Future[None] | None:
        """The request that brings an item; with the lock held."""
        future = self._asked.coming.get(item)
        if future is not None:
            return future
        future = self._ahead.coming.get(item)
        is_waiting = future is not None and not future.running() and not future.done()
        # What is asked for overtakes what only waits for a thread, which then finds nothing left to do.
        return None if lane is self._asked and is_waiting else future

    def _fetch(self, chunk: int, items: range, lane: _Lane) -> None:
        """Bring neighbouring items of a chunk into the cache, by one request for each gap in it."""
        try:
            with self._lock:
                left = [item for item in items if lane is self._asked or item not in self._asked.coming]
            absent = [item for item in left if not self._is_proved[item] and not self._is_cached(chunk, item)]
            for neighbours in _neighbours(absent):
                self._download(chunk, neighbours)
        finally:
            with self._lock:
                for item in items:
                    del lane.coming[item]

    def _is_cached(self, chunk: int, item: int) -> bool:
        content = self._cache.read(self._name(item))
        if content is None or not self._is_whole(chunk, item, content):
            return False
        self._is_proved[item] = self._cache.touch(self._name(item))
        return True

    def _download(self, chunk: int, items: range) -> list[memoryview]:
        """Fetch neighbouring items of a chunk and put each into the cache as soon as it is whole."""
        shard, _ = self._chunks.place_of(chunk)
        whole: dict[int, memoryview] = {}
        for _ in range(_ARRIVALS):
            for run in _neighbours([item for item in items if item not in whole]):
                bounds = [self._bounds(chunk, item) for item in run]
                begin = bounds[0][0]
                content = memoryview(self._fetcher.read(shard, begin, bounds[-1][1]))
                for item, (low, high) in zip(run, bounds, strict=True):
                    part = content[low - begin : high - begin]
                    if self._is_whole(chunk, item, part):
                        self._cache.write(self._name(item), part)
                        self._is_proved[item] = True
                        whole[item] = part
            if len(whole) == len(items):
                return [whole[item] for item in items]
        is_ends = items.start >= self._num_blocks
        raise self._chunks.damage(chunk, "document ends" if is_ends else "tokens", "checksum differs")

    def _cached(self, chunk: int, first: int, count: int) -> Integers:
        """Tokens of blocks that were just in the cache; what was evicted since is fetched again for this reader."""
        parts = []
        for item in self._blocks(chunk, first, count):
            begin, end = self._chunks.block_bounds(chunk, item - int(self._chunks.first_block[chunk]))
            low, high = max(first, begin), min(first + count, end)
            where, size = (low - begin) * self._itemsize, (high - low) * self._itemsize
            content: bytes | memoryview | None = self._cache.read(self._name(item), where, size)
            if content is None:
                content = self._download(chunk, range(item, item + 1))[0][where : where + size]
            parts.append(np.frombuffer(content, self._chunks.dtype))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _blocks(self, chunk: int, first: int, count: int) -> range:
        """The items that hold tokens of a chunk."""
        base = int(self._chunks.first_block[chunk])
        return range(base + first // BLOCK_TOKENS, base - (-(first + count) // BLOCK_TOKENS))

    def _ends_run(self, chunk: int) -> Run:
        return chunk, range(self._num_blocks + chunk, self._num_blocks + chunk + 1)

    def _bounds(self, chunk: int, item: int) -> tuple[int, int]:
        """First byte of an item in its shard, and the byte behind its last."""
        row = self._chunks.rows[chunk]
        if item >= self._num_blocks:
            first = int(row["docs_offset"])
            return first, first + 4 * int(row["num_documents"])
        low, high = self._chunks.block_bounds(chunk, item - int(self._chunks.first_block[chunk]))
        first = int(row["token_offset"])
        return first + low * self._itemsize, first + high * self._itemsize

    def _is_whole(self, chunk: int, item: int, content: bytes | memoryview) -> bool:
        if item >= self._num_blocks:
            return self._chunks.ends_are_whole(chunk, content)
        return self._chunks.block_is_whole(chunk, item - int(self._chunks.first_block[chunk]), content)

    def _name(self, item: int) -> str:
        return f"{self._prefix}-{item}"


def _neighbours(items: Sequence[int]) -> Iterator[range]:
    """Runs of numbers without a gap among rising `items`."""
    first = 0
    for place in range(1, len(items) + 1):
        if place == len(items) or items[place] != items[place - 1] + 1:
            yield range(items[first], items[place - 1] + 1)
            first = place
