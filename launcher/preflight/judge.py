"""Which nodes are to blame: each against limits, and against what most nodes are.

Pure: facts in, faults out. A node is blamed only where that is certain. Where no more than half of the nodes agree,
as with two that differ, one fault names all of them and blames none; the same where all nodes share a fault, whose
cause then lies elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median_high

from launcher.preflight.facts import NodeFacts
from launcher.wording import bytes_in_words

_GIB = 2**30


@dataclass(frozen=True)
class Limits:
    """What a node must have."""

    min_disk_bytes: int = 5 * _GIB
    min_temporary_bytes: int = 1 * _GIB
    min_memory_bytes: int = 2 * _GIB
    max_skew_seconds: float = 5.0
    """Between clocks; a file may take a second to be seen by another node."""
    min_gpu_share: float = 0.8
    """Of the median GPU's matmul rate."""
    min_cpu_share: float = 0.4
    """Of the median node's matmul rate; cores may be shared with other jobs."""
    gpus: int | None = None
    """Per node; None: as many as most nodes have."""

    @classmethod
    def of_gib(cls, min_disk: float, min_memory: float, gpus: int | None) -> Limits:
        """What is usually set by hand; the rest by default."""
        return cls(min_disk_bytes=int(min_disk * _GIB), min_memory_bytes=int(min_memory * _GIB), gpus=gpus)


@dataclass(frozen=True)
class Fault:
    """One reason not to start."""

    nodes: tuple[str, ...]
    what: str
    """In words, which need no further explanation."""
    blamed: bool
    """Whether these nodes are certainly at fault: another job should not get them."""


def judge(facts: Sequence[NodeFacts], nodes: Sequence[str], limits: Limits) -> list[Fault]:
    """Faults of the `nodes` that should have been measured, the first of which judges; the gravest come first."""
    measured = {each.node: each for each in facts}
    return [
        *_missing(measured, nodes),
        *_unseen(measured, nodes),
        *_problems(facts),
        *_gpu_health(facts),
        *_too_little(facts, limits),
        *_gpu_counts(facts, limits),
        *_different(facts),
        *_skew(facts, nodes, limits),
        *_slow(facts, limits),
    ]


def _missing(measured: Mapping[str, NodeFacts], nodes: Sequence[str]) -> Iterator[Fault]:
    missing = [node for node in nodes if node not in measured]
    if not missing:
        return
    judging_alone = len(nodes) > 2 and len(missing) >= len(nodes) - 1
    if judging_alone:
        yield Fault(tuple(nodes), f"{nodes[0]} sees no measurement of any other node", blamed=False)
    else:
        yield Fault(tuple(missing), "left no measurement that the others can read", blamed=True)


def _unseen(measured: Mapping[str, NodeFacts], nodes: Sequence[str]) -> Iterator[Fault]:
    for node in measured:
        watchers = tuple(other for other, facts in measured.items() if node in facts.unseen)
        if not watchers:
            continue
        if 2 * len(watchers) > len(nodes):
            yield Fault((node,), f"its file was not seen by {_names(watchers)}", blamed=True)
        elif 2 * len(watchers) < len(nodes):
            yield Fault(watchers, f"did not see the file of {node}, which others saw", blamed=True)
        else:
            yield Fault((node, *watchers), f"{_names(watchers)} did not see the file of {node}", blamed=False)


def _problems(facts: Sequence[NodeFacts]) -> Iterator[Fault]:
    said = {problem for each in facts for problem in each.problems}
    for problem in sorted(said):
        yield _own([each.node for each in facts if problem in each.problems], facts, problem)
    without = [each.node for each in facts if not each.devices and not each.problems]
    if without:
        yield _own(without, facts, "no device to compute on was measured")


def _gpu_health(facts: Sequence[NodeFacts]) -> Iterator[Fault]:
    for each in facts:
        for gpu in each.gpus or ():
            where = f"GPU {gpu.index} ({gpu.name})"
            if gpu.unreadable:
                yield Fault((each.node,), f"{where} is ill: {', '.join(gpu.unreadable)}", blamed=True)
            if gpu.ecc_errors:
                yield Fault((each.node,), f"{where} has {gpu.ecc_errors} uncorrected ECC errors", blamed=True)
            if gpu.must_be_reset:
                yield Fault((each.node,), f"{where} has bad memory pages and must be reset", blamed=True)


def _too_little(facts: Sequence[NodeFacts], limits: Limits) -> Iterator[Fault]:
    disk = [each for each in facts if each.disk_bytes is None or each.disk_bytes < limits.min_disk_bytes]
    if disk:
        free = min(each.disk_bytes or 0 for each in disk)
        needed = f"{bytes_in_words(free)} free for the run folder, {bytes_in_words(limits.min_disk_bytes)} wanted"
        yield Fault(tuple(each.node for each in disk), needed, blamed=False)  # a disk that all nodes share
    wanted: list[tuple[str, Callable[[NodeFacts], int], int]] = [
        ("free for temporary files", lambda node: node.temporary_bytes, limits.min_temporary_bytes),
        ("of memory free", lambda node: node.memory_bytes, limits.min_memory_bytes),
    ]
    for what, has, least in wanted:
        poor = [each for each in facts if has(each) < least]
        if poor:
            words = f"{bytes_in_words(min(map(has, poor)))} {what}, {bytes_in_words(least)} wanted"
            yield _own([each.node for each in poor], facts, words)


def _gpu_counts(facts: Sequence[NodeFacts], limits: Limits) -> Iterator[Fault]:
    counts = {each.node: _num_gpus(each) for each in facts if each.devices}  # where none: a fault already
    if limits.gpus is None:
        yield from _outvoted("numbers of GPUs", {node: str(count) for node, count in counts.items()})
        return
    for count in sorted(set(counts.values())):
        if count < limits.gpus:
            few = [node for node in counts if counts[node] == count]
            yield _own(few, facts, f"torch sees {count} GPUs, {limits.gpus} wanted")


def _num_gpus(facts: NodeFacts) -> int:
    return sum(device.is_gpu for device in facts.devices)


def _different(facts: Sequence[NodeFacts]) -> Iterator[Fault]:
    names = sorted({name for each in facts for name in each.versions})
    for name in names:
        known = [each for each in facts if name in each.versions or not each.problems]  # else a fault already
        yield from _outvoted(name, {each.node: each.versions.get(name, "none") for each in known})
    yield from _outvoted("code of llm_dist", {each.node: each.code[:12] for each in facts})
    models = {each.node: " and ".join(sorted({device.name for device in each.devices})) for each in facts}
    yield from _outvoted("devices", {node: model for node, model in models.items() if model})


def _skew(facts: Sequence[NodeFacts], nodes: Sequence[str], limits: Limits) -> Iterator[Fault]:
    clocks = {each.node: each.clock_seconds for each in facts if each.clock_seconds is not None}
    without = tuple(each.node for each in facts if each.node not in clocks)
    if without and len(nodes) > 1:
        yield Fault(without, "clocks were not compared, since not all nodes saw each other", blamed=False)
    if not clocks:
        return
    middle = median_high(clocks.values())
    off = {node: clock - middle for node, clock in clocks.items() if abs(clock - middle) > limits.max_skew_seconds}
    words = ", ".join(f"{node} {seconds:+.1f} s" for node, seconds in off.items())
    yield from _against_median(tuple(off), tuple(clocks), f"clocks are off: {words}")


def _slow(facts: Sequence[NodeFacts], limits: Limits) -> Iterator[Fault]:
    for is_gpu, least in ((True, limits.min_gpu_share), (False, limits.min_cpu_share)):
        devices = [(each.node, device) for each in facts for device in each.devices if device.is_gpu == is_gpu]
        if not devices:
            continue
        middle = median_high(device.flops_per_second for _, device in devices)
        slow = [(node, device) for node, device in devices if device.flops_per_second < least * middle]
        words = ", ".join(f"{node} {device.flops_per_second / middle:.0%}" for node, device in slow)
        where = [node for node, _ in slow]
        yield from _against_median(where, [node for node, _ in devices], f"slow matmul, of the median: {words}")


def _against_median(off: Sequence[str], compared: Sequence[str], what: str) -> Iterator[Fault]:
    """A fault of those that are off, or, where they are not fewer than half, of all that were compared."""
    if off:
        few = 2 * len(off) < len(compared)
        yield Fault(_once(off if few else compared), what, blamed=few)


def _outvoted(what: str, values: Mapping[str, str]) -> Iterator[Fault]:
    """A fault of the nodes that differ from more than half of all, or of all where no value is that common."""
    groups: dict[str, list[str]] = {}
    for node, value in values.items():
        groups.setdefault(value, []).append(node)
    if len(groups) < 2:
        return
    common = max(groups, key=lambda value: len(groups[value]))
    has_majority = 2 * len(groups[common]) > len(values)
    differing = {value: nodes for value, nodes in groups.items() if not has_majority or value != common}
    words = ", ".join(f"{value} on {_names(nodes)}" for value, nodes in differing.items())
    against = f", {common} on most" if has_majority else ""
    named = tuple(node for nodes in differing.values() for node in nodes)
    yield Fault(named, f"different {what}: {words}{against}", blamed=has_majority)


def _own(nodes: Sequence[str], facts: Sequence[NodeFacts], what: str) -> Fault:
    """A fault that a node has by itself; shared by all of several nodes it is nobody's."""
    return Fault(tuple(nodes), what, blamed=len(facts) == 1 or len(nodes) < len(facts))


def _once(nodes: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(nodes))


def _names(nodes: Sequence[str]) -> str:
    most = 8
    return ", ".join(nodes[:most]) + (f" and {len(nodes) - most} more" if len(nodes) > most else "")
