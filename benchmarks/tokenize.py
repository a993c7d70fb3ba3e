"""`llm-dist tokenize` against the tokenizer library alone on the same cores; they take turns.

The job is the whole command, a process of its own, from `.jsonl` on disk to durable shards. The library has its texts
in memory, keeps no ids and writes nothing; of its own threads and one process per core the faster counts.
"""

from __future__ import annotations

import json
import os
import resource
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


class Rate(NamedTuple):
    """Megabytes of text."""

    per_second: float
    per_cpu_second: float


KINDS = (
    Kind("bpe", "bpe", "tokenizers", 80_000_000),
    Kind("byte-bpe", "byte-bpe", "tokenizers", 80_000_000),
    Kind("byte-bpe by tiktoken", "byte-bpe", "tiktoken", 320_000_000),
)


def measure() -> list[dict[str, Any]]:
    """One row per kind: medians of megabytes of text per second over all cores, and their ratio.

    `by CPU time` is the ratio of megabytes per second of CPU time, which other work on the machine disturbs less.
    """
    kinds = [kind for kind in KINDS if find_spec(kind.encoder)]
    if len(kinds) < len(KINDS):
        print("  tiktoken is not installed: pip install 'llm_dist[fast]'")
    with tempfile.TemporaryDirectory(prefix="tokenize-") as folder:
        return _measure(kinds, Path(folder))


def _measure(kinds: Sequence[Kind], folder: Path) -> list[dict[str, Any]]:
    texts = _texts(folder / "corpus.jsonl")
    some, cores = _repeated(texts, LIBRARY_BYTES), len(os.sched_getaffinity(0))
    for kind in kinds:
        if not (folder / kind.tokenizer).exists():
            tokenizer_training.train(iter(texts), kind.tokenizer, VOCABULARY_TOKENS, folder / kind.tokenizer)
    found: dict[str, list[tuple[Rate, Rate, Rate]]] = {kind.name: [] for kind in kinds}
    for _ in range(ROUNDS):
        for kind in kinds:
            home = folder / kind.tokenizer
            library = _in_threads(kind, home, some, cores), _in_processes(kind, home, some, cores)
            found[kind.name].append((*library, _job(kind, home, texts, folder)))
    return [{"tokenizer": name, **_row(rounds), "cores": cores} for name, rounds in found.items()]


def _row(rounds: list[tuple[Rate, Rate, Rate]]) -> dict[str, float]:
    in_threads, in_processes, job = (
        Rate(*map(statistics.median, zip(*each, strict=True))) for each in zip(*rounds, strict=True)
    )
    library = max(in_threads, in_processes)
    ratios = [by_job.per_second / max(ways).per_second for *ways, by_job in rounds]
    return {
        "library MB/s": library.per_second,
        "job MB/s": job.per_second,
        "ratio": job.per_second / library.per_second,
        "lowest": min(ratios),
        "highest": max(ratios),
        "by CPU time": job.per_cpu_second / library.per_cpu_second,
    }


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


def _in_threads(kind: Kind, home: Path, texts: list[str], cores: int) -> Rate:
    """The library in its own threads."""
    encode = _encode(kind, home, cores)
    began, cpu_began = time.perf_counter(), time.process_time()
    for first in range(0, len(texts), BATCH_TEXTS):
        encode(texts[first : first + BATCH_TEXTS])
    return _rate(texts, time.perf_counter() - began, time.process_time() - cpu_began)


def _in_processes(kind: Kind, home: Path, texts: list[str], cores: int) -> Rate:
    """The library in one process per core, which has its texts already."""
    context = get_context("fork")
    barrier, cpu_seconds = context.Barrier(cores + 1), context.Array("d", cores, lock=False)
    workers = [context.Process(target=_work, args=(kind, home, texts, n, barrier, cpu_seconds)) for n in range(cores)]
    for worker in workers:
        worker.start()
    barrier.wait()
    began = time.perf_counter()
    barrier.wait()
    seconds = time.perf_counter() - began
    for worker in workers:
        worker.join()
    return _rate(texts, seconds, sum(cpu_seconds[:]))


def _work(kind: Kind, home: Path, texts: list[str], number: int, barrier: Barrier, cpu_seconds: Any) -> None:
    encode, own = _encode(kind, home, 1), texts[number :: len(cpu_seconds)]
    barrier.wait()
    began = time.process_time()
    for first in range(0, len(own), BATCH_TEXTS):
        encode(own[first : first + BATCH_TEXTS])
    cpu_seconds[number] = time.process_time() - began
    barrier.wait()


def _rate(texts: Sequence[str], seconds: float, cpu_seconds: float) -> Rate:
    return Rate(_megabytes(texts) / seconds, _megabytes(texts) / cpu_seconds)


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


def _job(kind: Kind, home: Path, texts: list[str], folder: Path) -> Rate:
    """The command from its start to its end, with all its workers."""
    source, out = folder / "source.jsonl", folder / "out"
    many = _repeated(texts, kind.job_bytes)
    source.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in many), "utf-8")
    arguments = ["tokenize", str(source), "--tokenizer", str(home), "--out", str(out), "--json"]
    command = [sys.executable, "-c", COMMAND, kind.encoder, *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    began, cpu_began = time.perf_counter(), _cpu_seconds_of_children()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    rate = _rate(many, time.perf_counter() - began, _cpu_seconds_of_children() - cpu_began)
    assert json.loads(done.stdout)["encoder"] == kind.encoder, "the row would be another one's"
    shutil.rmtree(out)
    return rate


def _cpu_seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
