"""`llm-dist` with a fault planted in rank 1, and a launcher for it; FAULT is KIND:STEP.

stop: the rank is stopped (SIGSTOP); loader: its loader blocks; raise: it raises; all before this step, once: FAULT_MARK
is the file that remembers it. slow: every batch of an evaluation and every save of the rank takes long, but moves.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from launcher.local import Job, supervise


def plant(kind: str, step: int, mark: Path) -> None:
    from llm_dist.checkpoint.store import Store
    from llm_dist.data.loader import Loader
    from llm_dist.engine.engine import Engine

    sound_rows, sound_eval_step, sound_write = Loader.rows, Engine.eval_step, Store._write_files

    def rows(self, at):
        if at + 1 == step and not mark.exists():
            mark.touch()
            match kind:
                case "stop":
                    os.kill(os.getpid(), signal.SIGSTOP)
                case "loader":
                    time.sleep(1000)
                case "raise":
                    raise LookupError("planted")
        return sound_rows(self, at)

    def slow_eval_step(self, batch):
        time.sleep(1.0)
        return sound_eval_step(self, batch)

    def slow_write(self, writing, sources):
        with mark.open("wb", buffering=0) as file:
            for _ in range(24):
                time.sleep(0.25)
                file.write(bytes(1 << 18))
        sound_write(self, writing, sources)

    Loader.rows = rows
    if kind == "slow":
        Engine.eval_step, Store._write_files = slow_eval_step, slow_write


def launch(run: str, *words: str) -> int:
    return supervise(Job([sys.executable, __file__, "train", *words], Path(run), ranks=2)).exit_code


if __name__ == "__main__":
    if sys.argv[1] == "launch":
        sys.exit(launch(*sys.argv[2:]))
    if os.environ.get("RANK") == "1":
        kind, _, step = os.environ["FAULT"].partition(":")
        plant(kind, int(step or 0), Path(os.environ["FAULT_MARK"]))
    from llm_dist.cli import main

    main()
