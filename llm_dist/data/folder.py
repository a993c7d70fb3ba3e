"""What a finished shard folder holds, and the cheap proofs that it still does: files, sizes, index, counts, dtype.

A folder is dataset.json (written last), index.npy and checksums.npy, the tars, and the tokenizer. It lies on this
machine or under a URL: `place` reads its files. Everything here is metadata; no token is read. Knows no torch.
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from llm_dist.errors import UserError
from llm_dist.tokenizer import read_description

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

FORMAT = 2
INDEX, CHECKSUMS, DATASET = "index.npy", "checksums.npy", "dataset.json"
TOKENIZER = "tokenizer"
INDEX_ROW = np.dtype(
    [
        ("token_offset", "<u8"),
        ("docs_offset", "<u8"),
        ("num_bytes", "<u8"),
        ("docs_checksum", "<u8"),
        ("num_tokens", "<u4"),
        ("num_documents", "<u4"),
        ("flags", "<u4"),
    ]
)
BLOCK_TOKENS = 1 << 16
"""Tokens of a chunk that share a checksum: they are proved together and, from afar, fetched together."""
CONTINUES = 1
"""Flag: the chunk's first document is the rest of the previous chunk's last one."""
DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_MOST_FRAMING_BYTES = 2048
"""Between a chunk's tokens and its document ends stand padding, a tar header and a .npy header."""
_COUNTS = ("num_tokens", "num_documents", "num_bytes")
_DATASET_KEYS = (
    *("dtype", "tokenizer", "vocabulary_tokens", *_COUNTS),
    *("fingerprint", "index_sha256", "checksums_sha256", "shards"),
)


def read_dataset(folder: Path, shown: str | None = None) -> dict[str, Any]:
    """dataset.json of a finished shard folder, with a known format and dtype; `shown` names the folder in messages."""
    try:
        content = (folder / DATASET).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(_why_not_a_dataset(folder)) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{folder / DATASET}: not JSON ({error}); restore the file or tokenize again") from None
    return parse_dataset(content, shown or str(folder))


def parse_dataset(content: str, shown: str) -> dict[str, Any]:
    """The table that dataset.json holds, when it is of this format; `shown` is the folder it lies in."""
    path = f"{shown}/{DATASET}"
    try:
        dataset = json.loads(content)
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); restore the file or tokenize again") from None
    if not isinstance(dataset, dict) or dataset.get("format") != FORMAT:
        found = dataset.get("format") if isinstance(dataset, dict) else None
        raise UserError(f"{path}: format {found!r}, this version reads format {FORMAT}; tokenize again")
    if missing := [key for key in _DATASET_KEYS if key not in dataset]:
        raise UserError(f"{path}: {', '.join(missing)} is missing; restore the file or tokenize again")
    if dataset["dtype"] not in DTYPES:
        raise UserError(f"{path}: dtype={dataset['dtype']!r} must be one of {', '.join(DTYPES)}; tokenize again")
    return dataset


def _why_not_a_dataset(folder: Path) -> str:
    if not folder.exists():
        return f"{folder}: no such shard folder; llm-dist tokenize makes one"
    if not folder.is_dir():
        return f"{folder}: a file, not a shard folder; llm-dist tokenize makes one from it"
    if (folder / "train").is_dir():
        return f"{folder}: not a shard folder but the folder of two; name {folder / 'train'}"
    if any(folder.glob("shard-*")):
        return f"{folder}: unfinished, it has shards but no {DATASET}; run the same llm-dist tokenize again"
    return f"{folder}: not a shard folder, it has no {DATASET}; llm-dist tokenize makes one"


def read_index(folder: Path, dataset: dict[str, Any]) -> np.ndarray:
    """The index: structured array [chunks] of `INDEX_ROW`, proved against its sha256 in dataset.json."""
    rows = _read_array(folder / INDEX, dataset["index_sha256"], INDEX_ROW)
    num_chunks = sum(shard["num_chunks"] for shard in dataset["shards"])
    if len(rows) != num_chunks:
        raise UserError(f"{folder / INDEX}: {len(rows)} chunks, {DATASET} says {num_chunks}; tokenize again")
    return rows


def read_checksums(folder: Path, dataset: dict[str, Any], rows: np.ndarray) -> npt.NDArray[np.uint64]:
    """XXH3-64 of every block of every chunk, in order [blocks]; proved against its sha256 in dataset.json."""
    checksums: npt.NDArray[np.uint64] = _read_array(folder / CHECKSUMS, dataset["checksums_sha256"], np.dtype("<u8"))
    num_blocks = int(blocks_of(rows).sum())
    if len(checksums) != num_blocks:
        raise UserError(f"{folder / CHECKSUMS}: {len(checksums)} blocks, {INDEX} says {num_blocks}; tokenize again")
    return checksums


def checksum(content: ReadableBuffer) -> int:
    """XXH3-64: several times as fast as CRC-32, so that proving what is read costs next to nothing."""
    return xxh3_64_intdigest(content)


def blocks_of(rows: np.ndarray) -> npt.NDArray[np.int64]:
    """Blocks of each chunk: [chunks]."""
    num_tokens: npt.NDArray[np.int64] = rows["num_tokens"].astype(np.int64)
    return -(-num_tokens // BLOCK_TOKENS)


def _read_array(path: Path, sha256: str, dtype: np.dtype[Any]) -> np.ndarray:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: missing; restore it or tokenize again") from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise UserError(f"{path}: not the one {DATASET} names (sha256); restore it or tokenize again")
    try:
        array: np.ndarray = np.load(io.BytesIO(content), allow_pickle=False)
    except ValueError as error:
        raise UserError(f"{path}: not an array ({error}); tokenize again") from None
    if array.dtype != dtype or array.ndim != 1:
        raise UserError(f"{path}: not of format {FORMAT}; tokenize again")
    return array


def check_counts(shown: str, dataset: dict[str, Any]) -> None:
    """The shards' counts sum to the dataset's, and there is something to read."""
    for key in _COUNTS:
        total = sum(shard[key] for shard in dataset["shards"])
        if total != dataset[key]:
            raise UserError(f"{shown}/{DATASET}: {key}={dataset[key]} but its shards sum to {total}; tokenize again")
    if not dataset["num_tokens"]:
        raise UserError(f"{shown}: holds no tokens; tokenize a longer text or hold out less")


def check_files(folder: Path, dataset: dict[str, Any]) -> None:
    """Every shard is there in its full length."""
    sizes = {entry.name: entry.stat().st_size for entry in os.scandir(folder) if entry.name.endswith(".tar")}
    for shard in dataset["shards"]:
        path, wanted = folder / shard["name"], shard["bytes"]
        if (size := sizes.get(shard["name"])) is None:
            raise UserError(f"{path}: the shard is missing; restore it or tokenize again")
        if size != wanted:
            kind = "truncated" if size < wanted else "too long"
            raise UserError(f"{path}: {kind}, {size} bytes instead of {wanted}; restore it or tokenize again")


def check_index(folder: Path, dataset: dict[str, Any], rows: np.ndarray) -> None:
    """The index fits the shards that dataset.json lists."""
    if mistake := index_mistake(rows, dataset):
        raise UserError(f"{folder / INDEX}: {mistake}; tokenize again")


def index_mistake(rows: np.ndarray, dataset: dict[str, Any]) -> str | None:
    """Why an index does not fit its dataset.json; None when it fits."""
    shards = dataset["shards"]
    num_chunks = [shard["num_chunks"] for shard in shards]
    if not all(num_chunks):
        return f"{shards[num_chunks.index(0)]['name']} has no chunk"
    firsts = np.cumsum([0, *num_chunks[:-1]])
    for key in ("num_tokens", "num_bytes"):
        sums = np.add.reduceat(rows[key].astype(np.int64), firsts)
        wrong = np.flatnonzero(sums != np.array([shard[key] for shard in shards]))
        if len(wrong):
            shard = shards[wrong[0]]
            return f"{key} of {shard['name']} sums to {sums[wrong[0]]}, {DATASET} says {shard[key]}"
    itemsize = DTYPES[dataset["dtype"]].itemsize
    ends = rows["token_offset"] + rows["num_tokens"].astype(np.uint64) * np.uint64(itemsize)
    docs_ends = rows["docs_offset"] + rows["num_documents"].astype(np.uint64) * np.uint64(4)
    shard_bytes = np.repeat(np.array([shard["bytes"] for shard in shards], np.uint64), num_chunks)
    outside = (rows["num_tokens"] == 0) | (ends > rows["docs_offset"]) | (docs_ends > shard_bytes)
    outside |= (rows["token_offset"] % np.uint64(64) != 0) | (rows["docs_offset"] % np.uint64(64) != 0)
    outside |= ends + np.uint64(_MOST_FRAMING_BYTES) < rows["docs_offset"]
    if outside.any():
        return f"chunk {int(outside.argmax())} does not fit its shard and dtype {dataset['dtype']}"
    return None


def check_tokenizer(folder: Path, fingerprint: str) -> None:
    """The tokenizer folder beside the shards says that it is the one that made them."""
    path = folder / "tokenizer"
    if not path.is_dir():
        raise UserError(f"{path}: the shards' tokenizer is missing; copy the folder they were made with there")
    found = str(read_description(path)["fingerprint"])
    if found != fingerprint:
        raise UserError(
            f"{path}: fingerprint {found[:12]}, but the tokens were made with {fingerprint[:12]}; "
            "put the right tokenizer back or tokenize again"
        )


def stored_dtype(shard: npt.NDArray[np.uint8], token_offset: int) -> np.dtype[Any] | None:
    """Dtype stated by the .npy header before a chunk's tokens; `shard` is the whole tar. None if unreadable."""
    before = shard[max(0, token_offset - 256) : token_offset].tobytes()
    start = before.rfind(b"\x93NUMPY")
    if start < 0:
        return None
    try:
        header: dict[str, Any] = ast.literal_eval(before[start + 10 :].decode("latin1").strip())
        return np.dtype(str(header["descr"]))
    except (SyntaxError, ValueError, KeyError, TypeError):
        return None
