"""The batch script of a run: plain, short, and a pure function of what was asked for."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.slurm.site import Site
from llm_dist.errors import UserError

COMMENT = "llm_dist:"
"""How the comment of a job begins, by which it is found again; a token follows."""


@dataclass(frozen=True)
class Shape:
    """What is asked of the cluster."""

    nodes: int
    """Nodes for the ranks."""
    ranks_per_node: int
    gpus_per_node: int
    cpus_per_node: int
    minutes: float
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    spares: int = 0
    """Nodes more than the ranks need, to take the place of bad ones."""
    exclude: Sequence[str] = ()
    options: Sequence[str] = ()
    """More options of sbatch."""

    @property
    def ranks(self) -> int:
        """Of all nodes."""
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True)
class Work:
    """What the job does."""

    run: Path
    """Run folder, absolute."""
    code: Path
    """Folder of the packages."""
    folder: Path
    """Where relative paths of the run file begin."""
    python: str
    accepted: Sequence[str] = ()


def job_name(run: Path) -> str:
    """Name of a run's jobs."""
    return f"llm_dist-{run.name}"


def render(shape: Shape, work: Work, site: Site, token: str, is_chained: bool = False) -> str:
    """The script; jobs of a chain wait for one another and are not requeued."""
    lines = [
        "#!/bin/bash",
        f"# Trains {work.run}: {shape.nodes} nodes, {shape.ranks_per_node} ranks on each. Made by llm-launch slurm.",
        *(f"#SBATCH {quoted(option)}" for option in _options(shape, work, site, token, is_chained)),
        "set -euo pipefail",
        "trap '' USR1  # the warning before the time limit; python hears it as soon as it can",
        f"export PYTHONPATH={shlex.quote(str(work.code))} PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1",
        *site.setup,
        *(f"export {name}={shlex.quote(value)}" for name, value in site.environment.items()),
        f"exec {shlex.join(_words(shape, work, site, is_chained))}",
    ]
    return "\n".join(lines) + "\n"


def _options(shape: Shape, work: Work, site: Site, token: str, is_chained: bool) -> Iterator[str]:
    yield f"--job-name={job_name(work.run)}"
    yield f"--comment={COMMENT}{token}"
    yield f"--nodes={shape.nodes + shape.spares}"
    yield "--ntasks-per-node=1"
    yield f"--cpus-per-task={shape.cpus_per_node}"
    if shape.gpus_per_node:
        yield f"--gpus-per-node={shape.gpus_per_node}"
    if site.exclusive:
        yield "--exclusive"
    yield f"--time={in_slurm_words(shape.minutes)}"
    yield f"--signal=B:USR1@{site.signal_seconds}"
    yield "--no-requeue" if is_chained or not site.requeue else "--requeue"
    if is_chained:
        yield "--dependency=singleton"
    yield "--open-mode=append"
    yield f"--output={work.run}/slurm/job_%j.log"
    yield f"--chdir={work.folder}"
    for name in ("partition", "account", "qos", "constraint"):
        if value := getattr(shape, name):
            yield f"--{name}={value}"
    if shape.exclude:
        yield f"--exclude={','.join(shape.exclude)}"
    yield from (*site.options, *shape.options)


def _words(shape: Shape, work: Work, site: Site, is_chained: bool) -> list[str]:
    words = [work.python, "-m", "launcher.slurm.supervise", str(work.run)]
    words += ["--nodes", str(shape.nodes), "--ranks-per-node", str(shape.ranks_per_node)]
    words += ["--signal-seconds", str(site.signal_seconds)]
    words += ["--max-failures", str(site.max_failures), "--exclude-hours", f"{site.exclude_hours:g}"]
    words += [] if site.check else ["--no-check"]
    words += ["--interface", site.interface] if site.interface else []
    words += ["--no-requeue"] if is_chained or not site.requeue else []
    words += [f"--step-option={each}" for each in _container_options(work, site)]
    words += [f"--wrapper-word={each}" for each in _wrapper(work, site)]
    words += ["--python", site.container.python] if site.container.kind != "none" else []
    return words + [word for key in work.accepted for word in ("--accept", key)]


def _mounts(work: Work, site: Site) -> list[str]:
    own = dict.fromkeys(f"{each}:{each}" for each in (work.run, work.code, work.folder))
    return [*own, *site.container.mounts]


def _container_options(work: Work, site: Site) -> list[str]:
    if site.container.kind != "pyxis":
        return []
    mounts = ",".join(_mounts(work, site))
    return [
        f"--container-image={site.container.image}",
        f"--container-mounts={mounts}",
        f"--container-workdir={work.folder}",
    ]


def _wrapper(work: Work, site: Site) -> list[str]:
    if site.container.kind != "apptainer":
        return []
    binds = [word for each in _mounts(work, site) for word in ("--bind", each)]
    return ["apptainer", "exec", "--nv", *binds, "--pwd", str(work.folder), site.container.image]


def quoted(option: str) -> str:
    """An option as a line of a script may hold it, whatever stands in its value."""
    name, equals, value = option.partition("=")
    return f'{name}="{value}"' if any(each.isspace() for each in value) else f"{name}{equals}{value}"


def in_slurm_words(minutes: float) -> str:
    """`1-02:03:00`."""
    seconds = round(minutes * 60)
    days, rest = divmod(seconds, 86_400)
    clock = f"{rest // 3600:02d}:{rest % 3600 // 60:02d}:{rest % 60:02d}"
    return f"{days}-{clock}" if days else clock


def minutes_of(text: str) -> float:
    """Slurm's ways to write a time limit: `90`, `90:00`, `1:30:00`, `2-12`, `2-12:30`, `2-12:30:00`.

    Raises:
        UserError: it is none of them.
    """
    days, dash, clock = text.rpartition("-")
    parts = clock.split(":")
    if len(parts) > 3 or not all(part.isdigit() for part in (*parts, *([days] if dash else []))):
        raise UserError(f"--time {text!r}: write minutes, H:MM:SS, or D-HH:MM:SS")
    numbers = [int(part) for part in parts]
    units = (60.0, 1.0, 1 / 60) if dash or len(parts) == 3 else (1.0, 1 / 60)
    return int(days or 0) * 1440 + sum(number * unit for number, unit in zip(numbers, units, strict=False))
