"""What one rank's two files hold: ranges of state tensors in a plain safetensors file, and the table that names them.

Each state tensor is described by contiguous ranges of its C-order elements, whatever engine held it. Every byte of
the data file belongs to the header or to one piece, and each has its checksum (xxh3, 64 bits). Works on host arrays:
knows neither torch nor folders nor other ranks.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64, xxh3_64_hexdigest

from llm_dist.checkpoint.layout import (
    DamagedCheckpoint,
    Manifest,
    RankFiles,
    check_frame,
    data_name,
    read_checked,
    read_manifest,
    table_name,
)

Floats = NDArray[np.float32]
_CHUNK_ELEMENTS = 2**21
"""Elements hashed and moved at once (8 MiB): bounds the extra host memory."""
_ITEM_BYTES = 4


@dataclass(frozen=True)
class Piece:
    """Elements [start, stop) of a state tensor, as they lie in a data file."""

    start: int
    stop: int
    tensor: str
    """Key in the safetensors file."""
    offset_bytes: int
    """Where the first element lies, counted from the beginning of the file."""
    xxh3: str


@dataclass(frozen=True)
class Entry:
    """What one rank wrote of one state tensor."""

    shape: tuple[int, ...]
    pieces: list[Piece]


@dataclass(frozen=True)
class Table:
    """What one rank wrote."""

    rank: int
    data_bytes: int
    header_bytes: int
    header_xxh3: str
    state: dict[str, Entry]

    def to_bytes(self) -> bytes:
        """What rank_XXXXX.json holds."""
        return json.dumps(asdict(self), sort_keys=True).encode() + b"\n"

    def files(self, raw: bytes) -> RankFiles:
        """What the manifest records, given the table's own bytes."""
        return RankFiles(
            self.rank, len(raw), xxh3_64_hexdigest(raw), self.data_bytes, self.header_bytes, self.header_xxh3
        )


@dataclass(frozen=True)
class Source:
    """A range that a rank is about to write; `load` gives its elements on the host when their turn comes."""

    shape: tuple[int, ...]
    start: int
    num_elements: int
    load: Callable[[], Floats]

    @property
    def num_bytes(self) -> int:
        """Size on disk."""
        return self.num_elements * _ITEM_BYTES


def share_of_replica(num_elements: int, replica: int, num_replicas: int) -> tuple[int, int]:
    """Which part [begin, end) of a range held by several ranks this one writes, so that nothing is written twice."""
    return num_elements * replica // num_replicas, num_elements * (replica + 1) // num_replicas


def parse_table(raw: bytes) -> Table:
    """Undo `Table.to_bytes`."""
    fields = json.loads(raw)
    fields["state"] = {
        key: Entry(tuple(entry["shape"]), [Piece(**piece) for piece in entry["pieces"]])
        for key, entry in fields["state"].items()
    }
    return Table(**fields)


def read_table(folder: Path, files: RankFiles) -> Table:
    """The verified table of one rank.

    Raises:
        DamagedCheckpoint: it is missing or not what was written.
    """
    path = folder / table_name(files.rank)
    return parse_table(read_checked(path, files.table_bytes, files.table_bytes, files.table_xxh3))


def check_cover(tables: Iterable[Table]) -> dict[str, tuple[int, ...]]:
    """Shape of each state tensor, once it is sure that the pieces of all ranks hold every element exactly once.

    A breach is a defect of the engine that described its state, hence an assertion.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    ranges: dict[str, list[tuple[int, int]]] = {}
    for table in tables:
        assert not shapes or shapes.keys() == table.state.keys(), f"rank {table.rank} lists other tensors than rank 0"
        for key, entry in table.state.items():
            shape = shapes.setdefault(key, entry.shape)
            assert shape == entry.shape, f"{key}: rank {table.rank} says shape {entry.shape}, rank 0 says {shape}"
            ranges.setdefault(key, []).extend((piece.start, piece.stop) for piece in entry.pieces)
    for key, shape in shapes.items():
        end = 0
        for start, stop in sorted(ranges[key]):
            fault = "held by no rank" if start > end else "held twice"
            assert start == end, f"{key}: elements {min(start, end)} to {max(start, end)} are {fault}"
            end = stop
        assert end == math.prod(shape), f"{key}: elements {end} to {math.prod(shape)} are held by no rank"
    return shapes


def write_data(folder: Path, rank: int, sources: Mapping[str, Source], go_on: Callable[[], None]) -> Table:
    """Write and fsync the data file of `rank`; `go_on` is called now and then and may raise.

    Raises:
        OSError: the file system's own.
    """
    header, offsets = _header(sources)
    state: dict[str, Entry] = {}
    file = os.open(folder / data_name(rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        write_all(file, memoryview(header))
        for key, source in sources.items():
            state[key] = Entry(source.shape, [])
            if source.num_elements:
                checksum = _write_elements(file, source.load(), go_on)
                stop = source.start + source.num_elements
                piece = Piece(source.start, stop, _tensor_key(key, source), len(header) + offsets[key], checksum)
                state[key].pieces.append(piece)
        os.fsync(file)
    finally:
        os.close(file)
    data_bytes = len(header) + sum(source.num_bytes for source in sources.values())
    return Table(rank, data_bytes, len(header), xxh3_64_hexdigest(header), state)


def write_durably(path: Path, raw: bytes) -> None:
    """Write a small file whole: it is there with all its bytes, or not at all."""
    part = path.with_name(path.name + ".part")
    file = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        write_all(file, memoryview(raw))
        os.fsync(file)
    finally:
        os.close(file)
    part.replace(path)


def write_all(file: int, view: memoryview) -> None:
    """os.write until all is written."""
    while view:
        view = view[os.write(file, view) :]


class DataFile:
    """One rank's data file, open for reading."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._path = folder / data_name(rank)
        try:
            self._file = self._path.open("rb", buffering=0)
        except FileNotFoundError:
            raise DamagedCheckpoint(self._path, "is missing") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def chunks(self, piece: Piece) -> Iterator[tuple[int, Floats]]:
        """Each (index of the first element, elements) of the piece in turn; the array is reused for the next one.

        Raises:
            DamagedCheckpoint: after the last chunk, where the checksum of all of them differs.
        """
        checksum = xxh3_64()
        buffer = np.empty(min(_CHUNK_ELEMENTS, piece.stop - piece.start), np.float32)
        self._file.seek(piece.offset_bytes)
        for start in range(piece.start, piece.stop, _CHUNK_ELEMENTS):
            chunk = buffer[: piece.stop - start]
            view = chunk.data.cast("B")
            self._read_fully(view, piece)
            checksum.update(view)
            yield start, chunk
        if checksum.hexdigest() != piece.xxh3:
            raise DamagedCheckpoint(self._path, f"piece {piece.tensor} does not match its checksum")

    def _read_fully(self, view: memoryview, piece: Piece) -> None:
        while view:
            num_bytes = self._file.readinto(view)
            if not num_bytes:
                raise DamagedCheckpoint(self._path, f"ends inside piece {piece.tensor}")
            view = view[num_bytes:]


def verify(folder: Path) -> Manifest:
    """Read and verify every byte of a checkpoint.

    Raises:
        DamagedCheckpoint: names the first file and piece that differ.
    """
    manifest = read_manifest(folder)
    check_frame(folder, manifest)
    for files in manifest.files:
        with DataFile(folder, files.rank) as data:
            for entry in read_table(folder, files).state.values():
                for piece in entry.pieces:
                    for _ in data.chunks(piece):
                        pass
    return manifest


def _header(sources: Mapping[str, Source]) -> tuple[bytes, dict[str, int]]:
    """The safetensors header, and where each source begins, counted from the end of the header."""
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    end = 0
    for key, source in sources.items():
        offsets[key] = end
        end += source.num_bytes
        if source.num_elements:
            span = [offsets[key], end]
            fields[_tensor_key(key, source)] = {"dtype": "F32", "shape": [source.num_elements], "data_offsets": span}
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offsets


def _tensor_key(key: str, source: Source) -> str:
    return f"{key}@{source.start}"


def _write_elements(file: int, values: Floats, go_on: Callable[[], None]) -> str:
    assert values.dtype == np.float32
    checksum = xxh3_64()
    for begin in range(0, values.size, _CHUNK_ELEMENTS):
        go_on()
        view = values[begin : begin + _CHUNK_ELEMENTS].data.cast("B")
        checksum.update(view)
        write_all(file, view)
        _start_writing_back(file)
    return checksum.hexdigest()


def _start_writing_back(file: int) -> None:
    """Have the disk begin now rather than at the fsync: a third faster in all. Does not wait."""
    if hasattr(os, "posix_fadvise"):  # not on macOS
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
