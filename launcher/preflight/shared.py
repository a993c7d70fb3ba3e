"""Whether the nodes of a job share a file system: each writes a file, and each looks for those of all others.

Nothing but files is used, so that the check works where the network between the nodes does not.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llm_dist.errors import UserError
from llm_dist.publishing import publish

FIRST_LOOK_SECONDS = 0.02
LONGEST_PAUSE_SECONDS = 0.5


@dataclass(frozen=True)
class Meeting:
    """Where and with whom a node meets."""

    folder: Path
    """RUN/preflight/INCARNATION."""
    nodes: tuple[str, ...]
    """Names, in an order that is the same on all nodes."""
    number: int
    """Of this node in `nodes`."""
    seconds: float
    """How long to wait for the others."""

    @property
    def node(self) -> str:
        """This node's name."""
        return self.nodes[self.number]

    def file(self, kind: str, number: int) -> Path:
        """What a node publishes: `here_00003.json`, `facts_00003.json`."""
        return self.folder / f"{kind}_{number:05d}.json"


@dataclass(frozen=True)
class Sight:
    """What one node saw of the others."""

    unseen: tuple[str, ...]
    """Nodes whose file did not appear in time."""
    clock_seconds: float | None
    """This node's clock when the last file appeared: one moment, which all nodes share; None if some did not."""


def meet(meeting: Meeting) -> Sight:
    """Publish this node's file and look for the others'.

    Raises:
        UserError: this incarnation was checked before, so that old files would pass for new ones.
        OSError: the folder cannot be written.
    """
    own = meeting.file("here", meeting.number)
    if own.exists():
        raise UserError(f"{own} is there already: {meeting.node} was checked before under this --incarnation")
    _show(meeting)
    lacking = wait_for(meeting, "here", range(len(meeting.nodes)))
    return Sight(tuple(meeting.nodes[number] for number in lacking), None if lacking else time.time())


def wait_for(meeting: Meeting, kind: str, numbers: Sequence[int]) -> list[int]:
    """Wait until these nodes have published; the numbers of those that have not when the time is over."""
    until, pause = time.monotonic() + meeting.seconds, FIRST_LOOK_SECONDS
    while True:
        lacking = [number for number in numbers if not meeting.file(kind, number).is_file()]
        left = until - time.monotonic()
        if not lacking or left <= 0:
            return lacking
        time.sleep(min(pause, left))
        pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
        _show(meeting)  # an NFS client asks its server anew about a folder that it has changed itself


def _show(meeting: Meeting) -> None:
    publish(meeting.file("here", meeting.number), json.dumps({"node": meeting.node, "time": time.time()}) + "\n")
