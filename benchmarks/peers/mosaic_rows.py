"""mosaicml-streaming over prepacked rows, one sample each, shuffled by py1e."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np


def _stub(module: str, name: str) -> None:
    """Stand an empty class in for what mosaicml-streaming only subclasses or asks isinstance() of.

    Importing it imports its image and text datasets, hence torchvision, whose wheel is of no use to a CPU build of
    torch, and transformers of a version that refuses the huggingface_hub of the other peers. Neither reads a token.
    """
    for depth in range(1, module.count(".") + 2):
        sys.modules.setdefault(parent := ".".join(module.split(".")[:depth]), ModuleType(parent))
    setattr(sys.modules[module], name, type(name, (), {}))


_stub("torchvision.datasets", "VisionDataset")
_stub("torchvision.transforms.functional", "to_tensor")
_stub("transformers.feature_extraction_utils", "BatchFeature")
_stub("transformers.tokenization_utils_base", "BatchEncoding")
_stub("transformers.models.auto.tokenization_auto", "AutoTokenizer")

import streaming  # noqa: E402
from streaming.base.util import clean_stale_shared_memory  # noqa: E402

WHOLE_EPOCH = 1 << 40


def prepare(tokens: np.memmap, ends: np.ndarray, folder: Path, width: int) -> int:
    """Plain bytes: an ndarray column costs a little more to decode, for the same bytes on disk."""
    rows = len(tokens) // width
    with streaming.MDSWriter(out=str(folder / "rows"), columns={"tokens": "bytes"}) as writer:
        for row in range(rows):
            writer.write({"tokens": tokens[row * width : (row + 1) * width].tobytes()})
    return rows


def batches(folder: Path, rows: int, width: int, skip: int) -> Iterator[np.ndarray]:
    """Looking ahead over the whole epoch, which costs nothing where the shards are local, halves its CPU time.

    Its two threads then run through once; at the default they wake every 7 ms to see whether they may go on.
    """
    clean_stale_shared_memory()
    dataset = streaming.StreamingDataset(
        local=str(folder / "rows"),
        shuffle=True,
        shuffle_algo="py1e",
        shuffle_seed=0,
        batch_size=rows,
        predownload=WHOLE_EPOCH,
    )
    if skip:
        dataset.load_state_dict(dataset.state_dict(skip * rows, from_beginning=True) | {"epoch": 0})
    samples = iter(dataset)
    while len(batch := list(itertools.islice(samples, rows))) == rows:
        out = np.empty((rows, width), np.int64)
        for row, sample in enumerate(batch):
            out[row] = np.frombuffer(sample["tokens"], np.uint16)
        yield out
