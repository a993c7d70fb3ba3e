"""Run the peers of the token loader, each in a process of its own under the peers' interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.peers.worker import PEERS

ROOT = Path(__file__).parents[2]
LIMIT_SECONDS = 1200
"""Far above what any takes; a peer whose threads wait for one another would else hold up the rest for ever."""

_FIND = "import sys, importlib.util; print(*[name for name in sys.argv[1:] if importlib.util.find_spec(name)])"


def peers(python: Path) -> list[str]:
    """The peers whose package is installed under this interpreter; none where there is no such interpreter.

    One that is installed but broken is listed, and fails by name when it is asked to prepare or read: it shall not go
    missing from a table without a word.
    """
    if not (ROOT / python).exists():
        return []
    found = subprocess.run(
        [ROOT / python, "-c", _FIND, *PEERS.values()], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    ).stdout.split()
    return [peer for peer, package in PEERS.items() if package in found]


def prepare(python: Path, peer: str, source: Path, folder: Path) -> dict[str, Any]:
    """Write the peer's format of `source` into `folder`, once; its rows of an epoch and the seconds it took."""
    return _work(python, peer, "prepare", str(source.absolute()), str(folder.absolute()))


def read(python: Path, peer: str, folder: Path, batches: int) -> dict[str, Any]:
    """What `worker.read` measured over so many batches."""
    return _work(python, peer, "read", str(folder.absolute()), "--batches", str(batches))


def _work(python: Path, peer: str, job: str, *arguments: str) -> dict[str, Any]:
    """The worker's last line of output.

    Temporary files go to a folder of its own, which is removed: litdata and mosaicml-streaming leave some behind, and
    two runs of the latter would meet on one lock.
    """
    command = [str(ROOT / python), "-m", "benchmarks.peers.worker", peer, job, *arguments]
    with tempfile.TemporaryDirectory(prefix="peer-") as scratch:
        settings = {"TMPDIR": scratch, "HF_HOME": scratch, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=os.environ | settings,
                capture_output=True,
                text=True,
                timeout=LIMIT_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{peer} did not {job} within {LIMIT_SECONDS} s") from None
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
        raise RuntimeError(f"{peer} did not {job} (exit status {done.returncode}): {said[-1]}")
    return json.loads(done.stdout.splitlines()[-1])
