"""Our own loader with document masks: where documents begin comes out of the index for every row."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.peers import loader

prepare = loader.prepare


def batches(folder: Path, rows: int, width: int, skip: int) -> Iterator[np.ndarray]:
    return loader.read(folder, rows, width, skip, document_mask=True)
