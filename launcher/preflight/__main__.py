"""Checks one node of a job among all of them; a Slurm job starts it on every node before its ranks.

    srun --ntasks-per-node 1 python -m launcher.preflight RUN_FOLDER --incarnation 4711.2 --nodes node1,node2,node3

Every node is given the same words: `--nodes` are the job's nodes as `scontrol show hostnames` prints them, and
each finds its own place among them through SLURMD_NODENAME (or `--number`, from 0). `--incarnation` names this start of
the job and is used once. Each process measures its node and publishes that under RUN_FOLDER/preflight/INCARNATION. The
one of the first node then waits for the others, judges, and writes there

    verdict.json = {"faults": [{"nodes": ["node2"], "what": "in words", "blamed": true}], "facts": [...]}

No faults: start the ranks. `blamed` nodes are certainly at fault and should be excluded; of the others only so much is
known that they do not fit together. Exit code 0 without faults, 2 with some (the first node's process; the others end
with 0 when they have published). Where verdict.json is missing at the end, the first node did not come so far.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from launcher.preflight import check, report
from launcher.preflight.judge import Limits
from launcher.preflight.shared import Meeting
from llm_dist.errors import Exit, UserError, exit_code_of

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def one_node(
    run: Annotated[Path, typer.Argument(metavar="RUN_FOLDER", help="On a file system that all nodes share.")],
    *,
    incarnation: Annotated[str, typer.Option(help="Name of this start of the job, used once.")],
    nodes: Annotated[str, typer.Option(metavar="NAME,NAME,...", help="All nodes of the job, the same on each.")],
    number: Annotated[int | None, typer.Option(help="Place of this one; that of SLURMD_NODENAME when absent.")] = None,
    seconds: Annotated[float, typer.Option(help="How long to wait for other nodes, twice.")] = 60.0,
    gpus: Annotated[int | None, typer.Option(min=0, help="GPUs that each node must have.")] = None,
    min_disk: Annotated[float, typer.Option(metavar="GIB", help="Free for the run folder.")] = 5.0,
    min_memory: Annotated[float, typer.Option(metavar="GIB", help="Free on each node.")] = 2.0,
) -> None:
    """Measure this node; on the first one, judge all."""

    def action() -> int:
        names = tuple(nodes.split(","))
        place = _place(names) if number is None else number
        if not 0 <= place < len(names):
            raise UserError(f"--number {place}: --nodes names {len(names)}, so it is 0 to {len(names) - 1}")
        meeting = Meeting(run / "preflight" / incarnation, names, place, seconds)
        own = check.publish_own(meeting)
        if place != 0:
            return Exit.DONE
        verdict = check.judge_all(meeting, own, Limits.of_gib(min_disk, min_memory, gpus))
        print(report.faults_in_words(verdict), file=sys.stderr)
        return Exit.USER_ERROR if verdict.faults else Exit.DONE

    raise typer.Exit(exit_code_of(action))


def _place(names: tuple[str, ...]) -> int:
    here = os.environ.get("SLURMD_NODENAME")
    if here not in names:
        raise UserError(f"SLURMD_NODENAME={here or ''} is none of --nodes {','.join(names)}; give --number")
    return names.index(here)


if __name__ == "__main__":
    app(prog_name="python -m launcher.preflight")
