"""A bounded folder of small files that all processes of a host share: what was fetched once need not come again.

A file appears whole under its name or not at all, and may vanish at any time, since any process may evict it: who
reads must be ready to fetch again. The files longest unused go first. Knows nothing of what is in them.
"""

from __future__ import annotations

import os
import tempfile
import threading
from pathlib import Path

from llm_dist.errors import UserError

_LEVELS = 256
"""Folders that files are spread over."""
_FILL = 0.9
"""Share of the bound that an eviction leaves."""
_RECOUNT = 64
"""The folder is looked through again whenever this process has added so small a part of the bound."""


class BlockCache:
    """Numbered blocks under one folder. Safe to use from several threads and processes."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """Raises `UserError` when the folder cannot be written."""
        self._folder = folder
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        try:
            for level in range(_LEVELS):
                (folder / f"{level:02x}").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another data.cache") from None
        self._added_bytes = 0
        self._known_bytes = self._evict(max_bytes)

    def read(self, name: str, first: int = 0, count: int | None = None) -> bytes | None:
        """`count` bytes of a block from byte `first` on, or all of it; None when it is not there."""
        try:
            descriptor = os.open(self._path(name), os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            return os.pread(descriptor, os.fstat(descriptor).st_size if count is None else count, first)
        finally:
            os.close(descriptor)

    def touch(self, name: str) -> None:
        """Say that a block is in use."""
        try:
            os.utime(self._path(name))
        except FileNotFoundError:
            return  # evicted meanwhile: its reader fetches it again

    def write(self, name: str, content: bytes | memoryview) -> None:
        """Add a block; what is longest unused makes room.

        Raises:
            UserError: the disk is full or the folder cannot be written.
        """
        self._make_room(len(content))
        path = self._path(name)
        try:
            with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
                file.write(content)
            Path(file.name).rename(path)
        except OSError as error:
            raise UserError(
                f"{self._folder}: cannot be written ({error.strerror}); free space, lower data.cache_gigabytes or "
                "choose another data.cache"
            ) from None

    def _make_room(self, num_bytes: int) -> None:
        with self._lock:
            self._known_bytes += num_bytes
            self._added_bytes += num_bytes
            is_full = self._known_bytes > self._max_bytes
            if is_full or self._added_bytes * _RECOUNT > self._max_bytes:
                self._known_bytes = num_bytes + self._evict(self._max_bytes - num_bytes)
                self._added_bytes = 0

    def _evict(self, max_bytes: int) -> int:
        """Delete until no more than `max_bytes` are left; the bytes left."""
        found = []
        for level in range(_LEVELS):
            with os.scandir(self._folder / f"{level:02x}") as entries:
                for entry in entries:
                    try:
                        status = entry.stat()
                    except FileNotFoundError:
                        continue  # another process was faster
                    found.append((status.st_mtime_ns, status.st_size, entry.path))
        total = sum(size for _, size, _ in found)
        if total <= max_bytes:
            return total
        for _, size, path in sorted(found):
            Path(path).unlink(missing_ok=True)
            total -= size
            if total <= _FILL * max_bytes:
                break
        return total

    def _path(self, name: str) -> Path:
        return self._folder / f"{hash_of(name) % _LEVELS:02x}" / name


def hash_of(name: str) -> int:
    """The same in every process, as `hash` is not."""
    import zlib

    return zlib.crc32(name.encode())
