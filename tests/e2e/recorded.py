"""`llm-dist`, or `llm-launch local` with it, that notes which rows each rank reads, and may kill a rank once.

RECORD is a folder: rows_ATTEMPT-LIKE.jsonl, one line for each step. KILL is RANK:STEP: that rank dies by SIGKILL
before that step, the first time it comes there.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path


def plant(folder: Path) -> None:
    from llm_dist.train import loop

    rank, (victim, at) = os.environ.get("RANK", "0"), os.environ.get("KILL", ":").split(":")
    sound, mark = loop._micro_batches, folder / "killed"
    file = (folder / f"rows_{os.getpid()}.jsonl").open("a")

    def micro_batches(session, rows):
        step = session.account.step + 1
        if (victim, at) == (rank, str(step)) and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        hashes = [
            hashlib.sha256(row.tobytes() + after.tobytes()).hexdigest() for row, after in zip(*rows[:2], strict=True)
        ]
        file.write(json.dumps([step, rows.first_row, hashes]) + "\n")
        file.flush()
        return sound(session, rows)

    loop._micro_batches = micro_batches


def orders(folder: Path) -> Mapping[int, list[tuple[int, str]]]:
    """Of each step the rows that were read, whoever read them: place in the step's set, and hash."""
    found: dict[int, list[tuple[int, str]]] = {}
    for path in folder.glob("rows_*.jsonl"):
        for line in path.read_text().splitlines():
            step, first, hashes = json.loads(line)
            found.setdefault(step, []).extend(enumerate(hashes, first))
    return found


def launch() -> None:
    from dataclasses import replace

    from launcher import cli, submission

    prepare = submission.prepare

    def prepared(wanted: submission.Wanted) -> submission.Job:
        job = prepare(wanted)
        return replace(job, command=[sys.executable, __file__, *job.command[3:]])

    submission.prepare = prepared
    cli.main()


if __name__ == "__main__":
    if sys.argv[1] == "local":
        launch()
    else:
        from llm_dist.cli import main

        plant(Path(os.environ["RECORD"]))
        main()
