"""litdata's TokensLoader: documents end to end in chunks, cut to blocks while reading."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import litdata
import numpy as np
import torch

CHUNK_TOKENS = 1 << 23


def prepare(tokens: np.memmap, ends: np.ndarray, folder: Path, width: int) -> int:
    """A document an item, as its own examples do."""
    starts = np.concatenate([ends[:1] * 0, ends[:-1]])
    spans = list(zip(starts.tolist(), ends.tolist(), strict=True))
    made = folder / "tokens"
    litdata.optimize(
        functools.partial(_document, str(tokens.filename)),
        spans,
        str(made),
        chunk_size=CHUNK_TOKENS,
        num_workers=1,
        item_loader=litdata.TokensLoader(),
        verbose=False,
    )
    return sum(chunk["dim"] // width for chunk in json.loads((made / "index.json").read_text())["chunks"])


def batches(folder: Path, rows: int, width: int, skip: int) -> Iterator[np.ndarray]:
    """On one thread: torch's own add CPU time to a copy this small, up to twenty times as much, and save none."""
    torch.set_num_threads(1)
    dataset = litdata.StreamingDataset(
        str(folder / "tokens"), item_loader=litdata.TokensLoader(width), shuffle=True, seed=0
    )
    dataset.batch_size = rows
    if skip:
        dataset.load_state_dict(dataset.state_dict(skip * rows, num_workers=0, batch_size=rows))
    blocks = (block for block in dataset)  # the dataset is its own iterator: asked for one again, it starts again
    while len(batch := list(itertools.islice(blocks, rows))) == rows:
        yield torch.stack(batch).to(torch.int64).numpy()


def _document(source: str, span: tuple[int, int]) -> torch.Tensor:
    return torch.from_numpy(np.memmap(source, np.uint16, "r")[span[0] : span[1]].copy())
