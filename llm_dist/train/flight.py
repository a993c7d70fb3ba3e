"""Which collective this rank waits in, from torch's flight recorder, and the recorder's whole memory for a post-mortem.

Works for gloo and, where there is a GPU, NCCL. (The NCCL side has not yet been run on a GPU.) The recorder's functions
are torch's private ones: where a version lacks them, nothing is known and nothing fails.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_ENTRIES = "2000"
_SIZES = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")
"""The variable that torch reads, and its earlier name."""
_RECORDERS = ("fr", "nccl")
"""The names by which torch calls the recorder of gloo and that of NCCL."""


def record() -> None:
    """Have the recorders remember the last collectives, unless the user has said how many; before any group is made."""
    if not any(name in os.environ for name in _SIZES):
        os.environ[_SIZES[0]] = _ENTRIES


def pending() -> str | None:
    """The collective this rank waits in, such as `gloo:all_reduce`; empty where in none, None where not known."""
    found: str | None = None
    for _, dump in _dumps("_json"):
        try:
            found = _pending(json.loads(dump()))
        except (ValueError, LookupError, TypeError, RuntimeError):
            continue
        if found:
            break
    return found


def _pending(table: dict[str, Any]) -> str:
    status = table.get("pg_status", {}).values()
    if all(int(each["last_enqueued_collective"]) <= int(each["last_completed_collective"]) for each in status):
        return ""
    waiting = [str(entry["profiling_name"]) for entry in table.get("entries", []) if not entry["retired"]]
    return waiting[0] if waiting else "a collective"


def dump(folder: Path, rank: int) -> None:
    """Write what the recorders hold to `folder`, where torch's `torchfrtrace` reads it."""
    for name, take in _dumps(""):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{'gloo' if name == 'fr' else name}_trace_rank_{rank}").write_bytes(take())


def _dumps(kind: str) -> Iterator[tuple[str, Callable[[], bytes]]]:
    from torch._C import _distributed_c10d

    for name in _RECORDERS:
        function: Any = getattr(_distributed_c10d, f"_dump_{name}_trace{kind}", None)
        if function is not None:
            yield name, function
