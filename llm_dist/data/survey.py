"""What a shard folder holds, for a person to look at: counts, lengths, samples, how well it was shuffled.

Reads the document ends of the whole folder and the tokens of the samples only. Knows no order and no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from llm_dist import tokenizer
from llm_dist.data.index import ShardSet
from llm_dist.data.order import Indices
from llm_dist.data.places import open_place

BATCH_DOCUMENTS = 64
_FEWEST_BATCHES = 8
MOST_SOURCES = 20
_LONGEST_EXACT_TOKENS = 1 << 20
_SEARCHED_TOKENS = 1 << 20
_SHARD_KEYS = ("name", "bytes", "num_chunks", "num_tokens", "num_documents", "num_bytes")


@dataclass(frozen=True)
class Source:
    """What an input file or folder gave to this part; tokens count separators."""

    name: str
    num_documents: int
    num_tokens: int
    num_bytes: int


@dataclass(frozen=True)
class Survey:
    """A shard folder at a glance. Lengths are tokens per document, the separator included."""

    folder: str
    fingerprint: str
    dtype: str
    vocabulary_tokens: int
    num_tokens: int
    num_documents: int
    num_bytes: int
    bytes_per_token: float
    """UTF-8 bytes of text per token, separators counted as tokens."""
    mean_tokens: float
    median_tokens: int
    """Documents longer than 2^20 tokens count as that long."""
    length_histogram: dict[int, int]
    """Lower edge (a power of two) of a bin of lengths -> documents in it; empty bins left out."""
    shuffle_ratio: float | None
    """1 for shuffled documents, above when alike ones stand together; `_BatchMoments.ratio` says what it compares."""
    samples: list[str]
    """The beginning of a few documents, decoded, evenly spread over the stream."""
    sources: list[Source]
    """The largest first; empty where dataset.json does not record them."""
    shards: list[dict[str, Any]]
    """Name and counts of each shard."""


def survey(folder: str | Path, num_samples: int = 3, sample_tokens: int = 64) -> Survey:
    """Look through a shard folder.

    Raises:
        UserError: it is not a finished shard folder, or what is read of it is damaged.
    """
    shards = open_place(str(folder))
    try:
        counts = np.zeros(_LONGEST_EXACT_TOKENS + 1, np.int64)
        histogram = np.zeros(64, np.int64)
        moments = _BatchMoments()
        for lengths in _document_lengths(shards):
            counts += np.bincount(np.minimum(lengths, _LONGEST_EXACT_TOKENS), minlength=len(counts))
            histogram += np.bincount(np.frexp(lengths)[1] - 1, minlength=len(histogram))
            moments.add(np.log2(lengths))
        num_documents = int(counts.sum())
        return Survey(
            folder=str(folder),
            fingerprint=shards.fingerprint,
            dtype=shards.dtype.name,
            vocabulary_tokens=shards.vocabulary_tokens,
            num_tokens=shards.num_tokens,
            num_documents=num_documents,
            num_bytes=shards.num_bytes,
            bytes_per_token=shards.num_bytes / shards.num_tokens,
            mean_tokens=shards.num_tokens / num_documents,
            median_tokens=int(np.cumsum(counts).searchsorted((num_documents + 1) // 2)),
            length_histogram={1 << power: size for power, size in enumerate(histogram.tolist()) if size},
            shuffle_ratio=moments.ratio(),
            samples=_samples(shards, num_samples, sample_tokens),
            sources=sources(shards.dataset),
            shards=[{key: shard[key] for key in _SHARD_KEYS} for shard in shards.dataset["shards"]],
        )
    finally:
        shards.close()


def sources(dataset: dict[str, Any]) -> list[Source]:
    """Counts per input file, or per folder where there are more than MOST_SOURCES files; the smallest are summed."""
    made_from = dataset.get("made_from", {})
    if (counts := made_from.get("sources")) is None:
        return []
    names = [PurePosixPath(str(file["name"])) for file in made_from["inputs"]]
    if len(names) > MOST_SOURCES:
        names = _top_folders(names)
    sums: dict[str, np.ndarray] = {}
    columns = (counts["num_documents"], counts["num_tokens"], counts["num_bytes"])
    for name, *values in zip(map(str, names), *columns, strict=True):
        sums[name] = sums.get(name, 0) + np.array(values, np.int64)
    largest = sorted(sums.items(), key=lambda source: (-source[1][1], source[0]))
    rest = largest[MOST_SOURCES:]
    if rest:
        largest[MOST_SOURCES:] = [(f"{len(rest)} others", np.sum([values for _, values in rest], axis=0))]
    return [Source(name, *values.tolist()) for name, values in largest]


def _top_folders(files: Sequence[PurePosixPath]) -> list[PurePosixPath]:
    """For each file, its path up to the first folder (or file) that is not the same for all."""
    depth = next(depth for depth in count(1) if len({file.parts[:depth] for file in files}) > 1)
    return [PurePosixPath(*file.parts[:depth]) for file in files]


def _document_lengths(shards: ShardSet) -> Iterator[Indices]:
    """Lengths of the documents, chunk by chunk; one that goes on over chunks counts once, where it ends."""
    unfinished = 0
    for chunk in range(len(shards.chunks)):
        ends = shards.document_ends(chunk).astype(np.int64)
        lengths = ends - np.concatenate([[0], ends[:-1]])
        lengths[0] += unfinished
        goes_on = chunk + 1 < len(shards.chunks) and shards.chunks.continues(chunk + 1)
        unfinished = int(lengths[-1]) if goes_on else 0
        if len(finished := lengths[:-1] if goes_on else lengths):
            yield finished


class _BatchMoments:
    """Variance of the means of batches of consecutive documents, against the variance of the documents themselves."""

    def __init__(self) -> None:
        self._waiting = np.empty(0)
        self._batches = np.zeros(3)
        self._documents = np.zeros(3)

    def add(self, values: np.ndarray) -> None:
        self._documents += len(values), values.sum(), np.square(values).sum()
        values = np.concatenate([self._waiting, values])
        whole = len(values) // BATCH_DOCUMENTS * BATCH_DOCUMENTS
        means = values[:whole].reshape(-1, BATCH_DOCUMENTS).mean(axis=1)
        self._batches += len(means), means.sum(), np.square(means).sum()
        self._waiting = values[whole:]

    def ratio(self) -> float | None:
        """BATCH_DOCUMENTS x variance of batch means / variance of documents.

        1 for shuffled documents, give or take sqrt(2 / batches); far above 1 when alike documents stand together. Only
        lengths are compared, so a value near 1 does not prove that subjects are mixed. None below 8 batches or when
        all documents are equally long.
        """
        (num_batches, *_), variance = self._batches, _variance(self._documents)
        if num_batches < _FEWEST_BATCHES or variance == 0:
            return None
        return BATCH_DOCUMENTS * _variance(self._batches) / variance


def _variance(sums: np.ndarray) -> float:
    """Unbiased variance from (count, sum, sum of squares)."""
    count, total, squares = sums.tolist()
    return max(0.0, (squares - total * total / count) / (count - 1)) if count > 1 else 0.0


def _samples(shards: ShardSet, num_samples: int, sample_tokens: int) -> list[str]:
    """The first documents that begin at or after evenly spread positions, cut to `sample_tokens`."""
    decode = tokenizer.load(shards.tokenizer_folder).decode
    texts: dict[int, str] = {}
    for number in range(num_samples):
        position = number * shards.num_tokens // num_samples
        starts = shards.document_starts(position, min(shards.num_tokens, _SEARCHED_TOKENS))
        if not len(starts):
            continue  # in the midst of a document longer than that
        until = int(starts[1]) if len(starts) > 1 else shards.num_tokens
        start, count = position + int(starts[0]), min(sample_tokens, until - int(starts[0]))
        texts[start % shards.num_tokens] = decode(shards.tokens(start, count).tolist())
    return list(texts.values())
