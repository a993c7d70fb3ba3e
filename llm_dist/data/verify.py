"""Prove every byte of a shard folder and name all that is damaged.

Unlike opening, which stops at the first mistake and reads no token, this goes on past damage and reads everything.
Knows no order and no torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llm_dist import tokenizer
from llm_dist.data.chunks import Integers
from llm_dist.data.folder import (
    BLOCK_TOKENS,
    CHECKSUMS,
    DATASET,
    DTYPES,
    INDEX,
    INDEX_ROW,
    blocks_of,
    check_counts,
    check_tokenizer,
    checksum,
    index_mistake,
    read_checksums,
    read_dataset,
    read_index,
    stored_dtype,
)
from llm_dist.data.labels import LABELS, open_labels
from llm_dist.data.shards import dataset_fingerprint
from llm_dist.errors import UserError

Checksums = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Damage:
    """One thing that is not as it was written."""

    file: str
    """Name inside the folder."""
    what: str
    """What is wrong, in a few words."""
    chunk: int | None = None
    """Number of the chunk inside its shard; None: the whole file."""


def verify(folder: str | Path) -> list[Damage]:
    """All damage of a shard folder, in the order of its files; an empty list says that every byte is as written.

    Raises:
        UserError: there is no readable dataset.json, so that nothing says what the folder should hold.
    """
    path = Path(folder)
    dataset = read_dataset(path)
    damages = list(_dataset_damages(path, dataset))
    rows, checksums = _tables(path, dataset, damages)
    first_chunk = first_block = 0
    for shard in dataset["shards"]:
        own = rows[first_chunk : first_chunk + shard["num_chunks"]]
        num_blocks = int(blocks_of(own).sum())
        damages.extend(_shard_damages(path, shard, own, checksums[first_block : first_block + num_blocks], dataset))
        first_chunk, first_block = first_chunk + shard["num_chunks"], first_block + num_blocks
    return damages


def _tables(folder: Path, dataset: dict[str, Any], damages: list[Damage]) -> tuple[np.ndarray, Checksums]:
    """Index and checksums; empty where they are damaged, which is added to `damages`."""
    rows, checksums = np.empty(0, INDEX_ROW), np.empty(0, np.uint64)
    try:
        rows = read_index(folder, dataset)
    except UserError as error:
        damages.append(Damage(INDEX, _without_path(error)))
        damages.extend(_checksums_damages(folder, dataset["checksums_sha256"]))
        return rows, checksums
    if mistake := index_mistake(rows, dataset):
        damages.append(Damage(INDEX, mistake))
    try:
        checksums = read_checksums(folder, dataset, rows)
    except UserError as error:
        damages.append(Damage(CHECKSUMS, _without_path(error)))
    return rows, checksums


def _checksums_damages(folder: Path, sha256: str) -> Iterator[Damage]:
    """What can be said of the checksums where no index says how many there are."""
    path = folder / CHECKSUMS
    if not path.is_file():
        yield Damage(CHECKSUMS, "missing")
    elif hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        yield Damage(CHECKSUMS, f"not the one {DATASET} names (sha256)")


def _dataset_damages(folder: Path, dataset: dict[str, Any]) -> Iterator[Damage]:
    try:
        check_counts(str(folder), dataset)
    except UserError as error:
        yield Damage("dataset.json", _without_path(error))
    shas = [shard["sha256"] for shard in dataset["shards"]]
    fingerprint = dataset_fingerprint(dataset["dtype"], dataset["tokenizer"], shas, dataset.get("labels"))
    if fingerprint != dataset["fingerprint"]:
        yield Damage("dataset.json", "dtype, tokenizer and shards do not give the fingerprint")
    try:
        open_labels(str(folder), dataset)
    except UserError as error:
        yield Damage(LABELS, _without_path(error))
    try:
        check_tokenizer(folder, dataset["tokenizer"])
        tokenizer.load(folder / "tokenizer")
    except UserError as error:
        yield Damage("tokenizer", _without_path(error))


def _shard_damages(
    folder: Path, shard: dict[str, Any], rows: np.ndarray, checksums: Checksums, dataset: dict[str, Any]
) -> Iterator[Damage]:
    name, path = shard["name"], folder / shard["name"]
    if not path.is_file():
        yield Damage(name, "missing")
        return
    if (size := path.stat().st_size) != shard["bytes"]:
        yield Damage(name, f"{'truncated' if size < shard['bytes'] else 'too long'}: {size} of {shard['bytes']} bytes")
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != shard["sha256"]:
            yield Damage(name, "sha256 differs")
    content = np.memmap(path, np.uint8, "r") if size else np.empty(0, np.uint8)
    first_block = 0
    for number, (row, num_blocks) in enumerate(zip(rows, blocks_of(rows).tolist(), strict=True)):
        own = checksums[first_block : first_block + num_blocks]
        for what in _chunk_damages(content, row, own, DTYPES[dataset["dtype"]], dataset["vocabulary_tokens"]):
            yield Damage(name, what, number)
        first_block += num_blocks


def _chunk_damages(
    shard: npt.NDArray[np.uint8], row: np.void, checksums: Checksums, dtype: np.dtype[Any], vocabulary_tokens: int
) -> Iterator[str]:
    """What is wrong with a chunk; `checksums` [blocks] is empty where they are unknown."""
    tokens_offset, docs_offset = int(row["token_offset"]), int(row["docs_offset"])
    tokens_end = tokens_offset + int(row["num_tokens"]) * dtype.itemsize
    docs_end = docs_offset + int(row["num_documents"]) * 4
    if max(tokens_end, docs_end) > len(shard):
        yield "cut off"
        return
    if (found := stored_dtype(shard, tokens_offset)) != dtype:
        yield f"stored as {found or 'something unreadable'}, dataset.json says {dtype.name}"
        return
    tokens = np.frombuffer(shard[tokens_offset:tokens_end].data, dtype)
    ends = np.frombuffer(shard[docs_offset:docs_end].data, "<u4")
    damages = [f"checksum of tokens {first}-{last} differs" for first, last in _damaged_ranges(tokens, checksums)]
    if checksum(ends.data) != row["docs_checksum"]:
        damages.append("checksum of the document ends differs")
    # Of what a checksum already calls damaged it would only say so again.
    if not damages and (what := _content_damage(tokens, ends, vocabulary_tokens)):
        damages.append(what)
    yield from damages


def _damaged_ranges(tokens: Integers, checksums: Checksums) -> list[tuple[int, int]]:
    """First and last token of each run of blocks whose checksums differ."""
    ranges: list[tuple[int, int]] = []
    for first, expected in zip(range(0, len(tokens), BLOCK_TOKENS), checksums.tolist(), strict=False):
        block = tokens[first : first + BLOCK_TOKENS]
        if checksum(block.data) == expected:
            continue
        begin = ranges.pop()[0] if ranges and ranges[-1][1] == first - 1 else first
        ranges.append((begin, first + len(block) - 1))
    return ranges


def _content_damage(tokens: Integers, ends: Integers, vocabulary_tokens: int) -> str | None:
    """What no checksum can tell: a chunk that was written wrong."""
    if not len(ends) or ends[0] == 0 or (ends[1:] <= ends[:-1]).any() or ends[-1] != len(tokens):
        return "document ends do not rise to the number of tokens"
    if (largest := int(tokens.max())) >= vocabulary_tokens:
        return f"token id {largest} is outside the vocabulary of {vocabulary_tokens}"
    return None


def _without_path(error: UserError) -> str:
    """A mistake's line without the path in front and the way out behind."""
    return str(error).split(": ", 1)[-1].rsplit("; ", 1)[0]
