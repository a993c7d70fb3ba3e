"""Nodes that a run keeps away from, and for how long: RUN/slurm/excluded.json."""

from __future__ import annotations

from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from llm_dist.errors import UserError
from llm_dist.publishing import publish


@dataclass(frozen=True)
class Exclusion:
    """One node, and why."""

    node: str
    reason: str
    since: float
    """Unix seconds."""


_FILE = TypeAdapter(list[Exclusion])


def exclude(run: Path, node: str, reason: str, now: float) -> None:
    """Keep the run away from `node`; a node excluded already is so from now on, for the new reason.

    Raises:
        UserError: the file is broken.
    """
    others = [each for each in _read(run) if each.node != node]
    publish(_path(run), _FILE.dump_json([*others, Exclusion(node, reason, now)], indent=2).decode() + "\n")


def excluded(run: Path, now: float, hours: float) -> list[Exclusion]:
    """What was excluded within the last `hours`, oldest first.

    Raises:
        UserError: the file is broken.
    """
    return [each for each in _read(run) if now - each.since < hours * 3_600]


def _path(run: Path) -> Path:
    return run / "slurm" / "excluded.json"


def _read(run: Path) -> list[Exclusion]:
    path = _path(run)
    try:
        return _FILE.validate_json(path.read_bytes())
    except FileNotFoundError:
        return []
    except ValidationError:
        raise UserError(f"{path}: no list of node, reason, since; mend it, or remove it to exclude no node") from None
