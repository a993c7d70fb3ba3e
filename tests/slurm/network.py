"""The wires of a cluster: a switch in a network namespace of its own, and one link from it to this machine."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from tests.slurm.daemons import CommandFailed, Daemon, run


def link_name(number: int) -> str:
    """This machine's end of its link to a cluster."""
    return f"slurm{number}"


class Network:
    """All links end in the switch, and the kernel removes them with it. `undo` is where their end is kept."""

    def __init__(self, folder: Path, environment: Mapping[str, str], undo: ExitStack) -> None:
        self._environment = environment
        self._switch = Daemon(
            ["sleep", "infinity"],
            folder / "log" / "switch.out",
            environment,
            spaces=["--net"],
            setup="ip link add bridge type bridge; ip link set bridge up",
        )
        undo.callback(self._switch.stop, signal.SIGKILL)
        self.number = self._link_to_this_machine(undo)
        """From 1 to 254; no other cluster alive has it."""

    def plug(self, name: str, pid: int, address: str) -> None:
        """Give the network namespace of a process its `eth0`."""
        self._at_switch("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", str(pid))
        self._at_switch("link", "set", name, "master", "bridge", "up")
        inside = ["nsenter", "-t", str(pid), "-n", "ip", "-batch", "-"]
        run(inside, self._environment, text=f"link set lo up\naddr add {address}/24 dev eth0\nlink set eth0 up\n")

    def unplug(self, name: str) -> None:
        self._at_switch("link", "del", name)

    def cut(self, name: str) -> None:
        self._at_switch("link", "set", name, "down")

    def heal(self, name: str) -> None:
        self._at_switch("link", "set", name, "up")

    def _link_to_this_machine(self, undo: ExitStack) -> int:
        """Whoever can add the link has its number."""
        for number in range(1, 255):
            link, address = link_name(number), f"198.18.{number}.254/24"
            peer = ["type", "veth", "peer", "name", "uplink", "netns", str(self._switch.pid)]
            try:
                run(["ip", "link", "add", link, *peer], self._environment)
            except CommandFailed as failed:
                if "File exists" not in str(failed):
                    raise
                continue
            undo.callback(run, ["ip", "link", "del", link], self._environment)
            self._at_switch("link", "set", "uplink", "master", "bridge", "up")
            run(["ip", "addr", "add", address, "dev", link], self._environment)
            run(["ip", "link", "set", link, "up"], self._environment)
            return number
        raise CommandFailed("254 clusters are alive")

    def _at_switch(self, *words: str) -> None:
        run(["nsenter", "-t", str(self._switch.pid), "-n", "ip", *words], self._environment)
