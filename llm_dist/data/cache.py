"""A bounded folder of small files that all processes of a host share: what was fetched once need not come again.

A file appears whole under its name or not at all, and may vanish at any time, since any process may evict it: who
reads must be ready to fetch again. The files longest unused go first. Knows nothing of what is in them.

The bound holds for one process. Each further one adds files that the others have not seen: up to 1/64 of the bound,
and one file.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
import zlib
from pathlib import Path

from llm_dist.errors import UserError

_LEVELS = 256
"""Folders that files are spread over."""
_FILL = 0.9
"""Share of the bound that an eviction leaves."""
_RECOUNT = 64
"""The folder is looked through again whenever this process has added more than so small a part of the bound."""
_UNFINISHED = "unfinished-"
_LONGEST_WRITE_SECONDS = 3600.0
"""An unfinished file that is older was left behind by a process that was killed."""


class BlockCache:
    """Named blocks under one folder. Safe to use from several threads and processes."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """Raises `UserError` when the folder cannot be written."""
        self._folder = folder
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._added_bytes = 0
        """Since the folder was last looked through."""
        try:
            for level in range(_LEVELS):
                self._level(level).mkdir(parents=True, exist_ok=True)
            self._known_bytes = self._evict(max_bytes)
        except OSError as error:
            raise self._unwritable(error) from None

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

    def touch(self, name: str) -> bool:
        """Say that a block is in use; False when it is not there."""
        try:
            os.utime(self._path(name))
        except FileNotFoundError:
            return False
        return True

    def write(self, name: str, content: bytes | memoryview) -> None:
        """Add a block; what is longest unused makes room.

        Raises:
            UserError: the disk is full or the folder cannot be written.
        """
        try:
            with self._lock:
                self._make_room(len(content))
                self._publish(self._path(name), content)
        except OSError as error:
            raise self._unwritable(error) from None

    def write_beside(self, path: Path, content: bytes) -> None:
        """Write a file of the same disk that is no block: it neither counts nor is evicted, and survives a power cut.

        Raises:
            UserError: the disk is full or the folder cannot be written.
        """
        try:
            self._publish(path, content, is_durable=True)
        except OSError as error:
            raise self._unwritable(error) from None

    def _publish(self, path: Path, content: bytes | memoryview, *, is_durable: bool = False) -> None:
        for folder in (path.parent, self._level(0)):  # which a cleaner of old files may have taken away
            folder.mkdir(parents=True, exist_ok=True)
        # Where evictions look, so that what a kill leaves behind is found.
        descriptor, unfinished = tempfile.mkstemp(prefix=_UNFINISHED, dir=self._level(0))
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                if is_durable:
                    file.flush()
                    os.fsync(descriptor)
            Path(unfinished).rename(path)
        except OSError:
            Path(unfinished).unlink(missing_ok=True)
            raise

    def _make_room(self, num_bytes: int) -> None:
        self._known_bytes += num_bytes
        self._added_bytes += num_bytes
        if self._known_bytes > self._max_bytes or self._added_bytes * _RECOUNT > self._max_bytes:
            self._known_bytes = num_bytes + self._evict(self._max_bytes - num_bytes)
            self._added_bytes = num_bytes

    def _evict(self, max_bytes: int) -> int:
        """Delete what kills left behind and, of more than `max_bytes`, what is longest unused; the bytes left."""
        found = sorted(self._files())
        total = sum(size for _, size, _ in found)
        target = total if total <= max_bytes else int(_FILL * max_bytes)
        oldest = time.time_ns() - int(_LONGEST_WRITE_SECONDS * 1e9)
        for used, size, path in found:
            if used < oldest if f"/{_UNFINISHED}" in path else total > target:
                Path(path).unlink(missing_ok=True)
                total -= size
        return total

    def _files(self) -> list[tuple[int, int, str]]:
        """Time of last use, bytes and path of every file."""
        found = []
        for level in range(_LEVELS):
            try:
                with os.scandir(self._level(level)) as entries:
                    names = list(entries)
            except FileNotFoundError:
                continue
            for entry in names:
                try:
                    status = entry.stat()
                except FileNotFoundError:
                    continue  # another process was faster
                found.append((status.st_mtime_ns, status.st_size, entry.path))
        return found

    def _level(self, level: int) -> Path:
        return self._folder / f"{level:02x}"

    def _path(self, name: str) -> Path:
        # The same in every process, as `hash` is not.
        return self._level(zlib.crc32(name.encode()) % _LEVELS) / name

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"{self._folder}: cannot be written ({error.strerror}); free space, lower data.cache_gigabytes or choose "
            "another data.cache"
        )
