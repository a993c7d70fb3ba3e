"""What is killed, how and when: drawn from a seed, so that a run of the harness can be repeated."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Kind = Literal[
    "SIGKILL one rank",
    "SIGKILL all ranks",
    "SIGKILL launcher",
    "SIGTERM launcher",
    "SIGTERM one rank",
    "SIGSTOP one rank",
]
KINDS: tuple[Kind, ...] = (
    "SIGKILL one rank",
    "SIGKILL all ranks",
    "SIGKILL launcher",
    "SIGTERM launcher",
    "SIGTERM one rank",
    "SIGSTOP one rank",
)
Phase = Literal["imports", "build", "first step", "training", "saving", "validation", "shutdown"]
PHASES: tuple[Phase, ...] = ("imports", "build", "first step", "training", "saving", "validation", "shutdown")

KILLS = int(os.environ.get("KILLS", "24"))
SEED = int(os.environ.get("KILL_SEED", "0"))
KILLS_PER_RUN = 8
LONG_FORM = 60
"""From so many kills on, each phase and each kind has to occur."""


@dataclass(frozen=True)
class Kill:
    """One stroke."""

    kind: Kind
    aim: Phase
    rank: int
    occasions: int
    """How often the phase is let pass before."""
    delay: float
    """Where in the phase it strikes, from 0 to 1."""


@dataclass(frozen=True)
class Setting:
    """One run that is killed again and again."""

    number: int
    program: Literal["llm-launch", "torchrun"]
    engine: Literal["plain", "zero2", "fsdp"]
    asynchronous: bool
    kills: tuple[Kill, ...]

    def __str__(self) -> str:
        saving = "asynchronous" if self.asynchronous else "synchronous"
        return f"{self.number}: {self.program}, {self.engine}, {saving} saving, {len(self.kills)} kills"


_SETTINGS = (
    ("llm-launch", "plain", False),
    ("llm-launch", "zero2", True),
    ("torchrun", "fsdp", False),
    ("torchrun", "plain", True),
    ("llm-launch", "fsdp", True),
    ("torchrun", "zero2", False),
)


def settings() -> list[Setting]:
    """The runs of this session."""
    kills = _deal(random.Random(SEED))
    made = []
    for first in range(0, KILLS, KILLS_PER_RUN):
        count = min(KILLS_PER_RUN, KILLS - first)
        number = first // KILLS_PER_RUN
        made.append(Setting(number, *_SETTINGS[number % len(_SETTINGS)], tuple(next(kills) for _ in range(count))))  # type: ignore[arg-type]
    return made


def _deal(chance: random.Random) -> Iterator[Kill]:
    """Kinds and phases from two packs of cards that are shuffled whenever they are used up."""
    kinds: list[Kind] = []
    phases: list[Phase] = []
    while True:
        kinds = kinds or chance.sample(KINDS, len(KINDS))
        phases = phases or chance.sample(PHASES, len(PHASES))
        yield Kill(kinds.pop(), phases.pop(), chance.randrange(2), chance.randrange(3), chance.random())
