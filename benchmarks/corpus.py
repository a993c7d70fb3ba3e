"""How opening, the first batch and a resume depend on the size of the corpus, up to a trillion tokens.

The shards are sparse files: their tokens read as zeros, whose checksums are in the tables, so that everything but the
disk itself is as with real ones.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from xxhash import xxh3_64_intdigest

from llm_dist import tokenizer, tokenizer_training
from llm_dist.data.folder import BLOCK_TOKENS, INDEX_ROW
from llm_dist.data.shards import CHUNK_TOKENS

CHUNKS_PER_SHARD = 10
DOCUMENTS_PER_CHUNK = 1747
SIZES = (1_000, 10_000, 100_000)

READ = """
import json, sys, time
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
from llm_dist.data.index import open_shards
from llm_dist.data.loader import Loader
from llm_dist.data.order import Order
from llm_dist.data.packing import Concatenated
from llm_dist.data.reading import Reading, Source, segments_by_size
before, began, cpu = peak(), time.perf_counter(), time.process_time()
shards = open_shards(sys.argv[1])
opened, cpu = time.perf_counter(), time.process_time() - cpu
packing = Concatenated(shards, 2048, 0)
order = Order(packing.num_windows, packing.cell_windows, 0)
reading = Reading([Source("train", shards, packing, order)], segments_by_size({"train": 1}), 512, 2048)
times = []
for step in (0, packing.num_windows // 512 // 2):
    start = time.perf_counter()
    with Loader(reading, 8, 0, workers=1, first_step=step) as loader:
        loader.rows(step)
        times.append(time.perf_counter() - start)
found = {"open": opened - began, "cpu": cpu, "first": times[0], "resume": times[1], "rss": (peak() - before) / 1024}
print(json.dumps(found))
"""


def measure(sizes: tuple[int, ...] = SIZES) -> list[dict[str, Any]]:
    """One row per number of shards; seconds, and the memory that opening and reading took beside the imports."""
    with tempfile.TemporaryDirectory(prefix="corpus-") as folder:
        return _measure(Path(folder), sizes)


def _measure(folder: Path, sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    rows = []
    for num_shards in sizes:
        place = folder / str(num_shards)
        num_tokens = describe(place, num_shards)
        answer = subprocess.run([sys.executable, "-c", READ, str(place)], capture_output=True, text=True, check=True)
        found = json.loads(answer.stdout)
        rows.append(
            {
                "shards": num_shards,
                "tokens": f"{num_tokens:.3g}",
                "open, s": found["open"],
                "open, CPU s": found["cpu"],
                "first batch, s": found["first"],
                "resume half-way, s": found["resume"],
                "memory, MB": found["rss"],
            }
        )
    return rows


def describe(folder: Path, num_shards: int) -> int:
    """Make a shard folder of sparse files; returns its tokens."""
    folder.mkdir(parents=True)
    words = (f"word{number} " * 3 for number in range(500))
    tokenizer_training.train(words, "byte-bpe", 300, folder / "tokenizer")
    made = tokenizer.load(folder / "tokenizer")
    chunk_bytes = 2 * CHUNK_TOKENS + 8192 + (4 * DOCUMENTS_PER_CHUNK + 511) // 512 * 512
    rows = np.zeros((num_shards, CHUNKS_PER_SHARD), INDEX_ROW)
    rows["token_offset"] = np.arange(CHUNKS_PER_SHARD) * chunk_bytes + 640
    rows["docs_offset"] = rows["token_offset"] + 2 * CHUNK_TOKENS + 640
    rows["num_tokens"], rows["num_bytes"] = CHUNK_TOKENS, 4 * CHUNK_TOKENS
    rows["num_documents"], rows["docs_checksum"] = (
        DOCUMENTS_PER_CHUNK,
        xxh3_64_intdigest(bytes(4 * DOCUMENTS_PER_CHUNK)),
    )
    num_blocks = rows.size * CHUNK_TOKENS // BLOCK_TOKENS
    checksums = np.full(num_blocks, xxh3_64_intdigest(bytes(2 * BLOCK_TOKENS)), "<u8")
    np.save(folder / "index.npy", rows.reshape(-1))
    np.save(folder / "checksums.npy", checksums)
    shard = {
        "bytes": CHUNKS_PER_SHARD * chunk_bytes,
        "num_chunks": CHUNKS_PER_SHARD,
        "num_tokens": CHUNKS_PER_SHARD * CHUNK_TOKENS,
        "num_documents": CHUNKS_PER_SHARD * DOCUMENTS_PER_CHUNK,
        "num_bytes": CHUNKS_PER_SHARD * 4 * CHUNK_TOKENS,
    }
    shards = []
    for number in range(num_shards):
        name = f"shard-{number:06d}.tar"
        with (folder / name).open("wb") as file:
            file.truncate(shard["bytes"])
        shards.append({"name": name, "sha256": hashlib.sha256(name.encode()).hexdigest(), **shard})
    counts = ("num_tokens", "num_documents", "num_bytes")
    dataset = {
        "format": 2,
        "dtype": "uint16",
        "tokenizer": made.fingerprint,
        "vocabulary_tokens": made.vocabulary_tokens,
        **{key: num_shards * shard[key] for key in counts},
        "fingerprint": hashlib.sha256(str(num_shards).encode()).hexdigest(),
        **{f"{name}_sha256": _sha256(folder / f"{name}.npy") for name in ("index", "checksums")},
        "made_from": {},
        "shards": shards,
    }
    (folder / "dataset.json").write_text(json.dumps(dataset, indent=1, sort_keys=True))
    return num_shards * int(shard["num_tokens"])


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
