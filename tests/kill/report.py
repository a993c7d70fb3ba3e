"""What the kills of a session hit, as a table and, again after each kill, as JSON."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.kill.plan import KILLS, KINDS, PHASES, SEED


@dataclass
class Report:
    """Counts over all runs."""

    landed: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Kind and phase of each kill."""
    compared: int = 0
    """Kills of runs that have ended, and as the undisturbed one did."""
    runs: int = 0
    starts: int = 0
    acknowledged: int = 0
    """Times a run said `saved step N`."""
    lost: int = 0
    """Of these, how often the next attempt began before N."""
    longest_vanishing_seconds: float = 0.0
    began: float = field(default_factory=time.time)

    def __str__(self) -> str:
        width = max(map(len, KINDS))
        head = f"{'':{width}}" + "".join(f"{phase:>12}" for phase in (*PHASES, "all"))
        rows = [self._row(kind, width) for kind in KINDS]
        total = [sum(self.landed[kind, phase] for kind in KINDS) for phase in PHASES]
        last = f"{'all':{width}}" + "".join(f"{count:>12}" for count in (*total, sum(total)))
        seconds = time.time() - self.began
        words = (
            f"seed {SEED}: {sum(total)} kills, {self.compared} of them in the {self.runs} runs that were compared at "
            f"their end; {self.starts} starts by hand; {self.acknowledged} acknowledged steps, {self.lost} lost; "
            f"ranks were gone within {self.longest_vanishing_seconds:.1f} s; "
            f"{seconds:.0f} s, {seconds / max(1, sum(total)):.1f} s a kill"
        )
        return "\n".join(["", head, *rows, last, words])

    def _row(self, kind: str, width: int) -> str:
        counts = [self.landed[kind, phase] for phase in PHASES]
        return f"{kind:{width}}" + "".join(f"{count:>12}" for count in (*counts, sum(counts)))

    def count_kill(self, kind: str, phase: str, vanishing_seconds: float) -> None:
        """One more stroke, and how long the ranks took to be gone."""
        self.landed[kind, phase] += 1
        self.longest_vanishing_seconds = max(self.longest_vanishing_seconds, vanishing_seconds)
        self._write()

    def count_run(self, starts: int, kills: int) -> None:
        """One more run that ended as the undisturbed one."""
        self.runs += 1
        self.starts += starts
        self.compared += kills
        self._write()

    def _write(self) -> None:
        if path := os.environ.get("KILL_REPORT"):
            landed = [[*key, count] for key, count in sorted(self.landed.items())]
            table = {"seed": SEED, "asked_for": KILLS, **asdict(self), "landed": landed, "written": time.time()}
            Path(path).write_text(json.dumps(table, indent=1))

    def show(self) -> None:
        """Print the table."""
        print(self, file=sys.stderr, flush=True)
