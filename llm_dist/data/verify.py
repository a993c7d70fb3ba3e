"""Prove every byte of a shard folder and name all that is damaged.

Unlike opening, which stops at the first mistake and reads no token, this goes on past damage and reads everything.
Knows no order and no torch.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llm_dist import tokenizer
from llm_dist.data.folder import (
    DTYPES,
    check_counts,
    check_tokenizer,
    index_mistake,
    index_path,
    read_dataset,
    read_index,
    stored_dtype,
)
from llm_dist.data.index import Integers
from llm_dist.data.shards import dataset_fingerprint
from llm_dist.errors import UserError


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
    for shard in dataset["shards"]:
        damages.extend(_shard_damages(path, shard, dataset))
    return damages


def _dataset_damages(folder: Path, dataset: dict[str, Any]) -> Iterator[Damage]:
    try:
        check_counts(folder, dataset)
    except UserError as error:
        yield Damage("dataset.json", _without_path(error))
    shas = [shard["sha256"] for shard in dataset["shards"]]
    if dataset_fingerprint(dataset["dtype"], dataset["tokenizer"], shas) != dataset["fingerprint"]:
        yield Damage("dataset.json", "dtype, tokenizer and shards do not give the fingerprint")
    try:
        check_tokenizer(folder, dataset["tokenizer"])
        tokenizer.load(folder / "tokenizer")
    except UserError as error:
        yield Damage("tokenizer", _without_path(error))


def _shard_damages(folder: Path, shard: dict[str, Any], dataset: dict[str, Any]) -> Iterator[Damage]:
    name, dtype = shard["name"], DTYPES[dataset["dtype"]]
    rows: np.ndarray | None = None
    try:
        rows = read_index(folder, shard)
        if mistake := index_mistake(rows, shard, dtype):
            yield Damage(index_path(folder, name).name, mistake)
    except UserError as error:
        yield Damage(index_path(folder, name).name, _without_path(error))
    path = folder / name
    if not path.is_file():
        yield Damage(name, "missing")
        return
    if (size := path.stat().st_size) != shard["bytes"]:
        yield Damage(name, f"{'truncated' if size < shard['bytes'] else 'too long'}: {size} of {shard['bytes']} bytes")
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != shard["sha256"]:
            yield Damage(name, "sha256 differs")
    if rows is not None:
        content = np.memmap(path, np.uint8, "r") if size else np.empty(0, np.uint8)
        for number, row in enumerate(rows):
            if what := _chunk_damage(content, row, dtype, dataset["vocabulary_tokens"]):
                yield Damage(name, what, number)


def _chunk_damage(
    shard: npt.NDArray[np.uint8], row: np.void, dtype: np.dtype[Any], vocabulary_tokens: int
) -> str | None:
    """What is wrong with a chunk; None when nothing is."""
    tokens_offset, docs_offset = int(row["token_offset"]), int(row["docs_offset"])
    tokens_end = tokens_offset + int(row["num_tokens"]) * dtype.itemsize
    docs_end = docs_offset + int(row["num_documents"]) * 4
    if max(tokens_end, docs_end) > len(shard):
        return "cut off"
    if (found := stored_dtype(shard, tokens_offset)) != dtype:
        return f"stored as {found or 'something unreadable'}, dataset.json says {dtype.name}"
    if zlib.crc32(shard[tokens_offset:tokens_end].data) != row["crc_tokens"]:
        return "checksum of the tokens differs"
    if zlib.crc32(shard[docs_offset:docs_end].data) != row["crc_docs"]:
        return "checksum of the document ends differs"
    tokens = np.frombuffer(shard[tokens_offset:tokens_end].data, dtype)
    ends = np.frombuffer(shard[docs_offset:docs_end].data, "<u4")
    return _content_damage(tokens, ends, vocabulary_tokens)


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
