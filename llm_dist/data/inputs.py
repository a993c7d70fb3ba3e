"""Find input files and open them as streams of bytes, unpacked.

What a file is follows from its name: .txt, .jsonl, .parquet, .tar or .arrow, each also .gz or .zst. Memory stays
bounded whatever a file unpacks to. Knows nothing of what stands in a file.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import zstandard

from llm_dist.errors import UserError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

FORMATS = ("txt", "jsonl", "parquet", "tar", "arrow")
PACKINGS = ("gz", "zst")
KNOWN = ".txt, .jsonl, .parquet, .tar or .arrow, each also .gz or .zst"
STANDARD_INPUT = "-"

_ZSTD_READ_BYTES = (64, 8192)
"""Fewest and most packed bytes unpacked at once: zstd may unpack a block of 4 bytes to 128 KiB."""
_ZSTD_READY_BYTES = 256 << 10


@dataclass(frozen=True)
class InputFile:
    """One file to read documents from."""

    path: Path | None
    """None: standard input."""
    name: str
    """Stable name, unique among the inputs: relative to the folder or glob that brought the file."""
    format: str
    packing: str | None = None

    @property
    def shown(self) -> str:
        """How messages name the file."""
        return str(self.path) if self.path and self.name != STANDARD_INPUT else "standard input"


def find_files(inputs: Sequence[str]) -> tuple[list[InputFile], int]:
    """Files that `inputs` name, in a stable order, each once, and how many others were skipped.

    An input is a file, a folder (read recursively), a glob or `-`. Skipped are unknown and hidden files of folders and
    globs, and files that were already named.

    Raises:
        UserError: a file is missing or of an unknown type, a glob matches nothing, nothing is left to read.
    """
    found: list[InputFile] = []
    seen: set[Path] = set()
    names: dict[str, int] = {}
    num_skipped = 0
    for name, path in (pair for each in inputs for pair in expand(each)):
        file = InputFile(None, STANDARD_INPUT, "txt") if path is None else _typed(name, path)
        if path is not None and path.resolve() in seen:
            file = None
        if file is None:
            num_skipped += 1
            continue
        if path is not None:
            seen.add(path.resolve())
        found.append(file if file.name not in names else _renamed(file, names))
        names.setdefault(file.name, 1)
    if not found:
        shown = " ".join(inputs) or "nothing"
        raise UserError(f"{shown}: no file to read, {num_skipped} skipped; inputs are {KNOWN}")
    return found, num_skipped


def _renamed(file: InputFile, names: dict[str, int]) -> InputFile:
    names[file.name] += 1
    return InputFile(file.path, f"{file.name}~{names[file.name]}", file.format, file.packing)


def expand(text: str) -> Iterator[tuple[str, Path | None]]:
    """Names and paths of what an input means: a file, a folder's files, a glob's; standard input has no path."""
    path = Path(text)
    if text == STANDARD_INPUT:
        yield STANDARD_INPUT, None
    elif path.is_dir():
        yield from _walk(path, path.resolve().name)
    elif path.exists():
        if _typed(path.name, path) is None:
            raise UserError(f"{text}: unknown type of file; inputs are {KNOWN}")
        yield path.name, path
    elif glob.has_magic(text):
        matches = sorted(Path(match) for match in glob.glob(text, recursive=True))  # noqa: PTH207 (absolute globs)
        if not matches:
            raise UserError(f"{text}: matches no file; quote it if the shell should not expand it, or name a folder")
        root = _fixed_part(path)
        for match in matches:
            if match.is_file():
                yield str(root.resolve().name / match.relative_to(root)), match
    else:
        raise UserError(f"{text}: no such file or folder")


def _fixed_part(pattern: Path) -> Path:
    parts = []
    for part in pattern.parts:
        if glob.has_magic(part):
            break
        parts.append(part)
    return Path(*parts)


def _walk(folder: Path, name: str) -> Iterator[tuple[str, Path]]:
    """Files below `folder`, sorted by path; links to folders are followed once."""
    seen: set[str] = set()
    files = []
    for parent, folders, leaves in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        files += [Path(parent) / leaf for leaf in _own_files(Path(parent), leaves)]
    for relative, path in sorted((path.relative_to(folder).as_posix(), path) for path in files):
        yield f"{name}/{relative}", path


def _own_files(folder: Path, leaves: list[str]) -> list[str]:
    """Files of a folder without what Hugging Face `datasets` keeps beside the data it saved there.

    Raises:
        UserError: several splits were saved there, of which one may be a test set.
    """
    try:
        if "dataset_dict.json" in leaves:
            splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
            if len(splits) > 1:
                raise UserError(f"{folder}: a dataset of {', '.join(splits)}; name one of them, {folder / splits[0]}")
        if "state.json" in leaves and "dataset_info.json" in leaves:
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            saved = {file["filename"] for file in state["_data_files"]}
            return [leaf for leaf in leaves if leaf in saved or not leaf.endswith(".arrow")]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{folder}: its dataset_dict.json or state.json is broken; save the dataset again") from None
    return leaves


def _typed(name: str, path: Path) -> InputFile | None:
    """The file as an input; None when its type is unknown or it is hidden below the folder that was named."""
    parts = path.name.lower().split(".")
    packing = parts.pop() if parts[-1] in PACKINGS else None
    is_hidden = any(part.startswith(".") for part in Path(name).parts[1:])
    if len(parts) < 2 or parts[-1] not in FORMATS or is_hidden:
        return None
    return InputFile(path, name, parts[-1], packing)


def content_of(file: InputFile) -> dict[str, Any]:
    """Name, size and sha256 of an input file as it lies on disk."""
    assert file.path is not None, "standard input has been spooled"
    with file.path.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256")
        return {"name": file.name, "bytes": stream.tell(), "sha256": sha256.hexdigest()}


class BrokenFileError(UserError):
    """Nothing more can be read from this file."""


@contextmanager
def naming(file: InputFile) -> Iterator[None]:
    """Turn what goes wrong while `file` is read into a `BrokenFileError` that names it."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise BrokenFileError(
            f"{file.shown}: broken .{file.packing} file ({_one_line(error)}); fetch it again"
        ) from None
    except OSError as error:
        raise BrokenFileError(f"{file.shown}: cannot be read ({error.strerror or _one_line(error)})") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


@contextmanager
def open_stream(file: InputFile) -> Iterator[BinaryIO]:
    """The bytes of `file`, unpacked while they are read."""
    if file.path is None:
        yield sys.stdin.buffer
        return
    with file.path.open("rb") as raw:
        if file.packing == "gz":
            with gzip.GzipFile(fileobj=raw) as stream:
                yield cast(BinaryIO, stream)
        elif file.packing == "zst":
            with io.BufferedReader(_ZstdStream(raw), 1 << 20) as stream:
                yield stream
        else:
            yield raw


@contextmanager
def open_seekable(file: InputFile) -> Iterator[BinaryIO]:
    """The bytes of `file` for random access; a packed file is unpacked to a temporary file first."""
    with open_stream(file) as stream:
        if file.packing is None:
            yield stream
            return
        with tempfile.TemporaryFile() as unpacked:
            shutil.copyfileobj(stream, unpacked, 1 << 20)
            yield cast(BinaryIO, unpacked)


class _ZstdStream(io.RawIOBase):
    """Frames one after another, unpacked; unlike zstandard's own reader it notices a file that ends too early."""

    def __init__(self, packed: BinaryIO) -> None:
        self._packed = packed
        self._pending = b""
        self._ready = memoryview(b"")
        self._frame: Any = None
        self._read_bytes = _ZSTD_READ_BYTES[0]

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        while not self._ready:
            if not self._refill():
                return 0
        into = memoryview(buffer).cast("B")
        size = min(len(into), len(self._ready))
        into[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def _refill(self) -> bool:
        self._pending = self._pending or self._packed.read(self._read_bytes)
        if not self._pending:
            if self._frame is not None:
                raise EOFError("it ends inside a frame")
            return False
        if self._frame is None:
            self._frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
        self._ready = memoryview(self._frame.decompress(self._pending))
        factor = 0.5 if len(self._ready) > _ZSTD_READY_BYTES else 2
        self._read_bytes = min(max(int(self._read_bytes * factor), _ZSTD_READ_BYTES[0]), _ZSTD_READ_BYTES[1])
        self._pending = self._frame.unused_data if self._frame.eof else b""
        if self._frame.eof:
            self._frame = None
        return True
