"""What a finished shard folder holds, and the cheap proofs that it still does: files, sizes, indices, counts, dtype.

A folder is dataset.json (written last), a tar with an index beside it per shard, and the tokenizer. Everything here is
metadata; no token is read. Knows no torch.
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llm_dist.errors import UserError
from llm_dist.tokenizer import read_description

FORMAT = 1
INDEX_ROW = np.dtype(
    [
        ("token_offset", "<u8"),
        ("num_tokens", "<u8"),
        ("docs_offset", "<u8"),
        ("num_bytes", "<u8"),
        ("num_documents", "<u4"),
        ("crc_tokens", "<u4"),
        ("crc_docs", "<u4"),
        ("flags", "<u4"),
    ]
)
CONTINUES = 1
"""Flag: the chunk's first document is the rest of the previous chunk's last one."""
DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_MOST_FRAMING_BYTES = 2048
"""Between a chunk's tokens and its document ends stand padding, a tar header and a .npy header."""
_COUNTS = ("num_tokens", "num_documents", "num_bytes")
_DATASET_KEYS = ("dtype", "tokenizer", "vocabulary_tokens", *_COUNTS, "fingerprint", "shards")


def read_dataset(folder: Path) -> dict[str, Any]:
    """dataset.json of a finished shard folder, with a known format and dtype."""
    path = folder / "dataset.json"
    try:
        dataset = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(_why_not_a_dataset(folder)) from None
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
        return f"{folder}: unfinished, it has shards but no dataset.json; run the same llm-dist tokenize again"
    return f"{folder}: not a shard folder, it has no dataset.json; llm-dist tokenize makes one"


def index_path(folder: Path, shard_name: str) -> Path:
    """The index that lies beside a shard."""
    return folder / f"{shard_name.removesuffix('.tar')}.idx.npy"


def read_index(folder: Path, shard: dict[str, Any]) -> np.ndarray:
    """One shard's index: structured array [num_chunks] of `INDEX_ROW`, proved against its sha256 in dataset.json."""
    path = index_path(folder, shard["name"])
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: the index is missing; restore it or tokenize again") from None
    if hashlib.sha256(content).hexdigest() != shard["index_sha256"]:
        raise UserError(f"{path}: the index is not the one dataset.json names (sha256); restore it or tokenize again")
    try:
        rows: np.ndarray = np.load(io.BytesIO(content), allow_pickle=False)
    except ValueError as error:
        raise UserError(f"{path}: not an index ({error}); tokenize again") from None
    if rows.dtype != INDEX_ROW or rows.ndim != 1:
        raise UserError(f"{path}: not an index of format {FORMAT}; tokenize again")
    return rows


def check_counts(folder: Path, dataset: dict[str, Any]) -> None:
    """The shards' counts sum to the dataset's, and there is something to read."""
    for key in _COUNTS:
        total = sum(shard[key] for shard in dataset["shards"])
        if total != dataset[key]:
            raise UserError(
                f"{folder}/dataset.json: {key}={dataset[key]} but its shards sum to {total}; tokenize again"
            )
    if not dataset["num_tokens"]:
        raise UserError(f"{folder}: holds no tokens; tokenize a longer text or hold out less")


def check_shard(folder: Path, shard: dict[str, Any], rows: np.ndarray, dtype: np.dtype[Any]) -> None:
    """A shard is there in its full length and its index fits it."""
    path = folder / shard["name"]
    if not path.is_file():
        raise UserError(f"{path}: the shard is missing; restore it or tokenize again")
    size = path.stat().st_size
    if size != shard["bytes"]:
        kind = "truncated" if size < shard["bytes"] else "too long"
        raise UserError(f"{path}: {kind}, {size} bytes instead of {shard['bytes']}; restore it or tokenize again")
    if mistake := index_mistake(rows, shard, dtype):
        raise UserError(f"{index_path(folder, shard['name'])}: {mistake}; tokenize again")


def index_mistake(rows: np.ndarray, shard: dict[str, Any], dtype: np.dtype[Any]) -> str | None:
    """Why an index does not fit its entry in dataset.json; None when it fits."""
    if len(rows) != shard["num_chunks"]:
        return f"{len(rows)} chunks, dataset.json says {shard['num_chunks']}"
    for key in ("num_tokens", "num_bytes"):
        if (total := int(rows[key].sum())) != shard[key]:
            return f"{key} sums to {total}, dataset.json says {shard[key]}"
    ends = rows["token_offset"] + rows["num_tokens"] * np.uint64(dtype.itemsize)
    docs_ends = rows["docs_offset"] + rows["num_documents"].astype(np.uint64) * np.uint64(4)
    outside = (rows["num_tokens"] == 0) | (ends > rows["docs_offset"]) | (docs_ends > shard["bytes"])
    outside |= (rows["token_offset"] % np.uint64(64) != 0) | (rows["docs_offset"] % np.uint64(64) != 0)
    outside |= ends + np.uint64(_MOST_FRAMING_BYTES) < rows["docs_offset"]
    if outside.any():
        return f"chunk {int(outside.argmax())} does not fit the shard and dtype {dtype.name}"
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
