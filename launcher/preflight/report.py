"""Shows a verdict to a person."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from launcher.preflight.check import Verdict
from launcher.preflight.facts import NodeFacts
from launcher.wording import bytes_in_words


def show(verdict: Verdict) -> None:
    """Print a table with a column per node, then the faults."""
    table = Table("", *(facts.node for facts in verdict.facts))
    columns = [dict(_rows(facts)) for facts in verdict.facts]
    for name in dict.fromkeys(name for column in columns for name in column):
        table.add_row(name, *(column.get(name, "-") for column in columns))
    console = Console(markup=False, highlight=False)
    console.print(table)
    console.print(faults_in_words(verdict), soft_wrap=True)


def faults_in_words(verdict: Verdict) -> str:
    """One line per fault."""
    if not verdict.faults:
        return "no faults: ready to start"
    return "\n".join(
        f"fault: {', '.join(fault.nodes)}: {fault.what}" + ("" if fault.blamed else " (no node is blamed)")
        for fault in verdict.faults
    )


def _rows(facts: NodeFacts) -> Iterator[tuple[str, str]]:
    yield "host", facts.host
    yield from sorted(facts.versions.items())
    yield "code of llm_dist", facts.code[:12]
    yield "disk free", "unknown" if facts.disk_bytes is None else bytes_in_words(facts.disk_bytes)
    yield "temporary free", bytes_in_words(facts.temporary_bytes)
    yield "memory free", bytes_in_words(facts.memory_bytes)
    yield "GPUs", "no nvidia-smi" if facts.gpus is None else str(len(facts.gpus))
    for gpu in facts.gpus or ():
        errors = "ECC not counted" if gpu.ecc_errors is None else f"{gpu.ecc_errors} ECC errors"
        yield f"GPU {gpu.index}", ", ".join((gpu.name, errors, *gpu.unreadable))
    for number, device in enumerate(facts.devices):
        yield f"matmul {number}", f"{device.flops_per_second / 1e12:.3g} TFLOP/s ({device.name})"
