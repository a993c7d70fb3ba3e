"""Starts the ranks of one node and sees them to their end; srun starts one of these on every node.

It ends with 0 unless a rank failed: then with 1, and srun ends the other nodes' ranks, who wait for a dead one. Not so
where a newer attempt has taken the run over: an srun that Slurm has lost sight of would end the step of that one, which
goes by the same number. How it went is written into the run folder, never to srun, which would pass on the first code
that comes, and may be gone.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from launcher.ranks import World, start
from launcher.slurm import starts
from launcher.slurm.allocation import Place, interface_to
from launcher.slurm.starts import NodeEnd, RankFailure
from launcher.watching import Failure, StopRequests, watch
from llm_dist.errors import Exit

_OUTPUTS = (1, 2)
_PROBE_SECONDS = 60.0
"""How long ranks wait for one another in the check of the network."""


def probe_network(out: Path, world: World, attempt: int, seconds: float) -> int:
    """Have the ranks of this node sum a known pattern with all others; what they find they write into `out`."""
    command = [sys.executable, "-m", "llm_dist.probe", "all-reduce", "--out", str(out), "--seconds", str(seconds)]
    with start(command, world, out, attempt) as ranks:
        ranks.wait(3 * seconds)
    return 0


def run_node(run: Path, number: int, attempt: int, world: World, place: Place, accepted: list[str]) -> int:
    """Start the ranks of this node; the exit code of the process."""
    _write_into(starts.folder_of(run, number) / f"node_{place.number:05d}.log")
    command = [sys.executable, "-m", "llm_dist", "train", str(run)]
    command += [word for key in accepted for word in ("--accept", key)]
    with StopRequests() as stop, start(command, world, run / "logs", attempt) as ranks:
        ending = watch(ranks, stop, run, show=lambda: None)
        ranks.kill()
        failure = _failure(ending, place) if isinstance(ending, Failure) else None
        outcome: starts.Outcome = "failed" if failure else "stopped" if ending == Exit.STOPPED else "done"
        starts.write_node_end(run, number, NodeEnd(place.name, place.number, outcome, time.time(), failure))
    return 1 if failure and failure.code != Exit.SUPERSEDED else 0


def _failure(ending: Failure, place: Place) -> RankFailure:
    return RankFailure(ending.rank, place.name, ending.code, ending.cause, ending.last_lines)


def _write_into(path: Path) -> None:
    """Let go of srun's pipes: a launcher whose slurmstepd is gone must not die of a line it prints."""
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for output in _OUTPUTS:
        os.dup2(log, output)
    os.close(log)


def main() -> int:
    """`python -m launcher.slurm.node RUN ...`; only the supervisor writes this line."""
    parser = argparse.ArgumentParser(prog="launcher.slurm.node")
    parser.add_argument("run", type=Path)
    for name in ("start", "attempt", "nodes", "ranks-per-node", "port"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--address", required=True)
    parser.add_argument("--accept", action="append", default=[])
    parser.add_argument("--probe", type=Path, help="check the network and write here, instead of training")
    given = parser.parse_args()
    place, here = Place.read(), given.ranks_per_node
    interface = "lo" if given.nodes == 1 else interface_to(given.address)
    world = World(given.nodes * here, here, given.port, place.number * here, given.address, interface)
    if given.probe is not None:
        return probe_network(given.probe, world, given.attempt, _PROBE_SECONDS)
    return run_node(given.run, given.start, given.attempt, world, place, given.accept)


if __name__ == "__main__":
    sys.exit(main())
