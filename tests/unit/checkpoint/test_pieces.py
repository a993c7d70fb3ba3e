from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from llm_dist.checkpoint import layout, pieces
from llm_dist.checkpoint.layout import DamagedCheckpoint
from llm_dist.checkpoint.pieces import DataFile, Entry, Piece, Source, Table, check_cover, share_of_replica, write_data


def go_on() -> None:
    pass


def source(values: np.ndarray, start: int = 0, shape: tuple[int, ...] | None = None) -> Source:
    return Source(shape or (start + values.size,), start, values.size, lambda: values)


def table(rank: int, **ranges: list[tuple[int, int]]) -> Table:
    state = {key: Entry((2, 3), [Piece(a, b, f"{key}@{a}", 0, "") for a, b in each]) for key, each in ranges.items()}
    return Table(rank, 0, 0, "", state)


@given(st.integers(0, 50), st.integers(1, 9))
def test_replicas_share_a_range_exactly(num_elements: int, num_replicas: int) -> None:
    shares = [share_of_replica(num_elements, replica, num_replicas) for replica in range(num_replicas)]
    assert [i for a, b in shares for i in range(a, b)] == list(range(num_elements))
    assert max(b - a for a, b in shares) - min(b - a for a, b in shares) <= 1


def test_cover_accepts_what_fits_in_any_order() -> None:
    assert check_cover([table(0, w=[(4, 6)]), table(1, w=[]), table(2, w=[(0, 4)])]) == {"w": (2, 3)}


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ([table(0, w=[(0, 3)]), table(1, w=[(4, 6)])], "w: elements 3 to 4 are held by no rank"),
        ([table(0, w=[(0, 4)]), table(1, w=[(3, 6)])], "w: elements 3 to 4 are held twice"),
        ([table(0, w=[(0, 4)]), table(1, w=[])], "w: elements 4 to 6 are held by no rank"),
        ([table(0, w=[(0, 6)]), table(1, v=[])], "rank 1 lists other tensors"),
    ],
)
def test_cover_names_gap_and_overlap(tables: list[Table], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_cover(tables)


def test_the_data_file_is_plain_safetensors(tmp_path: Path) -> None:
    a, b = np.arange(5, dtype=np.float32), np.array([7.5], np.float32)
    written = write_data(tmp_path, 3, {"x/ü": source(a, start=2), "y": source(b), "none": source(a[:0])}, go_on)
    loaded = load_file(tmp_path / "rank_00003.safetensors")
    assert loaded.keys() == {"x/ü@2", "y@0"}
    assert torch.equal(loaded["x/ü@2"], torch.from_numpy(a)) and torch.equal(loaded["y@0"], torch.from_numpy(b))
    assert written.data_bytes == (tmp_path / "rank_00003.safetensors").stat().st_size
    assert pieces.parse_table(written.to_bytes()) == written


def test_long_pieces_are_written_and_read_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "_CHUNK_ELEMENTS", 4)
    values = np.arange(11, dtype=np.float32)
    (piece,) = write_data(tmp_path, 0, {"x": source(values, start=5)}, go_on).state["x"].pieces
    with DataFile(tmp_path, 0) as data:
        chunks = [(start, chunk.tolist()) for start, chunk in data.chunks(piece)]
    assert chunks == [(5, [0, 1, 2, 3]), (9, [4, 5, 6, 7]), (13, [8, 9, 10])]


def test_damage_in_the_last_chunk_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "_CHUNK_ELEMENTS", 4)
    (piece,) = write_data(tmp_path, 0, {"x": source(np.ones(9, np.float32))}, go_on).state["x"].pieces
    path = tmp_path / layout.data_name(0)
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with DataFile(tmp_path, 0) as data, pytest.raises(DamagedCheckpoint, match="piece x@0 does not match"):
        list(data.chunks(piece))


def test_a_small_file_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces.write_durably(tmp_path / "a", b"before")

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pieces.os, "write", full)
    with pytest.raises(OSError, match="No space"):
        pieces.write_durably(tmp_path / "a", b"after")
    assert (tmp_path / "a").read_bytes() == b"before"
