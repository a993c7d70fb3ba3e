"""Shards behind a server with the latency of an object store: first batch, resume, streaming, bytes and memory.

The server is a process of its own, and so is every reading. Corpora of two sizes show what depends on the size.

python -m benchmarks.remote serve FOLDER         answers at a port that it prints; its input asks what it was asked
python -m benchmarks.remote read URL CACHE ...   one reading, told in a line of JSON
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.worker import _anonymous_megabytes
from llm_dist import tokenizer, tokenizer_training
from llm_dist.data.loader import Loader
from llm_dist.data.order import Order
from llm_dist.data.packing import BestFit, Concatenated
from llm_dist.data.places import open_place
from llm_dist.data.reading import Reading, Source, segments_by_size
from llm_dist.data.shards import CHUNK_TOKENS, ShardWriter
from tests.object_server import ObjectServer

SIZES = (20_000_000, 200_000_000)
PACKINGS = ("concatenate", "masked", "best fit")
DOCUMENT_TOKENS = 600
ROWS, SEQUENCE = 64, 2048
LATENCY_SECONDS, BYTES_PER_SECOND = 0.04, 60e6
"""Of each request, and of each connection: an object store in the same region."""
ROUNDS = 3


def measure(sizes: tuple[int, ...] = SIZES) -> list[dict[str, Any]]:
    """One row per size and packing; seconds are medians, counted from before the URL is opened."""
    with tempfile.TemporaryDirectory(prefix="remote-") as scratch:
        folder = Path(scratch)
        for num_tokens in sizes:
            write(folder / "served" / str(num_tokens), num_tokens)
        with _serving(folder / "served") as server:
            return [_row(server, folder / "cache", num_tokens, packing) for num_tokens in sizes for packing in PACKINGS]


class _Server:
    """The other process's ends."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.url = self._line()

    def asked(self) -> dict[str, int]:
        """What came in since the last call."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return json.loads(self._line())

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


@contextmanager
def _serving(folder: Path) -> Iterator[_Server]:
    command = [sys.executable, "-m", "benchmarks.remote", "serve", str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield _Server(process)
        finally:
            process.kill()


def _row(server: _Server, cache: Path, num_tokens: int, packing: str) -> dict[str, Any]:
    url = f"{server.url}/{num_tokens}"
    half = num_tokens // (ROWS * SEQUENCE) // 2
    times: dict[str, list[float]] = {"cold": [], "warm": [], "resume": []}
    for number in range(ROUNDS):
        for name, step in (("cold", 0), ("warm", 0), ("resume", half + 7 * number)):
            if name != "warm":
                shutil.rmtree(cache, ignore_errors=True)
            times[name].append(_read(url, cache, packing, step, 1)["first_seconds"])
    shutil.rmtree(cache)
    server.asked()
    streamed = _read(url, cache, packing, 0, sys.maxsize)
    asked = server.asked()
    return {
        "tokens": f"{num_tokens / 1e6:.0f} M",
        "packing": packing,
        "first batch cold, s": statistics.median(times["cold"]),
        "warm, s": statistics.median(times["warm"]),
        "resume half-way cold, s": statistics.median(times["resume"]),
        "Mtokens/s cold": streamed["tokens"] / streamed["seconds"] / 1e6,
        "requests": asked["requests"],
        "bytes asked/needed": asked["bytes"] / streamed["epoch_bytes"],
        "memory, MB": streamed["peak_anon_mb"],
    }


def write(folder: Path, num_tokens: int) -> None:
    """A shard folder of random tokens and documents of one length."""
    words = (f"word{number} " * 3 for number in range(5000))
    tokenizer_training.train(words, "byte-bpe", 1000, folder.parent / "tokenizer")
    made = tokenizer.load(folder.parent / "tokenizer")
    random = np.random.default_rng(0)
    with ShardWriter(folder, 1 << 16, made.fingerprint) as writer:
        for first in range(0, num_tokens, CHUNK_TOKENS):
            count = min(CHUNK_TOKENS, num_tokens - first)
            lengths = np.full(-(-count // DOCUMENT_TOKENS), DOCUMENT_TOKENS)
            lengths[-1] -= lengths.sum() - count
            writer.add_many(random.integers(8, 1 << 16, count, np.uint16), lengths, 4 * lengths)
        writer.close([made.folder / name for name in tokenizer.FILES], {})
    shutil.rmtree(made.folder)


def serve(folder: Path) -> None:
    """Serve until killed; each line of the input asks for the requests and bytes since the last one."""
    with ObjectServer(folder) as server:
        server.latency_seconds, server.bytes_per_second = LATENCY_SECONDS, BYTES_PER_SECOND
        print(server.url, flush=True)
        told = 0
        for _ in sys.stdin:
            requests = server.requests[told:]
            told += len(requests)
            sizes = [
                (each.end or (folder / each.path.lstrip("/")).stat().st_size) - (each.start or 0) for each in requests
            ]
            print(json.dumps({"requests": len(sizes), "bytes": sum(sizes)}), flush=True)


def _read(url: str, cache: Path, packing: str, step: int, num_steps: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.remote", "read", url, str(cache), packing, str(step), str(num_steps)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def read(url: str, cache: Path, packing: str, first_step: int, num_steps: int) -> dict[str, Any]:
    """Read some steps, or what is left of the epoch."""
    import aiohttp  # noqa: F401 (a package's own size is no reading's)

    baseline, began = _anonymous_megabytes() or 0.0, time.perf_counter()
    memory = []
    shards = open_place(url, cache)
    opened = time.perf_counter()
    windows = BestFit(shards, SEQUENCE, cache) if packing == "best fit" else Concatenated(shards, SEQUENCE, 0)
    source = Source("train", shards, windows, Order(windows.num_windows, windows.cell_windows, 0))
    weights = segments_by_size({"train": windows.num_windows})
    reading = Reading([source], weights, ROWS, SEQUENCE, document_mask=packing == "masked")
    with Loader(reading, 1, 0, workers=1, first_step=first_step) as loader:
        loader.rows(first_step)
        first = time.perf_counter()
        for step in range(first_step + 1, min(first_step + num_steps, windows.num_windows // ROWS)):
            loader.rows(step)
            memory.append(_anonymous_megabytes() or 0.0)
        ended = time.perf_counter()
    reading.close()
    return {
        "open_seconds": opened - began,
        "first_seconds": first - began,
        "seconds": ended - began,
        "tokens": (len(memory) + 1) * ROWS * SEQUENCE,
        "epoch_bytes": shards.num_tokens * shards.dtype.itemsize,
        "peak_anon_mb": max(memory, default=0.0) - baseline,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs = parser.add_subparsers(dest="job", required=True)
    jobs.add_parser("serve").add_argument("folder", type=Path)
    reading = jobs.add_parser("read")
    reading.add_argument("url")
    reading.add_argument("cache", type=Path)
    reading.add_argument("packing", choices=PACKINGS)
    reading.add_argument("first_step", type=int)
    reading.add_argument("num_steps", type=int)
    arguments = vars(parser.parse_args())
    if arguments.pop("job") == "serve":
        serve(**arguments)
    else:
        print(json.dumps(read(**arguments)))


if __name__ == "__main__":
    main()
