"""What the kills of a session hit, as a table and as JSON."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.kill.plan import KINDS, PHASES, SEED


@dataclass
class Report:
    """Counts over all runs."""

    landed: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Kind and phase of each kill."""
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
            f"seed {SEED}: {sum(total)} kills, {self.runs} runs, {self.starts} starts by hand; {self.acknowledged} "
            f"acknowledged steps, {self.lost} lost; ranks were gone within {self.longest_vanishing_seconds:.1f} s; "
            f"{seconds:.0f} s, {seconds / max(1, sum(total)):.1f} s a kill"
        )
        return "\n".join(["", head, *rows, last, words])

    def _row(self, kind: str, width: int) -> str:
        counts = [self.landed[kind, phase] for phase in PHASES]
        return f"{kind:{width}}" + "".join(f"{count:>12}" for count in (*counts, sum(counts)))

    def publish(self) -> None:
        """Show it, and write it where KILL_REPORT says."""
        print(self, file=sys.stderr, flush=True)
        if path := os.environ.get("KILL_REPORT"):
            table = {**asdict(self), "landed": [[*key, count] for key, count in sorted(self.landed.items())]}
            Path(path).write_text(json.dumps(table, indent=1))
