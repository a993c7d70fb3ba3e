"""Which nodes of the allocation the ranks get: those that pass the check, spares in place of those that do not."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher.attempts import read_table
from launcher.preflight.check import VERDICT
from launcher.preflight.exclusions import exclude, excluded
from launcher.preflight.network import judge_network, read_reports
from launcher.watching import say

_SECONDS = 300.0
"""How long the check of all nodes may take; each node's own limits are far shorter."""


@dataclass(frozen=True)
class Choice:
    """Nodes for the ranks, or why there are too few of them."""

    nodes: tuple[str, ...]
    missing: int = 0
    """How many good nodes the allocation lacks."""
    mistake: str | None = None
    """What is wrong with no one node to blame."""


def usable(run: Path, nodes: Sequence[str], hours: float) -> list[str]:
    """The nodes that the run has not excluded within the last `hours`."""
    bad = {each.node for each in excluded(run, time.time(), hours)}
    return [node for node in nodes if node not in bad]


def choose(run: Path, nodes: Sequence[str], wanted: int, hours: float) -> Choice:
    """The first `wanted` nodes that are usable."""
    good = usable(run, nodes, hours)
    return Choice(tuple(good[:wanted]), max(0, wanted - len(good)))


def check(
    run: Path,
    nodes: Sequence[str],
    wanted: int,
    hours: float,
    on_each: Callable[[Sequence[str]], list[str]],
    incarnation: str,
) -> Choice:
    """Have every usable node measured and exclude those that are to blame.

    Args:
        run: run folder.
        nodes: of the allocation.
        wanted: how many of them the ranks need.
        hours: how long an exclusion lasts.
        on_each: words that start a module of ours on each of the nodes given.
        incarnation: name of this start of the job.
    """
    names = usable(run, nodes, hours)
    if len(names) < wanted:
        return choose(run, nodes, wanted, hours)
    words = [*on_each(names), "launcher.preflight", str(run), "--incarnation", incarnation, "--nodes", ",".join(names)]
    try:
        subprocess.run(words, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        say(f"the check of the nodes has not ended within {_SECONDS:.0f} s")
    verdict = read_table(run / "preflight" / incarnation / VERDICT)
    if verdict is None:
        return Choice(
            (), mistake=f"the check of the nodes came to no verdict; {run}/slurm/job_*.log says how far it got"
        )
    return _after(verdict["faults"], run, nodes, wanted, hours)


def check_network(
    run: Path,
    nodes: Sequence[str],
    choice: Choice,
    hours: float,
    command: Sequence[str],
    out: Path,
    ranks_per_node: int,
) -> Choice:
    """Have the ranks of the chosen nodes sum over the network, and exclude nodes that are to blame for what is wrong.

    `command` starts them; they write into `out`. A spare that takes the place of a bad node is not checked again.
    """
    try:
        subprocess.run(command, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        say(f"the check of the network has not ended within {_SECONDS:.0f} s")
    faults = [asdict(each) for each in judge_network(read_reports(out), choice.nodes, ranks_per_node)]
    return _after(faults, run, nodes, len(choice.nodes), hours)


def _after(faults: Sequence[Mapping[str, Any]], run: Path, nodes: Sequence[str], wanted: int, hours: float) -> Choice:
    """Keep the blamed nodes out; the choice among the others, or the faults that nobody is blamed for."""
    for fault in faults:
        for node in fault["nodes"] if fault["blamed"] else ():
            say(f"{node} is kept out for {hours:g} hours: {fault['what']}")
            exclude(run, node, fault["what"], time.time())
    unsolved = [fault for fault in faults if not fault["blamed"]]
    if unsolved:
        return Choice((), mistake="; ".join(f"{', '.join(each['nodes'])}: {each['what']}" for each in unsolved))
    return choose(run, nodes, wanted, hours)
