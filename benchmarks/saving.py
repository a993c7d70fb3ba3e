"""Checkpoints of one rank: how long training stands still, and the rates of the disk that are reached.

What takes part takes turns in rounds, each in a folder of its own; the page cache lets go of what is about to be read.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llm_dist import config
from llm_dist.checkpoint import layout
from llm_dist.checkpoint.layout import Facts
from llm_dist.checkpoint.store import Store
from llm_dist.engine.partition import Partition
from llm_dist.model.transformer import Transformer
from llm_dist.train.guard import checksum

RUN_FILE, VOCABULARY = "configs/125m.toml", 32_000
ROUNDS = 5
CHUNK_BYTES = 8 * 2**20
FOLDER = Path("build")
"""On the disk that is measured; a folder for temporary files may be in memory."""
REFERENCE = {
    "save": "plain write",
    "stall, first": "save",
    "stall, later": "save",
    "until durable": "save",
    "restore": "plain read",
}
"""What each time is divided by."""

State = Mapping[str, Partition]
Seconds = dict[str, float]


def measure() -> list[dict[str, Any]]:
    """One row per part: seconds (median, lowest, highest), its rate, and the ratio of its median to another's."""
    state = _state()
    num_bytes = sum(partition.values.nbytes for partition in state.values())
    print(f"  the state of {RUN_FILE}: {num_bytes / 1e9:.2f} GB; {ROUNDS} rounds")
    rounds = []
    FOLDER.mkdir(exist_ok=True)
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory(prefix="saving-", dir=FOLDER) as folder:
            rounds.append(_round(Path(folder), state))
    medians = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
    return [
        {
            "what": name,
            "seconds": median,
            "lowest": min(each[name] for each in rounds),
            "highest": max(each[name] for each in rounds),
            "GB/s": num_bytes / median / 1e9,
            "ratio": median / medians[REFERENCE.get(name, name)],
            "to": REFERENCE.get(name, ""),
        }
        for name, median in medians.items()
    ]


def _state() -> State:
    """Parameters and both moments of AdamW, as `plain` on one rank holds them."""
    with torch.device("meta"):
        model = Transformer(config.load(RUN_FILE).model, VOCABULARY, torch.float32)
    return {
        f"{kind}/{name}": Partition(torch.randn(parameter.numel()), 0, tuple(parameter.shape))
        for kind in ("param", "exp_avg", "exp_avg_sq")
        for name, parameter in model.named_parameters()
    }


def _round(folder: Path, state: State) -> Seconds:
    plain, store, facts = folder / "plain", Store(folder, rank=0, ranks=1, attempt=1), Facts({}, {}, 1)
    found: Seconds = {"plain write": _timed(lambda: _write(plain, state))}
    found["save"] = _timed(lambda: store.save(1, state, facts))
    found["host buffer"] = _timed(lambda: store.reserve(state))
    for step, name in ((2, "stall, first"), (3, "stall, later")):
        began = time.perf_counter()
        found[name] = store.save(step, state, facts, asynchronous=True).stall_seconds
        store.wait()
        found["until durable"] = time.perf_counter() - began
    _forget(plain)
    found["plain read"] = _timed(lambda: _read(plain))
    latest = layout.latest(folder)
    assert latest is not None
    _forget(latest.folder / layout.data_name(0))
    found["restore"] = _timed(lambda: store.restore(latest, state))
    found["deletion"] = _timed(lambda: store.retain(keep_last=2))
    found["comparing replicas"] = _timed(lambda: [checksum(partition.values) for partition in state.values()])
    return found


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _write(path: Path, state: State) -> None:
    """The same bytes at the pace of the disk: no checksums, no names."""
    with path.open("wb", buffering=0) as file:
        for partition in state.values():
            view = partition.values.numpy().data.cast("B")
            for begin in range(0, len(view), CHUNK_BYTES):
                file.write(view[begin : begin + CHUNK_BYTES])
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # begin at once, as the store does
        os.fsync(file)


def _read(path: Path) -> None:
    chunk = np.empty(CHUNK_BYTES, np.uint8)
    with path.open("rb", buffering=0) as file:
        while file.readinto(chunk.data):
            pass


def _forget(path: Path) -> None:
    """Let the page cache go of a file that is on disk."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
