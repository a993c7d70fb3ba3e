"""What a run folder says about its attempts: their numbers, the newest complete checkpoint, whether rank 0 is alive.

Reads only; knows nothing of how a run is trained or started.
"""

from __future__ import annotations

import json
import re
import socket
import time
from pathlib import Path
from typing import Any

import psutil

from llm_dist.checkpoint.layout import latest

FRESH_SECONDS = 60.0
"""A heartbeat older than this belongs to a rank that has stopped or hangs."""

_ATTEMPT = re.compile(r"attempt_(\d+)\.json")


def read_table(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None where there is none yet or it is only half written."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    return table if isinstance(table, dict) else None


def attempts(run: Path) -> list[dict[str, Any]]:
    """What each start of the run wrote about itself, oldest first."""
    found = (read_table(path) for path in sorted((run / "attempts").glob("attempt_*.json")))
    return [table for table in found if table is not None]


def next_attempt(run: Path) -> int:
    """Number that the next start will carry."""
    names = (_ATTEMPT.fullmatch(path.name) for path in (run / "attempts").glob("attempt_*.json"))
    return 1 + max((int(name[1]) for name in names if name), default=0)


def latest_complete_step(run: Path) -> int | None:
    """Step of the newest complete checkpoint."""
    found = latest(run / "checkpoints")
    return found.step if found else None


def describe_checkpoint(run: Path) -> str:
    """The newest complete checkpoint, in words that end a line."""
    step = latest_complete_step(run)
    return "no complete checkpoint stands yet" if step is None else f"the checkpoint at step {step} stands"


def hang_verdict(run: Path) -> str | None:
    """Why the newest attempt ended, where its ranks found that nothing went on any more."""
    verdict = read_table(run / "heartbeats" / f"verdict_{next_attempt(run) - 1:04d}.json")
    return None if verdict is None else str(verdict.get("words"))


def heartbeat(run: Path) -> dict[str, Any] | None:
    """The last sign of life of rank 0: pid, host, time (unix seconds), step, phase."""
    return read_table(run / "heartbeat.json")


def is_running(run: Path) -> bool:
    """Whether rank 0 gave a fresh sign of life and, where that can be asked, its process lives."""
    beat = heartbeat(run)
    if beat is None or time.time() - float(beat.get("time", 0.0)) > FRESH_SECONDS:
        return False
    return beat.get("host") != socket.gethostname() or _is_alive(int(beat.get("pid", 0)))


def runs_here(run: Path) -> bool:
    """Whether rank 0 runs on this machine."""
    return is_running(run) and (heartbeat(run) or {}).get("host") == socket.gethostname()


def _is_alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except (psutil.NoSuchProcess, ValueError):
        return False
