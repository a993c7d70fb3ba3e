"""Which attempt may write: of several that live at once, the one that took over last. Torch-free.

A scheduler that has lost sight of a node starts the run again elsewhere while the ranks of the old attempt still reach
the shared file system. It cannot fence them; two small files do, beside the checkpoints:

    claim_0003.json    attempt 3 is about to take over: no older attempt may publish, delete or amend any more
    lease_0003.json    what stood then; readers ignore what an older attempt has published since

The order is what makes it safe. A new attempt claims, then lists, then writes its lease. An old one looks for claims,
renames its checkpoint into place, looks again, and only then acknowledges it. Whatever is acknowledged was there before
the claim, and so is in the list; whatever slips through later is in no list. (`commit.take_over`, `commit.publish`.)
"""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llm_dist.errors import UserError

_NAME = re.compile(r"(claim|lease)_(\d{4,})\.json")
_LOOK_SECONDS = 1.0


class Superseded(Exception):
    """A newer attempt has taken the run over; this one must write nothing more."""

    def __init__(self, attempt: int, by: int) -> None:
        super().__init__(
            f"attempt {by} has taken this run over; attempt {attempt} leaves, and has written nothing since"
        )
        self.by = by


@dataclass(frozen=True)
class Lease:
    """An attempt's right to write, and what it found."""

    attempt: int
    stands: Mapping[int, int]
    """The attempt that wrote each complete checkpoint, by step."""

    def admits(self, step: int, attempt: int | None) -> bool:
        """Whether a complete checkpoint counts; `attempt` is who wrote it, None where its manifest is damaged."""
        return attempt is None or attempt >= self.attempt or self.stands.get(step) == attempt


def claim_name(attempt: int) -> str:
    """File that forbids older attempts to write."""
    return f"claim_{attempt:04d}.json"


def lease_name(attempt: int) -> str:
    """File that says what stood when an attempt took over."""
    return f"lease_{attempt:04d}.json"


def claimant() -> bytes:
    """What a claim tells a person who looks."""
    return json.dumps({"host": socket.gethostname(), "time": time.time()}).encode() + b"\n"


def to_bytes(lease: Lease) -> bytes:
    """What a lease file holds."""
    return json.dumps({"attempt": lease.attempt, "stands": sorted(lease.stands.items())}).encode() + b"\n"


def newest(checkpoints: Path) -> Lease | None:
    """The lease that readers go by; None where no attempt has taken one.

    Raises:
        UserError: it is damaged.
    """
    attempts = [attempt for kind, attempt in _found(checkpoints) if kind == "lease"]
    if not attempts:
        return None
    path = checkpoints / lease_name(max(attempts))
    try:
        table = json.loads(path.read_bytes())
        return Lease(table["attempt"], dict(table["stands"]))
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged; make sure that no attempt at this run lives, then delete it") from None


def older(checkpoints: Path, attempt: int) -> list[Path]:
    """Claims and leases that a newer lease has made meaningless."""
    return [checkpoints / f"{kind}_{each:04d}.json" for kind, each in _found(checkpoints) if each < attempt]


def _found(checkpoints: Path) -> list[tuple[str, int]]:
    matches = (_NAME.fullmatch(path.name) for path in checkpoints.iterdir())
    return [(match[1], int(match[2])) for match in matches if match]


class Fence:
    """Tells an attempt whether a newer one has claimed the run."""

    def __init__(self, checkpoints: Path, attempt: int) -> None:
        self._checkpoints, self._attempt = checkpoints, attempt
        self._looked_at = float("-inf")

    def check(self) -> None:
        """Look now.

        Raises:
            Superseded: a newer attempt has claimed the run.
        """
        self._looked_at = time.monotonic()
        if not self._checkpoints.is_dir():
            return
        by = max((attempt for _, attempt in _found(self._checkpoints)), default=0)
        if by > self._attempt:
            raise Superseded(self._attempt, by)

    def check_now_and_then(self) -> None:
        """As `check`, at most once a second: a folder listing is dear on a large shared file system."""
        if time.monotonic() - self._looked_at >= _LOOK_SECONDS:
            self.check()
