"""From one node's measurement to the verdict on all: what is published, by whom, and how it is read."""

from __future__ import annotations

import json
import socket
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from launcher.preflight.facts import NodeFacts, from_json, measure
from launcher.preflight.judge import Fault, Limits, judge
from launcher.preflight.shared import Meeting, wait_for
from llm_dist.errors import UserError
from llm_dist.publishing import publish

VERDICT = "verdict.json"


@dataclass(frozen=True)
class Verdict:
    """What is wrong, and what it was concluded from."""

    faults: Sequence[Fault]
    facts: Sequence[NodeFacts]

    def as_table(self) -> dict[str, Any]:
        """For scripts."""
        return {"faults": [asdict(each) for each in self.faults], "facts": [each.as_table() for each in self.facts]}


def publish_own(meeting: Meeting) -> NodeFacts:
    """Measure this node and let the others know.

    Raises:
        UserError: this incarnation was checked before, or nothing can be written.
    """
    own = measure(meeting)
    path = meeting.file("facts", meeting.number)
    try:
        publish(path, own.to_json())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; {meeting.node} cannot write the run folder") from None
    return own


def judge_all(meeting: Meeting, own: NodeFacts, limits: Limits) -> Verdict:
    """Wait for what the other nodes publish, judge, and write the verdict; the first node calls this."""
    present = [number for number in range(len(meeting.nodes)) if meeting.file("here", number).exists()]
    wait_for(meeting, "facts", present)
    others = [_read(meeting, number) for number in range(len(meeting.nodes)) if number != meeting.number]
    facts = [own, *(each for each in others if each is not None)]
    verdict = Verdict(judge(facts, meeting.nodes, limits), facts)
    publish(meeting.folder / VERDICT, json.dumps(verdict.as_table(), indent=2) + "\n")
    return verdict


def check_here(folder: Path, limits: Limits) -> Verdict:
    """Check this machine alone, leaving nothing in `folder`.

    Raises:
        UserError: there is no such folder, or it cannot be written.
    """
    try:
        passing = tempfile.TemporaryDirectory(prefix=".preflight-", dir=folder)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}; name a folder that can be written") from None
    with passing:
        own = measure(Meeting(Path(passing.name), (socket.gethostname(),), 0, seconds=0.0))
    return Verdict(judge([own], [own.node], limits), [own])


def _read(meeting: Meeting, number: int) -> NodeFacts | None:
    """None where there is nothing, or what another version of the code wrote: both are found missing."""
    try:
        return from_json(meeting.file("facts", number).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
