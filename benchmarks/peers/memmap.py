"""A permuted gather from one flat numpy.memmap: the way of nanoGPT and Megatron."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np


def prepare(tokens: np.memmap, ends: np.ndarray, folder: Path, width: int) -> int:
    """Copy the file as it is; return how many rows it holds."""
    shutil.copyfile(str(tokens.filename), folder / "tokens.bin")
    return _windows(len(tokens), width)


def batches(folder: Path, rows: int, width: int, skip: int) -> Iterator[np.ndarray]:
    return gather(np.memmap(folder / "tokens.bin", np.uint16, "r"), rows, width, skip)


def gather(flat: np.ndarray, rows: int, width: int, skip: int) -> Iterator[np.ndarray]:
    """Rows overlap by one token, so that every token but the first is once a target."""
    starts = np.random.default_rng(0).permutation(_windows(len(flat), width)) * (width - 1)
    for first in range(skip * rows, len(starts) - rows + 1, rows):
        out = np.empty((rows, width), np.int64)
        for row, start in enumerate(starts[first : first + rows]):
            out[row] = flat[start : start + width]
        yield out


def _windows(num_tokens: int, width: int) -> int:
    return (num_tokens - 1) // (width - 1)
