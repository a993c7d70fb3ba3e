"""The loader beside the other loaders, each at its best: tokens per CPU second, first batch, resume, memory.

Every reading is a process of its own, and the readers take turns: what the machine does meanwhile meets all alike. The
peers are measured where `make peers` has installed them; those that are missing are named.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers import run
from benchmarks.peers.worker import PEERS

NUM_TOKENS, ROUNDS = 100_000_000, 5
MEAN_TOKENS, SIGMA = 600, 1.2
"""Of documents, whose lengths are log-normal: half of them are shorter than half of the mean."""
PEERS_PYTHON = Path(".venv-peers/bin/python")
LIMIT = "memmap"


def measure() -> list[dict[str, Any]]:
    """One row per reader; the ratio is of medians of CPU time against a permuted numpy.memmap."""
    with tempfile.TemporaryDirectory(prefix="loader-") as folder:
        return _measure(Path(folder))


def _measure(folder: Path) -> list[dict[str, Any]]:
    _write(folder / "source")
    pythons = _pythons()
    if missing := PEERS.keys() - pythons.keys():
        print(f"  not installed: {', '.join(sorted(missing))}; `make peers` brings them")
    batches = min(
        run.prepare(python, peer, folder / "source", folder / peer)["rows"] // 16 for peer, python in pythons.items()
    )
    found: dict[str, list[dict[str, Any]]] = {peer: [] for peer in pythons}
    for _ in range(ROUNDS):
        for peer, python in pythons.items():
            found[peer].append(run.read(python, peer, folder / peer, batches))
    limit = _median(found[LIMIT], "cpu_seconds")
    return [
        {
            "reader": peer,
            "Mtokens/CPU s": rounds[0]["tokens"] / _median(rounds, "cpu_seconds") / 1e6,
            "ratio": limit / _median(rounds, "cpu_seconds"),
            "lowest": limit / max(each["cpu_seconds"] for each in rounds),
            "highest": limit / min(each["cpu_seconds"] for each in rounds),
            "first batch, s": _median(rounds, "open_seconds"),
            "resume half-way, s": _median(rounds, "resume_seconds"),
            "memory, MB": max(each["peak_anon_mb"] - each["imports_anon_mb"] for each in rounds),
        }
        for peer, rounds in found.items()
    ]


def _pythons() -> dict[str, Path]:
    """Which interpreter runs each reader: ours where it can, else the peers' own."""
    here = Path(sys.executable)
    return {peer: python for python in (PEERS_PYTHON, here) for peer in run.peers(python)}


def _write(folder: Path) -> None:
    """Tokens with documents of all lengths."""
    folder.mkdir()
    random = np.random.default_rng(0)
    mean_of_logs = np.log(MEAN_TOKENS) - SIGMA**2 / 2
    lengths = np.maximum(1, random.lognormal(mean_of_logs, SIGMA, NUM_TOKENS // MEAN_TOKENS)).astype(np.uint64)
    ends = np.cumsum(lengths)
    np.save(folder / "ends.npy", ends)
    random.integers(8, 1 << 16, int(ends[-1]), np.uint16).tofile(folder / "tokens.bin")


def _median(rounds: list[dict[str, Any]], name: str) -> float:
    return statistics.median(each[name] for each in rounds)
