"""What is asked of a cluster against what it has, in plain words, before a job waits in its queue for ever."""

from __future__ import annotations

from dataclasses import replace

from launcher.slurm import controller
from launcher.slurm.controller import Partition
from launcher.slurm.script import Shape, in_slurm_words
from launcher.slurm.site import Site
from llm_dist.errors import UserError


def check_shape(shape: Shape, site: Site) -> Shape:
    """The shape with what the cluster decides filled in.

    Raises:
        UserError: the cluster does not have it, one line for each reason.
    """
    found = controller.partitions()
    partition = _partition(found, shape.partition)
    mistakes = list(_mistakes(shape, partition, site))
    known = controller.accounts()
    if shape.account and known is not None and shape.account not in known:
        mistakes.append(f"--account {shape.account} is not one of yours: {', '.join(known)}")
    if mistakes:
        raise UserError("\n".join(mistakes))
    cpus = shape.cpus_per_node or _share(partition, shape, site)
    return replace(shape, cpus_per_node=cpus)


def _partition(found: list[Partition], name: str) -> Partition:
    for each in found:
        if each.name == name or (not name and each.is_default):
            return each
    names = ", ".join(each.name for each in found)
    if not name:
        raise UserError(f"this cluster has no default partition; name one with --partition: {names}")
    raise UserError(f"--partition {name}: this cluster has {names}")


def _mistakes(shape: Shape, partition: Partition, site: Site) -> list[str]:
    found = []
    where = f"partition {partition.name}"
    if not partition.is_up:
        found.append(f"{where} takes no jobs now")
    if shape.nodes + shape.spares > partition.nodes:
        asked = f"--nodes {shape.nodes}" + (f" --spares {shape.spares}" if shape.spares else "")
        found.append(f"{asked} is more than the {partition.nodes} nodes of {where}")
    if partition.max_minutes is not None and shape.minutes > partition.max_minutes:
        longest = in_slurm_words(partition.max_minutes)
        found.append(f"--time {in_slurm_words(shape.minutes)} is more than {where} allows: {longest}")
    if shape.gpus_per_node > partition.gpus_per_node:
        found.append(f"--gpus-per-node {shape.gpus_per_node}: nodes of {where} have {partition.gpus_per_node}")
    if shape.cpus_per_node > partition.cpus_per_node:
        found.append(f"{shape.cpus_per_node} cores per node: nodes of {where} have {partition.cpus_per_node}")
    if shape.minutes * 60 < 2 * site.signal_seconds:
        least = in_slurm_words(2 * site.signal_seconds / 60)
        found.append(
            f"--time {in_slurm_words(shape.minutes)} is too short to save before its end "
            f"(signal_seconds = {site.signal_seconds} in the site profile): at least {least}"
        )
    return found


def _share(partition: Partition, shape: Shape, site: Site) -> int:
    """Cores of a node that the job's part of it comes to."""
    cpus, gpus = partition.cpus_per_node, partition.gpus_per_node
    if site.exclusive or not shape.gpus_per_node or not gpus:
        return cpus
    return max(1, cpus * shape.gpus_per_node // gpus)
