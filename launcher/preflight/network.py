"""What the ranks found when they summed a known pattern, judged: wrong sums, silent nodes, slow links.

Nodes stand in a ring; each measures the link to the one before and to the one after. A node whose links are all slow,
beside the median node, is to blame; of a single slow link nobody knows which end is at fault.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.attempts import read_table
from launcher.preflight.judge import Fault

LEAST_SHARE = 0.5
"""Of the median node's rate, below which a node or a link is slow."""
_FEWEST_NODES = 3
"""From which on a median tells who is the odd one."""


def read_reports(folder: Path) -> dict[int, dict[str, Any]]:
    """By rank, those that have been written."""
    tables = (read_table(path) for path in sorted(folder.glob("rank_*.json")))
    return {int(table["rank"]): table for table in tables if table is not None}


def judge_network(reports: Mapping[int, Mapping[str, Any]], nodes: Sequence[str], ranks_per_node: int) -> list[Fault]:
    """Faults of the network between `nodes`, each with `ranks_per_node` ranks, from the reports of the ranks."""
    node_of = {rank: nodes[rank // ranks_per_node] for rank in range(len(nodes) * ranks_per_node)}
    silent = [node for node in nodes if any(node_of[rank] == node and rank not in reports for rank in node_of)]
    if silent:
        return [Fault(tuple(silent), "ranks gave no report of the network check", len(silent) * 2 < len(nodes))]
    wrong = {node_of[rank] for rank, report in reports.items() if report["num_wrong"]}
    if wrong:
        few = len(wrong) * 2 < len(nodes)
        return [Fault(tuple(node for node in nodes if node in wrong), "sums over the ranks come out wrong", few)]
    return _slow({node_of[rank]: report["links"] for rank, report in reports.items() if report["links"]}, node_of)


def _slow(links: Mapping[str, Mapping[str, float]], node_of: Mapping[int, str]) -> list[Fault]:
    """`links`: bytes per second by node and by the rank at the other end."""
    if len(links) < _FEWEST_NODES:
        return []
    least = LEAST_SHARE * statistics.median(max(rates.values()) for rates in links.values())
    slow = [node for node, rates in links.items() if max(rates.values()) < least]
    faults = [Fault((node,), f"its links carry {_words(max(links[node].values()), least)}", True) for node in slow]
    for node, rates in links.items():
        for other, rate in rates.items():
            far = node_of[int(other)]
            if rate < least and node < far and node not in slow and far not in slow:
                faults.append(Fault((node, far), f"the link between them carries {_words(rate, least)}", False))
    return faults


def _words(rate: float, least: float) -> str:
    return f"{rate / 1e9:.2g} GB/s; half of the median node's are {least / 1e9:.2g} GB/s"
