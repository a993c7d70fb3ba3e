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
Phase = Literal["imports", "build", "compilation", "first step", "training", "saving", "validation", "shutdown"]
PHASES: tuple[Phase, ...] = (
    "imports",
    "build",
    "compilation",
    "first step",
    "training",
    "saving",
    "validation",
    "shutdown",
)
"""Compilation is the first step where blocks are compiled."""
Program = Literal["llm-launch", "torchrun"]
Engine = Literal["plain", "zero2", "fsdp"]

KILLS = int(os.environ.get("KILLS", "24"))
SEED = int(os.environ.get("KILL_SEED", "0"))
KILLS_PER_RUN = 8
LONG_FORM = 60
"""From so many kills on, each phase has to occur."""


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
    program: Program
    engine: Engine
    asynchronous: bool
    compiles: bool
    kills: tuple[Kill, ...]

    def __str__(self) -> str:
        saving = "asynchronous" if self.asynchronous else "synchronous"
        compiled = ", compiled" if self.compiles else ""
        return f"{self.number}: {self.program}, {self.engine}{compiled}, {saving} saving, {len(self.kills)} kills"


_RUNS: tuple[tuple[Program, Engine, bool, bool], ...] = (
    ("llm-launch", "plain", False, False),
    ("llm-launch", "zero2", True, False),
    ("torchrun", "fsdp", False, False),
    ("torchrun", "plain", True, False),
    ("llm-launch", "fsdp", True, False),
    ("torchrun", "zero2", False, False),
    ("llm-launch", "plain", True, True),
)
"""Program, engine, whether saving is asynchronous, whether blocks are compiled: rare, because every start is slow."""


def settings() -> list[Setting]:
    """The runs of this session."""
    chance = random.Random(SEED)
    runs = chance.sample(_RUNS, len(_RUNS))
    cards = {compiles: _deal(chance, compiles) for compiles in (False, True)}
    made = []
    for number, first in enumerate(range(0, KILLS, KILLS_PER_RUN)):
        program, engine, asynchronous, compiles = runs[number % len(runs)]
        kills = tuple(next(cards[compiles]) for _ in range(min(KILLS_PER_RUN, KILLS - first)))
        made.append(Setting(number, program, engine, asynchronous, compiles, kills))
    return made


def _deal(chance: random.Random, compiles: bool) -> Iterator[Kill]:
    """Kinds and phases from two packs of cards that are shuffled whenever they are used up."""
    kinds: list[Kind] = []
    phases: list[Phase] = []
    possible = [phase for phase in PHASES if phase != ("first step" if compiles else "compilation")]
    while True:
        kinds = kinds or chance.sample(KINDS, len(KINDS))
        phases = phases or chance.sample(possible, len(possible))
        yield Kill(kinds.pop(), phases.pop(), chance.randrange(2), chance.randrange(3), chance.random())
