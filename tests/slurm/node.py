"""A machine of the cluster: network, host name, processes, /dev/shm, /var/tmp and /etc/hosts of its own."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.slurm.daemons import Daemon, run
from tests.slurm.network import Network

_SPACES = ("--net", "--uts", "--ipc", "--mount", "--propagation", "slave", "--mount-proc")
_SETUP = """
hostname {name}
mount -t tmpfs shm /dev/shm
mount -t sysfs sysfs /sys
mount --bind {folder}/hosts /etc/hosts
mount --bind {own} /var/tmp
"""


@dataclass(frozen=True)
class Process:
    """One process on a node."""

    pid: int
    """As the machine that runs the tests counts: for os.kill."""
    command: str


class Node:
    """Made switched off."""

    def __init__(self, name: str, address: str, folder: Path, environment: Mapping[str, str], network: Network) -> None:
        self.name, self.address = name, address
        self._folder, self._environment, self._network = folder, environment, network
        self._machine: Daemon | None = None

    def power_on(self) -> None:
        assert self._machine is None, f"{self.name} is on"
        own = self._folder / "nodes" / self.name
        own.mkdir(parents=True, exist_ok=True)
        self._machine = Daemon(
            ["env", "--ignore-signal=CHLD", "sleep", "infinity"],  # so it reaps the orphans that come to it
            self._folder / "log" / f"{self.name}.out",
            self._environment,
            spaces=_SPACES,
            setup=_SETUP.format(name=self.name, folder=self._folder, own=own),
        )
        self._network.plug(self.name, self._machine.pid, self.address)
        self.start_slurmd()

    def power_off(self) -> None:
        """All of it at once, or find it off. The link goes first: no farewell of any socket leaves the node."""
        if self._machine is not None:
            self._network.unplug(self.name)
            self._machine.stop(signal.SIGKILL)
            self._machine = None

    def cut(self) -> None:
        """Pull the network cable."""
        self._network.cut(self.name)

    def heal(self) -> None:
        self._network.heal(self.name)

    def start_slurmd(self) -> None:
        self.execute("slurmd", "-N", self.name, "-L", str(self._folder / "log" / f"slurmd.{self.name}.log"))

    def kill_slurmd(self) -> None:
        """Its jobs live on."""
        self.execute("sh", "-c", f"kill -KILL $(cat {self._folder}/run/slurmd.{self.name}.pid)")

    def execute(self, *words: str, seconds: float = 60) -> str:
        """What a command prints there."""
        return run(self.command(*words), self._environment, seconds=seconds)

    def command(self, *words: str) -> list[str]:
        """What runs a command there, typed on the head."""
        return ["nsenter", "-t", str(self._on.pid), "-n", "-u", "-m", "-p", "-i", "--", *words]

    def processes(self) -> list[Process]:
        """What jobs started and did not end, Slurm's own slurmstepd among it. Nothing where the power is off."""
        if self._machine is None:
            return []
        space = str(Path(f"/proc/{self._machine.pid}/ns/pid").stat().st_ino)
        listed = run(["ps", "-e", "-o", "pid=,pidns=,args="], self._environment)
        rows = [line.split(maxsplit=2) for line in listed.splitlines()]
        there = [
            Process(int(pid), command) for pid, of, command in rows if of == space and int(pid) != self._machine.pid
        ]
        return [process for process in there if not process.command.startswith("slurmd ")]

    @property
    def _on(self) -> Daemon:
        assert self._machine is not None, f"{self.name} is off"
        return self._machine
