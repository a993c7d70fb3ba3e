"""The tokenize job against the tokenizer library alone, on the same text and cores."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from launcher.demo_text import write_corpus
from llm_dist import tokenizer, tokenizer_training
from llm_dist.data.documents import read_documents
from llm_dist.data.tokenize import tokenize

ROUNDS, COPIES = 3, 4


def measure() -> list[dict[str, Any]]:
    """Tokens per second of both, and their ratio, per kind of tokenizer."""
    folder = Path(tempfile.mkdtemp(prefix="tokenize-"))
    write_corpus(folder / "one.jsonl")
    text = folder / "text.jsonl"
    text.write_text((folder / "one.jsonl").read_text() * COPIES)
    documents = [document.text for document in read_documents([str(text)], split="file", on_bad="stop")]
    return [_compare(kind, documents, text, folder) for kind in ("bpe", "byte-bpe")]


def _compare(kind: str, documents: list[str], text: Path, folder: Path) -> dict[str, Any]:
    home = folder / kind
    tokenizer_training.train(iter(documents[: len(documents) // COPIES]), kind, 4096, home)
    library, job = [], []
    for number in range(ROUNDS):
        began = time.perf_counter()
        num_tokens = sum(map(len, tokenizer.load(home).encode_batch(documents))) + len(documents)
        library.append(num_tokens / (time.perf_counter() - began))
        report = tokenize([str(text)], home, folder / f"{kind}-{number}", holdout=0)
        job.append(report.tokens_per_second)
    return {
        "tokenizer": kind,
        "library tokens/s": statistics.median(library),
        "job tokens/s": statistics.median(job),
        "ratio": statistics.median(job) / statistics.median(library),
    }
