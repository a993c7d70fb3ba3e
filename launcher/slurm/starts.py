"""The starts of a run under Slurm: what began where, and how it ended, node by node. Plain files in the run folder.

RUN/slurm/starts/0003/start.json        job, nodes, code, time, the step the run stood at
                      node_00001.json   how the ranks of a node ended, written by the node itself
                      end.json          what the supervisor made of it

What ends without a word (power loss, a killed job) has a beginning and no end.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from launcher.attempts import read_table
from launcher.watching import precedence
from llm_dist.publishing import publish

Outcome = Literal["done", "stopped", "failed"]
_NAME = re.compile(r"\d{4,}")


@dataclass(frozen=True)
class RankFailure:
    """The rank that explains why the ranks of a node failed."""

    rank: int
    node: str
    code: int
    """Exit code, negative for a signal."""
    cause: str
    last_lines: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.node}: {self.cause}"


@dataclass(frozen=True)
class NodeEnd:
    """How the ranks of one node ended."""

    node: str
    number: int
    outcome: Outcome
    time: float
    """Unix seconds by the node's own clock."""
    failure: RankFailure | None = None


@dataclass(frozen=True)
class Start:
    """One start, as far as it is known."""

    number: int
    job: str
    incarnation: str
    nodes: tuple[str, ...]
    code: str
    """Folder of the code that ran."""
    began: float
    step_before: int
    ended: float | None = None
    step_after: int | None = None
    outcome: Outcome | None = None
    """None: it runs, or ended without a word."""
    action: str | None = None
    """What was done next."""
    failure: RankFailure | None = None

    @property
    def has_progress(self) -> bool:
        """Whether it left a newer checkpoint."""
        return (self.step_after or 0) > self.step_before


def folder_of(run: Path, number: int) -> Path:
    """Where a start is described."""
    return run / "slurm" / "starts" / f"{number:04d}"


def begin(run: Path, facts: Mapping[str, Any]) -> int:
    """Describe a new start; its number, which nobody else has."""
    number = 1 + max((start.number for start in read_all(run)), default=0)
    (run / "slurm" / "starts").mkdir(parents=True, exist_ok=True)
    while True:
        try:
            folder_of(run, number).mkdir()
            break
        except FileExistsError:
            number += 1
    _write(folder_of(run, number) / "start.json", {"number": number, **facts})
    return number


def end(run: Path, number: int, facts: Mapping[str, Any]) -> None:
    """Describe how a start ended."""
    _write(folder_of(run, number) / "end.json", dict(facts))


def write_node_end(run: Path, number: int, found: NodeEnd) -> None:
    """Called on the node."""
    _write(folder_of(run, number) / f"node_{found.number:05d}.json", asdict(found))


def read_node_ends(run: Path, number: int) -> list[NodeEnd]:
    """Of the nodes that have come to an end so far."""
    tables = (read_table(path) for path in sorted(folder_of(run, number).glob("node_*.json")))
    return [NodeEnd(**{**table, "failure": _failure(table["failure"])}) for table in tables if table is not None]


def read_all(run: Path) -> list[Start]:
    """All starts, oldest first."""
    folder = run / "slurm" / "starts"
    numbers = sorted(int(path.name) for path in folder.glob("*") if _NAME.fullmatch(path.name))
    found = []
    for number in numbers:
        begun = read_table(folder_of(run, number) / "start.json")
        if begun is None:  # another start is being described at this moment
            continue
        table = {**begun, **(read_table(folder_of(run, number) / "end.json") or {})}
        table |= {"nodes": tuple(table["nodes"]), "failure": _failure(table.get("failure"))}
        found.append(Start(**table))
    return found


def first_failure(ends: Sequence[NodeEnd]) -> RankFailure | None:
    """The failure that explains the others; clocks of nodes differ, so codes count before times."""
    failed = [end for end in ends if end.failure is not None]
    first = min(failed, key=lambda end: (precedence(end.failure.code), end.time), default=None)  # type: ignore[union-attr]
    return None if first is None else first.failure


def failures_in_a_row(history: Sequence[Start]) -> int:
    """How many of the last starts failed with no newer checkpoint between them."""
    count = 0
    for start in history:
        if start.has_progress:
            count = 0
        if start.outcome == "failed":
            count += 1
    return count


def _failure(table: Mapping[str, Any] | None) -> RankFailure | None:
    return None if table is None else RankFailure(**{**table, "last_lines": tuple(table["last_lines"])})


def _write(path: Path, table: Mapping[str, Any]) -> None:
    publish(path, json.dumps(table, indent=1) + "\n")
