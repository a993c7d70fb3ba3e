"""Rows of tokens per CPU second, against a permuted gather from a bare numpy memmap: the limit of random access."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from llm_dist import tokenizer, tokenizer_training
from llm_dist.data.index import open_shards
from llm_dist.data.loader import Loader
from llm_dist.data.order import Order
from llm_dist.data.shards import ShardWriter

NUM_TOKENS, SEQUENCE, ROWS, STEPS, ROUNDS = 24_000_000, 2048, 16, 400, 7
DOCUMENT_TOKENS = 600


def measure() -> list[dict[str, Any]]:
    """One row per way of reading; ratios are of medians of interleaved rounds of CPU time."""
    folder = Path(tempfile.mkdtemp(prefix="loader-"))
    _write(folder / "shards")
    shards = open_shards(folder / "shards")
    order = Order(shards.num_tokens, SEQUENCE, seed=0)
    flat = np.memmap(folder / "flat.bin", np.uint16, "w+", shape=(shards.num_tokens,))
    flat[:] = shards.tokens(0, shards.num_tokens)
    ways: dict[str, Callable[[], None]] = {
        "memmap, permuted": lambda: _memmap(flat),
        "loader": lambda: _loader(shards, order, document_mask=False),
        "loader, document mask": lambda: _loader(shards, order, document_mask=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, read in ways.items():
            began = time.process_time()
            read()
            seconds[name].append(time.process_time() - began)
    limit = statistics.median(seconds["memmap, permuted"])
    tokens = STEPS * ROWS * SEQUENCE
    return [
        {
            "way": name,
            "Mtokens/CPU s": tokens / statistics.median(taken) / 1e6,
            "ratio": limit / statistics.median(taken),
        }
        for name, taken in seconds.items()
    ]


def _write(folder: Path) -> None:
    """Made-up documents of one length, in shards that carry a real (small) tokenizer."""
    words = (f"word{number} " * 3 for number in range(5000))
    tokenizer_training.train(words, "byte-bpe", 300, folder.parent / "tokenizer")
    made = tokenizer.load(folder.parent / "tokenizer")
    random = np.random.default_rng(0)
    with ShardWriter(folder, made.vocabulary_tokens, made.fingerprint) as writer:
        for _ in range(NUM_TOKENS // DOCUMENT_TOKENS):
            ids = random.integers(8, made.vocabulary_tokens, DOCUMENT_TOKENS)
            ids[0] = made.separator_id
            writer.add(ids, 4 * DOCUMENT_TOKENS)
        writer.close([made.folder / name for name in tokenizer.FILES], {})


def _memmap(flat: np.ndarray) -> None:
    starts = np.random.default_rng(0).permutation(len(flat) // SEQUENCE - 1)[: STEPS * ROWS] * SEQUENCE
    for step in range(STEPS):
        out = np.empty((ROWS, SEQUENCE + 1), np.int64)
        for row, start in enumerate(starts[step * ROWS : (step + 1) * ROWS]):
            out[row] = flat[start : start + SEQUENCE + 1]


def _loader(shards: Any, order: Order, document_mask: bool) -> None:
    loader = Loader(shards, order, ROWS, 1, 0, document_mask=document_mask, workers=0, first_step=0)
    for step in range(STEPS):
        loader.rows(step)
    loader.close()
