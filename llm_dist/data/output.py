"""The folder that a tokenize job fills: made in a hidden folder, published by renames, never mixed with another job's.

Complete if and only if `train` is there: `holdout` is renamed into place before it. What a killed job left is
discarded by the next one. What it was made from is named by sha256, which a thread takes while the job goes on. Knows
nothing of text, tokenizers or how shards are made.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, Self

from llm_dist.data.folder import read_dataset
from llm_dist.data.inputs import InputFile
from llm_dist.errors import UserError

_UNPACKED = 5
"""Unpacked bytes per packed byte, to guess how many buckets are needed; the result does not depend on it."""
UNFINISHED = ".tmp"
"""Ends the name of a file that is being written."""
_WORK = ".making"
_PARTS = ("holdout", "train")
_COPY_BYTES = 1 << 20
_HASH_BYTES = 4 << 20
"""Read at once: few enough to be stopped soon, so many that the thread seldom asks for the interpreter."""


class BusyOutputError(UserError):
    """Another process is filling the folder."""


class Hashing:
    """Name, size and sha256 of input files as they lie on disk, taken in a thread; use in a `with` block."""

    def __init__(self, files: Sequence[InputFile]) -> None:
        self._is_over = threading.Event()
        self._thread = ThreadPoolExecutor(1, "hashing")
        self._contents = self._thread.submit(lambda: [self._content(file) for file in files])

    def result(self) -> list[dict[str, Any]]:
        """Of each file, in their order; waits for the last."""
        return self._contents.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """What is not hashed yet is not wanted any more."""
        self._is_over.set()
        self._thread.shutdown()

    def _content(self, file: InputFile) -> dict[str, Any]:
        assert file.path is not None, "standard input has been spooled"
        sha256 = hashlib.sha256()
        num_bytes = 0
        with file.path.open("rb", buffering=0) as stream:
            while (content := stream.read(_HASH_BYTES)) and not self._is_over.is_set():
                sha256.update(content)
                num_bytes += len(content)
        return {"name": file.name, "bytes": num_bytes, "sha256": sha256.hexdigest()}


class Output:
    """The output folder while one job holds it; use in a `with` block.

    Raises:
        UserError: `folder` is a file, or another process is filling it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.work = folder / _WORK
        """Everything unfinished; gone when the block ends."""

    def __enter__(self) -> Self:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"{self.folder}: a file stands in the way; choose another --out") from None
        self._descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._descriptor)
            raise BusyOutputError(
                f"{self.folder}: another process is filling it; wait, or choose another --out"
            ) from None
        except OSError:
            # Network file systems may know no lock on folders; there two jobs at once are the user's to avoid.
            self.is_locked = False
        else:
            self.is_locked = True
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.work)
        os.close(self._descriptor)

    def spooled(self, file: InputFile) -> InputFile:
        """Standard input as a file, since it is read more than once."""
        path = self.work / "standard_input.txt"
        with path.open("wb") as spool:
            shutil.copyfileobj(sys.stdin.buffer, spool, _COPY_BYTES)
        return replace(file, path=path)

    def dataset(self, part: str) -> dict[str, Any] | None:
        """dataset.json of `train` or `holdout`; None when the part is not there.

        Raises:
            UserError: something else stands under that name.
        """
        folder = self.folder / part
        return read_dataset(folder) if folder.exists() else None

    def is_empty(self) -> bool:
        """Whether neither part is there, so that there is nothing to compare with."""
        return not any((self.folder / part).exists() for part in _PARTS)

    def is_made_from(self, made_from: Mapping[str, Any]) -> bool:
        """Whether the output is finished and made from this; what a kill between the renames left is discarded.

        Raises:
            UserError: the folder holds shards made from something else.
        """
        parts = {part: self.dataset(part) for part in _PARTS}
        for part, dataset in parts.items():
            found = {} if dataset is None else dataset.get("made_from", {})
            differing = [key for key, value in made_from.items() if dataset is not None and found.get(key) != value]
            if differing:
                raise UserError(
                    f"{self.folder / part}: holds shards made from something else "
                    f"({', '.join(differing)} {'differs' if len(differing) == 1 else 'differ'}); "
                    "choose another --out, or delete that one"
                )
        if parts["train"] is None and parts["holdout"] is not None:
            shutil.rmtree(self.folder / "holdout")
        return parts["train"] is not None

    def publish(self) -> None:
        """Rename the finished parts into place, `train` last."""
        for part in _PARTS:
            if (self.work / part).exists():
                sync_folder(self.work / part)
                (self.work / part).rename(self.folder / part)
                sync_folder(self.folder)


def unpacked_bytes(file: InputFile) -> int:
    """How much text a file may hold, to guess how many buckets and workers are needed."""
    assert file.path is not None, "standard input has been spooled"
    return file.path.stat().st_size * (_UNPACKED if file.packing or file.format == "parquet" else 1)


def publish(path: Path, content: bytes) -> None:
    """Make `content` durable under a temporary name, then rename it to `path`."""
    unfinished = path.with_name(path.name + UNFINISHED)
    with unfinished.open("wb") as file:
        file.write(content)
        sync_file(file)
    unfinished.rename(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(file: BinaryIO) -> None:
    """Make what was written to `file` durable."""
    file.flush()
    os.fsync(file.fileno())
