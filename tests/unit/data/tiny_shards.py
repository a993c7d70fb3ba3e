"""Write a small shard folder by the format's text alone, so that readers are tested against it and not the writer."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from xxhash import xxh3_64_intdigest

from llm_dist.data.folder import BLOCK_TOKENS, CONTINUES, INDEX_ROW

SEPARATOR = 0


def write_shards(
    folder: Path,
    documents: Sequence[Sequence[int]],
    tokenizer_folder: Path,
    *,
    dtype: str = "uint16",
    chunk_tokens: int = 64,
    chunks_per_shard: int = 2,
    vocabulary_tokens: int = 1000,
) -> np.ndarray:
    """Store each document behind a separator; return the stream. Documents longer than a chunk are continued."""
    chunks: list[tuple[np.ndarray, list[int], int]] = []
    pending: list[int] = []
    ends: list[int] = []

    def flush(flags: int = 0) -> None:
        nonlocal pending, ends
        if pending:
            chunks.append((np.array(pending, np.dtype(dtype).newbyteorder("<")), ends, flags))
        pending, ends = [], []

    for document in documents:
        tokens = [SEPARATOR, *document]
        if len(pending) + len(tokens) > chunk_tokens:
            flush()
        flags = 0
        while len(tokens) > chunk_tokens:
            pending, ends, tokens = tokens[:chunk_tokens], [chunk_tokens], tokens[chunk_tokens:]
            flush(flags)
            flags = CONTINUES
        pending.extend(tokens)
        ends.append(len(pending))
        if flags:
            flush(flags)
    flush()
    folder.mkdir(parents=True, exist_ok=True)
    groups = [chunks[first : first + chunks_per_shard] for first in range(0, len(chunks), chunks_per_shard)]
    rows: list[np.ndarray] = []
    shards = [_write_shard(folder, number, group, rows) for number, group in enumerate(groups)]
    tables = {"index": _npy(np.concatenate(rows)), "checksums": _npy(_block_checksums(chunks))}
    for name, content in tables.items():
        (folder / f"{name}.npy").write_bytes(content)
    fingerprint = json.loads((tokenizer_folder / "llm_dist_tokenizer.json").read_text())["fingerprint"]
    shutil.copytree(tokenizer_folder, folder / "tokenizer")
    identity = "\n".join([dtype, fingerprint, *(str(shard["sha256"]) for shard in shards)])
    dataset = {
        "format": 2,
        "dtype": dtype,
        "tokenizer": fingerprint,
        "vocabulary_tokens": vocabulary_tokens,
        **{key: sum(shard[key] for shard in shards) for key in ("num_tokens", "num_documents", "num_bytes")},
        "fingerprint": hashlib.sha256(identity.encode()).hexdigest(),
        **{f"{name}_sha256": hashlib.sha256(content).hexdigest() for name, content in tables.items()},
        "made_from": {},
        "shards": shards,
    }
    (folder / "dataset.json").write_text(json.dumps(dataset))
    return np.array([token for document in documents for token in (SEPARATOR, *document)], np.int64)


def _block_checksums(chunks: list[tuple[np.ndarray, list[int], int]]) -> np.ndarray:
    blocks = [
        tokens[first : first + BLOCK_TOKENS] for tokens, *_ in chunks for first in range(0, len(tokens), BLOCK_TOKENS)
    ]
    return np.array([xxh3_64_intdigest(block) for block in blocks], "<u8")


def _write_shard(
    folder: Path, number: int, chunks: list[tuple[np.ndarray, list[int], int]], all_rows: list[np.ndarray]
) -> dict[str, object]:
    rows = np.zeros(len(chunks), INDEX_ROW)
    name = f"shard-{number:06d}.tar"
    with (folder / name).open("wb") as file:
        for row, (tokens, ends, flags) in zip(rows, chunks, strict=True):
            docs = np.array(ends, "<u4")
            key = f"{number * 1000 + int(np.flatnonzero(rows['num_tokens'] == 0)[0]):09d}"
            row["token_offset"] = _member(file, f"{key}.tokens.npy", _npy(tokens)) - tokens.nbytes
            row["docs_offset"] = _member(file, f"{key}.docs.npy", _npy(docs)) - docs.nbytes
            _member(file, f"{key}.json", b"{}")
            row["num_tokens"], row["num_documents"], row["flags"] = len(tokens), len(docs), flags
            row["num_bytes"] = 3 * len(tokens)
            row["docs_checksum"] = xxh3_64_intdigest(docs)
        file.write(bytes(1024))
    content = (folder / name).read_bytes()
    all_rows.append(rows)
    return {
        "name": name,
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "num_chunks": len(rows),
        "num_tokens": int(rows["num_tokens"].sum()),
        "num_documents": int(rows["num_documents"].sum()) - int((rows["flags"] & CONTINUES).sum()),
        "num_bytes": int(rows["num_bytes"].sum()),
    }


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _member(file: io.BufferedWriter, name: str, payload: bytes) -> int:
    """Append a tar member; return where its payload ends."""
    header = tarfile.TarInfo(name)
    header.size = len(payload)
    file.write(header.tobuf(tarfile.USTAR_FORMAT))
    file.write(payload)
    end = file.tell()
    file.write(bytes(-len(payload) % 512))
    return end
