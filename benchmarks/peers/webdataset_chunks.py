"""Tar members of about a million tokens, cut to windows that pass through a shuffle pool of 16 members.

One member per document is what webdataset's own examples show; it is fifty times slower and no fair opponent.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import webdataset

CHUNK_WINDOWS, TAR_CHUNKS, POOL_CHUNKS = 512, 32, 16


def prepare(tokens: np.memmap, ends: np.ndarray, folder: Path, width: int) -> int:
    """Whole windows only: what is left of the last chunk is dropped, which is below one row."""
    windows = len(tokens) // width
    with webdataset.ShardWriter(f"{folder}/%05d.tar", maxcount=TAR_CHUNKS, verbose=0) as writer:
        for first in range(0, windows, CHUNK_WINDOWS):
            last = min(first + CHUNK_WINDOWS, windows)
            chunk = tokens[first * width : last * width].tobytes()
            writer.write({"__key__": f"{first // CHUNK_WINDOWS:08d}", "bin": chunk})
    return windows


def batches(folder: Path, rows: int, width: int, skip: int) -> Iterator[np.ndarray]:
    """Its only way to resume is to read what came before; skipping before batching spares the copies."""
    pool = POOL_CHUNKS * CHUNK_WINDOWS
    tars = sorted(map(str, folder.glob("*.tar")))

    def windows(samples: Iterator[dict[str, Any]]) -> Iterator[np.ndarray]:
        for sample in samples:
            yield from np.frombuffer(sample["bin"], np.uint16).reshape(-1, width)

    return iter(
        webdataset.WebDataset(tars, shardshuffle=len(tars), seed=0)
        .compose(windows)
        .shuffle(pool, initial=pool, seed=0)
        .slice(skip * rows, None)
        .batched(rows, collation_fn=_stack, partial=False)
    )


def _stack(windows: list[np.ndarray]) -> np.ndarray:
    out = np.empty((len(windows), len(windows[0])), np.int64)
    for row, window in enumerate(windows):
        out[row] = window
    return out
