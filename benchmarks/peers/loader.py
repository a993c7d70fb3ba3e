"""Our own loader, without background threads, so that its work is counted where the peers' is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from llm_dist import tokenizer, tokenizer_training
from llm_dist.data.index import open_shards
from llm_dist.data.loader import Loader
from llm_dist.data.order import Order
from llm_dist.data.packing import Concatenated
from llm_dist.data.reading import Reading, Source, segments_by_size
from llm_dist.data.shards import ShardWriter


def prepare(tokens: np.ndarray, ends: np.ndarray, folder: Path, width: int) -> int:
    """Write shards that carry a real tokenizer, which nobody asks."""
    words = (f"word{number} " * 3 for number in range(5000))
    tokenizer_training.train(words, "byte-bpe", 1000, folder / "tokenizer")
    made = tokenizer.load(folder / "tokenizer")
    with ShardWriter(folder / "shards", 1 << 16, made.fingerprint) as writer:
        for first, end in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True):
            writer.add(tokens[first:end], 4 * (end - first))
        writer.close([made.folder / name for name in tokenizer.FILES], {})
    return len(tokens) // (width - 1)


def batches(folder: Path, rows: int, width: int, skip: int) -> Iterator[np.ndarray]:
    return read(folder, rows, width, skip, document_mask=False)


def read(folder: Path, rows: int, width: int, skip: int, document_mask: bool) -> Iterator[np.ndarray]:
    shards = open_shards(folder / "shards")
    packing = Concatenated(shards, width - 1, seed=0)
    source = Source("train", shards, packing, Order(packing.num_windows, packing.cell_windows, seed=0))
    weights = segments_by_size({"train": packing.num_windows})
    reading = Reading([source], weights, rows, width - 1, document_mask=document_mask)
    with Loader(reading, 1, 0, workers=0, first_step=skip) as loader:
        for step in range(skip, packing.num_windows // rows):
            given = loader.rows(step)
            assert (given.document_ids is not None) == document_mask
            yield given.inputs
