"""What the loader holds is what docs/data.md says: tables by the chunk, and a few groups of rows."""

import gc
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from llm_dist.data.index import ShardSet, open_shards
from llm_dist.data.loader import Loader
from llm_dist.data.order import Order
from llm_dist.data.packing import BestFit, Concatenated, Packing
from llm_dist.data.reading import Reading, Source, segments_by_size
from tests.unit.data.tiny_shards import write_shards

READ_SEQUENCES = 64


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path):
    folder = tmp_path_factory.mktemp("memory")
    random = np.random.default_rng(0)
    documents = [random.integers(8, 200, size).tolist() for size in random.integers(1, 900, 3000)]
    write_shards(folder, documents, tiny_tokenizer, chunk_tokens=1 << 16, chunks_per_shard=4)
    opened = open_shards(folder)
    yield opened
    opened.close()


def stated_bytes(packing: str, sequence_tokens: int, rows: int, workers: int, document_mask: bool) -> int:
    """The formula of docs/data.md."""
    per_token = {"concatenate": 8, "best_fit": 16}[packing] + 4 * document_mask
    group = max(rows, READ_SEQUENCES // rows * rows)
    return (workers + 3) * group * (sequence_tokens + 1) * per_token + 4_000_000


@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
@pytest.mark.parametrize(("sequence_tokens", "rows", "workers"), [(2048, 16, 1), (2048, 256, 2), (8192, 64, 3)])
def test_the_loader_holds_what_is_stated(
    shards: ShardSet, tmp_path: Path, packing: str, sequence_tokens: int, rows: int, workers: int, document_mask: bool
) -> None:
    packed: Packing = (
        BestFit(shards, sequence_tokens, tmp_path)
        if packing == "best_fit"
        else Concatenated(shards, sequence_tokens, seed=0)
    )
    source = Source("train", shards, packed, Order(packed.num_windows, packed.cell_windows, seed=0))
    reading = Reading([source], segments_by_size({"train": 1}), rows, sequence_tokens, document_mask=document_mask)
    gc.collect()
    tracemalloc.start()
    with Loader(reading, 1, 0, workers=workers, first_step=0) as loader:
        for step in range(40):
            loader.rows(step)
        _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < stated_bytes(packing, sequence_tokens, rows, workers, document_mask)
    assert peak > stated_bytes(packing, sequence_tokens, rows, workers, document_mask) / 8, "the formula says nothing"
