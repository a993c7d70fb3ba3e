"""`llm-dist tokenize` against the tokenizer library alone on the same cores; they take turns.

The job is the whole command, a process of its own, from `.jsonl` on disk to durable shards. The library has its texts
in memory, keeps no ids and writes nothing; of its own threads and one process per core the faster counts.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from itertools import groupby
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, NamedTuple

from launcher.demo_text import write_corpus
from llm_dist import tokenizer, tokenizer_training
from llm_dist.tokenizer_fast import load_fast

ROUNDS = 3
VOCABULARY_TOKENS = 16_384
LIBRARY_BYTES = 32_000_000
BATCH_TEXTS = 256

COMMAND = """
import sys
from llm_dist.cli import main
from llm_dist.data import tokenize
if sys.argv.pop(1) == "tokenizers":
    tokenize.FAST_BYTES = 1 << 60
main()
"""


class Kind(NamedTuple):
    """A row of the table."""

    name: str
    tokenizer: str
    encoder: str
    job_bytes: int
    """So much text that the second it takes to start does not decide."""


KINDS = (
    Kind("bpe", "bpe", "tokenizers", 80_000_000),
    Kind("byte-bpe", "byte-bpe", "tokenizers", 80_000_000),
    Kind("byte-bpe by tiktoken", "byte-bpe", "tiktoken", 320_000_000),
)


def measure() -> list[dict[str, Any]]:
    """One row per kind: medians of megabytes of text per second over all cores, and their ratio."""
    kinds = [kind for kind in KINDS if find_spec(kind.encoder)]
    if len(kinds) < len(KINDS):
        print("  tiktoken is not installed: pip install 'llm_dist[fast]'")
    with tempfile.TemporaryDirectory(prefix="tokenize-") as folder:
        return _measure(kinds, Path(folder))


def _measure(kinds: Sequence[Kind], folder: Path) -> list[dict[str, Any]]:
    texts = _texts(folder / "corpus.jsonl")
    some = _repeated(texts, LIBRARY_BYTES)
    some_mb, cores = _megabytes(some), len(os.sched_getaffinity(0))
    for kind in kinds:
        if not (folder / kind.tokenizer).exists():
            tokenizer_training.train(iter(texts), kind.tokenizer, VOCABULARY_TOKENS, folder / kind.tokenizer)
    rates: dict[str, list[tuple[float, float, float]]] = {kind.name: [] for kind in kinds}
    for _ in range(ROUNDS):
        for kind in kinds:
            home = folder / kind.tokenizer
            in_threads = some_mb / _in_threads(kind, home, some, cores)
            in_processes = some_mb / _in_processes(kind, home, some, cores)
            rates[kind.name].append((in_threads, in_processes, _job(kind, home, texts, folder)))
    rows = []
    for name, found in rates.items():
        in_threads, in_processes, job = (statistics.median(each) for each in zip(*found, strict=True))
        library = max(in_threads, in_processes)
        ratios = [by_job / max(by_library) for *by_library, by_job in found]
        rows.append(
            {
                "tokenizer": name,
                "library MB/s": library,
                "job MB/s": job,
                "ratio": job / library,
                "lowest": min(ratios),
                "highest": max(ratios),
                "cores": cores,
            }
        )
    return rows


def _texts(path: Path) -> list[str]:
    """Prose that every Python carries, one document per module: 4 kB each."""
    write_corpus(path)
    with path.open(encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    modules = groupby(records, lambda record: record["id"].removeprefix("topic:").rpartition(":")[0] or record["id"])
    return ["\n\n".join(record["text"] for record in module) for _, module in modules]


def _repeated(texts: list[str], num_bytes: int) -> list[str]:
    return texts * round(num_bytes / 1e6 / _megabytes(texts))


def _megabytes(texts: Sequence[str]) -> float:
    return sum(len(text.encode()) for text in texts) / 1e6


def _in_threads(kind: Kind, home: Path, texts: list[str], cores: int) -> float:
    """Seconds of the library in its own threads."""
    encode = _encode(kind, home, cores)
    began = time.perf_counter()
    for first in range(0, len(texts), BATCH_TEXTS):
        encode(texts[first : first + BATCH_TEXTS])
    return time.perf_counter() - began


def _in_processes(kind: Kind, home: Path, texts: list[str], cores: int) -> float:
    """Seconds of the library in one process per core, its texts being there already."""
    context = get_context("fork")
    barrier = context.Barrier(cores + 1)
    workers = [context.Process(target=_work, args=(kind, home, texts[n::cores], barrier)) for n in range(cores)]
    for worker in workers:
        worker.start()
    barrier.wait()
    began = time.perf_counter()
    barrier.wait()
    seconds = time.perf_counter() - began
    for worker in workers:
        worker.join()
    return seconds


def _work(kind: Kind, home: Path, texts: list[str], barrier: Barrier) -> None:
    encode = _encode(kind, home, 1)
    barrier.wait()
    for first in range(0, len(texts), BATCH_TEXTS):
        encode(texts[first : first + BATCH_TEXTS])
    barrier.wait()


def _encode(kind: Kind, home: Path, threads: int) -> Callable[[list[str]], object]:
    """The library's own way to encode a batch, on so many threads."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    if kind.encoder == "tokenizers":
        runtime = tokenizer.load(home)._runtime
        return lambda batch: runtime.encode_batch_fast(batch, add_special_tokens=False)
    encoding = load_fast(home)._encoding
    if threads > 1:
        return lambda batch: encoding.encode_ordinary_batch(batch, num_threads=threads)
    return lambda batch: [encoding.encode_ordinary(text) for text in batch]


def _job(kind: Kind, home: Path, texts: list[str], folder: Path) -> float:
    """Megabytes of text per second of the command, from its start to its end."""
    source, out = folder / "source.jsonl", folder / "out"
    many = _repeated(texts, kind.job_bytes)
    source.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in many), "utf-8")
    arguments = ["tokenize", str(source), "--tokenizer", str(home), "--out", str(out), "--json"]
    command = [sys.executable, "-c", COMMAND, kind.encoder, *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    began = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - began
    assert json.loads(done.stdout)["encoder"] == kind.encoder, "the row would be another one's"
    shutil.rmtree(out)
    return _megabytes(many) / seconds
