"""The labels that lie beside the shards of labelled examples: of each document, or of each token.

Verified when they are opened, then read at random from memory-mapped files. Knows no examples, no order and no torch.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from io import BufferedRandom, BufferedReader, BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt

from llm_dist.data.folder import DATASET
from llm_dist.errors import UserError

LABELS = "labels.npy"
LABEL_DTYPE = np.dtype("<i4")

Per = Literal["document", "token"]
Numbers = npt.NDArray[np.integer[Any]]


class Labels:
    """The labels of one shard folder, memory-mapped; `open_labels` makes it."""

    def __init__(self, per: Per, names: Sequence[str], ids: npt.NDArray[np.int32]) -> None:
        self.per = per
        """What has a label: each document, or each token."""
        self.names = tuple(names)
        """In order of their ids."""
        self._ids = ids

    def counts(self) -> list[int]:
        """How often each label occurs."""
        counts: list[int] = np.bincount(self._ids[self._ids >= 0], minlength=len(self.names)).tolist()
        return counts

    def of_documents(self, numbers: Numbers) -> npt.NDArray[np.int32]:
        """Label ids of documents by their numbers in the stream: [n] -> [n]."""
        assert self.per == "document", "these labels are of tokens"
        return self._ids[numbers]

    def of_tokens(self, start: int, count: int) -> npt.NDArray[np.int32]:
        """Label ids of `count` tokens of the stream from `start` on, circular; -100 where a token has none."""
        assert self.per == "token", "these labels are of documents"
        first = start % len(self._ids)
        if first + count <= len(self._ids):
            return self._ids[first : first + count]
        return self._ids[np.arange(first, first + count) % len(self._ids)]


def open_labels(folder: str, dataset: Mapping[str, Any]) -> Labels | None:
    """The labels beside the shards that `dataset`, the content of dataset.json, describes; None: it has none.

    Raises:
        UserError: they are missing or damaged, or lie behind a URL.
    """
    if (about := dataset.get("labels")) is None:
        return None
    if "://" in folder:
        raise UserError(f"{folder}: has labels, which are read from a folder of this machine only; copy it here")
    path = Path(folder) / LABELS
    count = dataset["num_documents" if about["per"] == "document" else "num_tokens"]
    try:
        with path.open("rb") as file:
            if mistake := _mistake(file, about["sha256"], count):
                raise UserError(f"{path}: {mistake}; restore it, or delete {Path(folder).parent} to have it made anew")
    except FileNotFoundError:
        raise UserError(f"{path}: missing; restore it, or delete {Path(folder).parent} to have it made anew") from None
    return Labels(about["per"], about["names"], np.load(path, mmap_mode="r"))


def _mistake(file: BufferedReader, sha256: str, count: int) -> str | None:
    """Why the file is not the one that was written; None when it is."""
    size = os.fstat(file.fileno()).st_size
    write_header(header := BytesIO(), count)
    wanted = header.tell() + count * LABEL_DTYPE.itemsize
    if size != wanted:
        return f"{'truncated' if size < wanted else 'too long'}, {size} bytes instead of {wanted}"
    return None if sha256_of(file) == sha256 else f"damaged, not the one {DATASET} names (sha256)"


def write_header(file: BinaryIO, num_labels: int) -> None:
    """What stands before the labels: as long for any number of them, so that it is written again when that is known."""
    file.seek(0)
    header = {"descr": LABEL_DTYPE.str, "fortran_order": False, "shape": (num_labels,)}
    np.lib.format.write_array_header_1_0(file, header)


def sha256_of(file: BufferedReader | BufferedRandom) -> str:
    """Of the whole file."""
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()
