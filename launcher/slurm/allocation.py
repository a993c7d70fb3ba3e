"""What Slurm tells a process of the job it is in: the only module that reads SLURM_* variables."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

import psutil

from launcher import ports
from launcher.slurm import controller
from llm_dist.errors import UserError


@dataclass(frozen=True)
class Allocation:
    """A job and its nodes, as its batch step sees them."""

    job: str
    name: str
    restarts: int
    """How often Slurm has queued it again."""
    nodes: tuple[str, ...]
    cpus_per_task: str | None

    @property
    def incarnation(self) -> str:
        """What no other start of any job is called."""
        return f"{self.job}.{self.restarts}"

    @classmethod
    def read(cls) -> Allocation:
        """The job this process is in.

        Raises:
            UserError: it is in none.
        """
        given = os.environ
        if "SLURM_JOB_ID" not in given or "SLURM_JOB_NODELIST" not in given:
            raise UserError("this is no Slurm job (SLURM_JOB_ID is not set); submit with llm-launch slurm or sbatch")
        return cls(
            given["SLURM_JOB_ID"],
            given.get("SLURM_JOB_NAME", ""),
            int(given.get("SLURM_RESTART_COUNT", "0")),
            tuple(controller.hostnames(given["SLURM_JOB_NODELIST"])),
            given.get("SLURM_CPUS_PER_TASK"),
        )


@dataclass(frozen=True)
class Place:
    """A node among those of a step."""

    number: int
    name: str

    @classmethod
    def read(cls) -> Place:
        """Where this process is.

        Raises:
            UserError: it was not started by srun.
        """
        if "SLURM_NODEID" not in os.environ:
            raise UserError("SLURM_NODEID is not set: this is started by srun inside a job, by nobody else")
        return cls(int(os.environ["SLURM_NODEID"]), os.environ.get("SLURMD_NODENAME", socket.gethostname()))


def meeting_address(interface: str, node: str, is_here: bool) -> str:
    """The address of a node at which other nodes reach it; `interface` can only be asked on the node itself.

    Raises:
        UserError: there is none but the loopback's, or not on the interface asked for.
    """
    if interface and is_here:
        found = [each.address for each in psutil.net_if_addrs().get(interface, ()) if each.family == socket.AF_INET]
        if not found:
            raise UserError(f"interface {interface!r} of the site profile has no IPv4 address on {node}")
        return str(found[0])
    for name in (node, *([socket.gethostname()] if is_here else []), controller.address_of(node)):
        for address in _addresses(name):
            if not address.startswith("127."):
                return address
    raise UserError(f"{node}: its name leads to the loopback only; set interface in the site profile")


def _addresses(name: str | None) -> list[str]:
    if not name:
        return []
    try:
        return [str(each[4][0]) for each in socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)]
    except socket.gaierror:
        return []


def interface_to(address: str) -> str | None:
    """The network interface from which this machine reaches `address`; None where it cannot be told."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))  # sends nothing
        own = probe.getsockname()[0]
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address == own for each in addresses):
            return str(name)
    return None


def meeting_port(job: str, start: int) -> int:
    """A free port of this machine that the starts of other jobs are unlikely to take."""
    return ports.choose_port(int("".join(filter(str.isdigit, job)) or 0) * 97 + start * 13)


def array_task() -> int:
    """Number of this task of an array job.

    Raises:
        UserError: this is none.
    """
    if (number := os.environ.get("SLURM_ARRAY_TASK_ID")) is None:
        raise UserError("SLURM_ARRAY_TASK_ID is not set: this is started as a task of an array job, by nobody else")
    return int(number)
