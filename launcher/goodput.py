"""Where the hours of a run went, over all its attempts: read off the account that rank 0 keeps in the run folder.

What an attempt writes begins with what the ones before it came to, so the newest file says all.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from launcher.attempts import read_table
from launcher.wording import duration_in_words

PRODUCTIVE = "step"
WORDS = {
    "step": "steps",
    "data": "waiting for data",
    "save": "saving",
    "compile": "compiling",
    "eval": "evaluating",
    "replayed": "steps computed again",
    "start_up": "starting up",
    "down": "down or hanging",
    "other": "other",
}
_LEAST_SHARE = 0.0005
_SHARES_A_LINE = 4


@dataclass(frozen=True)
class Goodput:
    """The hours of a run by what they went to."""

    wall_seconds: float
    """All of it."""
    seconds: dict[str, float]
    """By category; their sum is the time from the first attempt's start until the last sign of life, or until now where
    the run is neither running nor finished."""

    def share(self, category: str = PRODUCTIVE) -> float:
        """Part of the whole."""
        return self.seconds.get(category, 0.0) / max(1e-9, self.wall_seconds)


def read_goodput(run: Path, down_until: float | None = None) -> Goodput | None:
    """The account of a run; None where it has none yet.

    Args:
        run: its folder.
        down_until: unix time until which a run that is neither running nor finished has been down.
    """
    for path in sorted((run / "goodput").glob("attempt_*.json"), reverse=True):
        if (table := read_table(path)) is not None:
            seconds = {name: float(each) for name, each in table["seconds"].items()}
            if down_until is not None:
                seconds["down"] = seconds.get("down", 0.0) + max(0.0, down_until - float(table["time"]))
            return Goodput(sum(seconds.values()), seconds)
    return None


def lines(found: Goodput) -> list[str]:
    """The shares in words, the largest first: what is productive on the first line, the rest on those after it."""
    first = f"{found.share():.1%} of {duration_in_words(found.wall_seconds)} went into {WORDS[PRODUCTIVE]}"
    rest = sorted((name for name in found.seconds if name != PRODUCTIVE), key=found.share, reverse=True)
    said = [f"{WORDS.get(name, name)} {found.share(name):.1%}" for name in rest if found.share(name) >= _LEAST_SHARE]
    return [first, *(", ".join(said[at : at + _SHARES_A_LINE]) for at in range(0, len(said), _SHARES_A_LINE))]
