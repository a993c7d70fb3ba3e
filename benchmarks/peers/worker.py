"""One peer of the token loader, in a process of its own: prepare its format once, then read it and print one JSON line.

It runs in the peers' environment, where the project is not installed, and imports the one peer it is asked for: their
dependencies contradict one another's and the project's. Our own loader is measured by it too, in our environment.

python -m benchmarks.peers.worker PEER prepare SRC FOLDER    SRC holds tokens.bin (uint16) and ends.npy (uint64)
python -m benchmarks.peers.worker PEER read FOLDER --batches N
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

PEERS = {
    "loader": "llm_dist",
    "loader_masked": "llm_dist",
    "memmap": "numpy",
    "memmap_array": "numpy",
    "webdataset_chunks": "webdataset",
    "litdata_tokens": "litdata",
    "hf_rows": "datasets",
    "mosaic_rows": "streaming",
}
"""Each peer, a module beside this one, and the package without which it cannot be imported."""

ROWS, SEQUENCE = 16, 2048
WIDTH = SEQUENCE + 1
BETWEEN_LOOKS = 20
"""Batches between looks at the memory: the look costs half as much as a batch of the fastest peer, and is not timed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=PEERS)
    jobs = parser.add_subparsers(dest="job", required=True)
    preparing = jobs.add_parser("prepare")
    preparing.add_argument("source", type=Path)
    preparing.add_argument("folder", type=Path)
    reading = jobs.add_parser("read")
    reading.add_argument("folder", type=Path)
    reading.add_argument("--batches", type=int, required=True)
    arguments = parser.parse_args()
    peer = importlib.import_module(f"benchmarks.peers.{arguments.peer}")
    if arguments.job == "prepare":
        result = prepare(peer, arguments.source, arguments.folder)
    else:
        result = read(peer, arguments.folder, arguments.batches)
    print(json.dumps(result))


def prepare(peer: ModuleType, source: Path, folder: Path) -> dict[str, Any]:
    """Write the peer's format, unless it has been; the last thing written says that all of it is there."""
    done = folder / "prepared.json"
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        tokens = np.memmap(source / "tokens.bin", np.uint16, "r")
        began = time.perf_counter()
        rows = peer.prepare(tokens, np.load(source / "ends.npy"), folder, WIDTH)
        done.write_text(json.dumps({"rows": rows, "seconds": time.perf_counter() - began}))
    return json.loads(done.read_text())


def read(peer: ModuleType, folder: Path, num_batches: int) -> dict[str, Any]:
    """CPU time is what counts, children and threads included: wall time is a matter of who else is on the machine."""
    epoch = json.loads((folder / "prepared.json").read_text())["rows"] // ROWS
    if not 0 < num_batches <= epoch:
        raise ValueError(f"--batches {num_batches}: the epoch of this corpus has {epoch}")
    memory = [_anonymous_megabytes()]
    wall, cpu = time.perf_counter(), _cpu_seconds()
    first, reader = _first(peer, folder, 0)
    seconds, cpu_seconds = time.perf_counter() - wall, _cpu_seconds() - cpu
    open_seconds = seconds
    whole = first if first.shape == (ROWS, WIDTH) else first.base  # ours gives the inputs, a view of what it has made
    if whole is None or whole.shape[-1] != WIDTH or len(first) != ROWS or first.dtype != np.int64:
        raise TypeError(f"{peer.__name__} gave {first.dtype} of {first.shape}, not int64 of {(ROWS, WIDTH)}")
    for done in range(1, num_batches, BETWEEN_LOOKS):
        memory.append(_anonymous_megabytes())
        wall, cpu = time.perf_counter(), _cpu_seconds()
        for _ in range(min(BETWEEN_LOOKS, num_batches - done)):
            next(reader)
        seconds += time.perf_counter() - wall
        cpu_seconds += _cpu_seconds() - cpu
    memory.append(_anonymous_megabytes())
    del reader
    wall = time.perf_counter()
    _first(peer, folder, epoch // 2)
    return {
        "cpu_seconds": cpu_seconds,
        "wall_seconds": seconds,
        "tokens": num_batches * ROWS * SEQUENCE,
        "open_seconds": open_seconds,
        "resume_seconds": time.perf_counter() - wall,
        "peak_anon_mb": None if None in memory else max(memory),
        "imports_anon_mb": memory[0],
    }


def _first(peer: ModuleType, folder: Path, skip: int) -> tuple[np.ndarray, Iterator[np.ndarray]]:
    reader = iter(peer.batches(folder, ROWS, WIDTH, skip))
    return next(reader), reader


def _cpu_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _anonymous_megabytes() -> float | None:
    """Private memory, without the mapped files, which the kernel takes back when it likes; Linux alone tells."""
    status = Path("/proc/self/status")
    found = re.search(r"RssAnon:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) / 1024 if found else None


if __name__ == "__main__":
    main()
