"""Open shards wherever they lie: in a folder of this machine, or behind a URL."""

from __future__ import annotations

from pathlib import Path

from llm_dist.data.index import ShardSet, open_shards

DEFAULT_CACHE = Path("~/.cache/llm_dist")
DEFAULT_CACHE_GIGABYTES = 16.0


def is_url(place: str) -> bool:
    """Whether shards lie behind a protocol of fsspec and not in a folder."""
    return "://" in place


def open_place(place: str, cache: Path = DEFAULT_CACHE, cache_gigabytes: float = DEFAULT_CACHE_GIGABYTES) -> ShardSet:
    """The shards of a folder or URL; what is fetched of the latter stays in `cache`, up to so many gigabytes.

    Raises:
        UserError: what is missing, damaged or of another format, and the way out.
    """
    if not is_url(place):
        return open_shards(place)
    from llm_dist.data.remote import open_remote

    return open_remote(place, cache.expanduser(), cache_gigabytes)
