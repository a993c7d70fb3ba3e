"""Read chunks of a shard folder behind a URL: blocks come by range requests and stay in a cache on this host's disk.

What is asked for and what will be asked for is fetched by two sets of threads, and what is asked for never waits behind
the other. Every item, a block of tokens or a chunk's document ends, is proved by its checksum when it arrives and when
it is first found in the cache. The order of the data is that of the same folder on a disk. Knows no order.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

from llm_dist.data.cache import BlockCache
from llm_dist.data.fetch import Fetcher
from llm_dist.data.folder import CHECKSUMS, DATASET, INDEX, parse_dataset
from llm_dist.data.index import ShardSet, read_chunks
from llm_dist.errors import UserError

THREADS = 16
"""Requests at once, of what is asked for and of what will be."""
_ENDS_KEPT = 4096
_ARRIVALS = 3
"""How often something may arrive damaged before its source is called so."""
_OPENING_PAUSE_SECONDS = 3.0
"""A URL that does not answer at the start is more likely wrong than out of order."""

Run = tuple[int, range]
"""Neighbouring items of a chunk."""

_cache_at = lru_cache(maxsize=None)(BlockCache)
"""One for all sources of a process, so that its count is exact."""


def open_remote(url: str, cache: Path, cache_gigabytes: float) -> ShardSet:
    """Open a shard folder behind a URL; its tables and tokenizer are kept under `cache`, by fingerprint.

    Raises:
        UserError: it is not there, or not a shard folder of this format, or damaged; the cache cannot be written.
    """
    fetcher = Fetcher(url)
    try:
        with ThreadPoolExecutor() as threads:
            opening = threads.submit(_cache_at, cache / "blocks", int(cache_gigabytes * 1e9))
            dataset = remote_dataset(fetcher)
            blocks = opening.result()
            folder = cache / "remote" / dataset["fingerprint"]
            coming = [
                threads.submit(_keep_table, fetcher, blocks, folder, name, dataset[f"{name.partition('.')[0]}_sha256"])
                for name in (INDEX, CHECKSUMS)
            ]
            _keep_tokenizer(fetcher, blocks, folder, dataset["tokenizer"], threads)
            for table in coming:
                table.result()
        chunks = read_chunks(folder, dataset, fetcher.url)
    except UserError:
        fetcher.close()
        raise
    return ShardSet(folder, dataset, chunks, RemoteTokens(fetcher, blocks, chunks, dataset["fingerprint"]))


def remote_dataset(fetcher: Fetcher) -> dict[str, Any]:
    """dataset.json behind a URL.

    Raises:
        UserError: it is not there, or not of this format.
    """
    try:
        return _arrived(
            lambda: parse_dataset(_at_opening(fetcher, DATASET).decode(errors="replace"), fetcher.url),
        )
    except FileNotFoundError:
        raise UserError("") from None


def _at_opening(fetcher: Fetcher, name: str) -> bytes:
    return fetcher.read(name, longest_pause_seconds=_OPENING_PAUSE_SECONDS)
