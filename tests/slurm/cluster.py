"""A real Slurm of many nodes on this machine, up in a second or two and gone without a trace.

    with Cluster(Shape(nodes=3)) as cluster:
        job = cluster.run("sbatch", "--parsable", "-N2", "--wrap", "srun hostname")
        cluster.wait_for_state(job, "COMPLETED", 10)

This machine is its head. The nodes see the whole disk, as if it were one shared file system.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import socket
import stat
from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from tests.slurm import settings
from tests.slurm.accounting import start_accounting
from tests.slurm.daemons import PATH, CommandFailed, Daemon, last_lines, run, succeeds, wait_until
from tests.slurm.network import Network, link_name
from tests.slurm.node import Node
from tests.slurm.settings import Place, Shape

NULL_DEVICE = os.makedev(1, 3)
FIELD = re.compile(r"(?:^| )([A-Z][\w:/]*)=")


def leftovers(folder: Path, link: str) -> list[str]:
    """What there is of a cluster on this machine."""
    environments = [(process, process.info["environ"] or {}) for process in psutil.process_iter(["environ", "cmdline"])]
    processes = [process for process, has in environments if has.get("SLURM_CONF") == f"{folder}/slurm.conf"]
    return [
        *(f"process {process.pid}: {process.info['cmdline']}" for process in processes),
        *(f"link {name}" for _, name in socket.if_nameindex() if name == link),
        *(str(path) for path in [folder] if path.exists()),
    ]


class Cluster:
    """Alive in its `with` block, or from `up` to `down`."""

    def __init__(self, shape: Shape | None = None) -> None:
        self.shape = shape or Shape()
        self.folder = Path(f"/tmp/slurm-{secrets.token_hex(4)}")  # sockets want a short path
        self.environment = {
            **{
                name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_", "SRUN_"))
            },
            "PATH": PATH,
            "SLURM_CONF": str(self.folder / "slurm.conf"),
        }
        """Under which commands find this cluster."""
        self.link = ""
        """The one network link that it has on this machine."""
        self.nodes: list[Node] = []
        self._controller: Daemon | None = None
        self._undo = ExitStack()

    def __enter__(self) -> Self:
        self.up()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.down()

    def up(self) -> None:
        """Or raise, with what the logs say, and leave nothing behind."""
        with self._undo as undo:
            try:
                self._start(undo)
            except (CommandFailed, TimeoutError) as failed:
                raise CommandFailed(f"the cluster did not start: {failed}\n{self.last_words()}") from failed
            self._undo = undo.pop_all()

    def down(self) -> None:
        """End all processes and remove all links and files."""
        self._undo.close()

    def leftovers(self) -> list[str]:
        """What of it is still on this machine."""
        return leftovers(self.folder, self.link)

    def last_words(self) -> str:
        """The last lines of all logs."""
        return last_lines(*sorted((self.folder / "log").iterdir()))

    def run(self, *words: str, seconds: float = 60) -> str:
        """What a command of Slurm, or any other, prints on the head."""
        return run(words, self.environment, seconds=seconds)

    def node(self, name: str) -> Node:
        [found] = [node for node in self.nodes if node.name == name]
        return found

    def job(self, job: str | int) -> dict[str, str]:
        """All that the controller says of one job or array task, by its names: JobState, Reason, NodeList, ..."""
        [line] = self.run("scontrol", "show", "job", "-o", str(job)).splitlines()
        _, *pairs = FIELD.split(line)
        return dict(zip(pairs[::2], pairs[1::2], strict=True))

    def wait_for_state(self, job: str | int, states: str | Collection[str], seconds: float) -> dict[str, str]:
        """Of a job, as `job` tells it."""
        wanted = {states} if isinstance(states, str) else set(states)
        seen: dict[str, str] = {}

        def reached() -> bool:
            nonlocal seen
            seen = self.job(job)
            return seen["JobState"] in wanted

        try:
            wait_until(reached, seconds, f"job {job} {' or '.join(sorted(wanted))}")
        except TimeoutError as late:
            raise TimeoutError(f"{late}; it is {seen['JobState']}, {seen['Reason']}") from None
        return seen

    def skip_requeue_delay(self, job: str | int) -> None:
        """Of a pending job: Slurm starts no requeued one for two minutes.

        Not at once: slurmd refuses one that starts within the second of its own end, and the job is lost as FAILED.
        """
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now+2")

    def start_controller(self) -> None:
        self._controller = Daemon(["slurmctld", "-D"], self.folder / "log" / "slurmctld.out", self.environment)
        self._controller.wait_until(lambda: succeeds(["scontrol", "ping"], self.environment), 20, "slurmctld answers")

    def stop_controller(self) -> None:
        """It writes down what it knows first."""
        self._running_controller.stop(signal.SIGTERM)

    def kill_controller(self) -> None:
        """Or find it dead. It forgets what happened in the last seconds."""
        if self._controller is not None:
            self._controller.stop(signal.SIGKILL)

    def pause_controller(self) -> None:
        """Commands that ask it wait for 10 s and fail."""
        self._running_controller.signal(signal.SIGSTOP)

    def resume_controller(self) -> None:
        self._running_controller.signal(signal.SIGCONT)

    @property
    def _running_controller(self) -> Daemon:
        assert self._controller is not None and self._controller.is_alive(), "slurmctld does not run"
        return self._controller

    def _start(self, undo: ExitStack) -> None:
        undo.callback(shutil.rmtree, self.folder)
        for name in (".", "controller", "dev", "log", "munge", "nodes", "run", "spool"):
            (self.folder / name).mkdir()
            (self.folder / name).chmod(0o755)  # whatever the umask: munged wants all to reach its socket
        network = Network(self.folder, self.environment, undo)
        self.link = link_name(network.number)
        place = Place(self.folder, socket.gethostname().split(".")[0], network.number)
        self._configure(place)
        self._start_munged(place, undo)
        if self.shape.accounting:
            start_accounting(place, self.environment, undo)
        undo.callback(self.kill_controller)
        self.start_controller()
        self.nodes = [
            Node(name, place.address(last), self.folder, self.environment, network)
            for last, name in enumerate(self.shape.node_names, 1)
        ]
        for node in self.nodes:
            undo.callback(node.power_off)
            node.power_on()
        wait_until(self._all_nodes_are_idle, 30, "all nodes are idle")

    def _configure(self, place: Place) -> None:
        version = self.run("slurmd", "-V").split()[-1]
        for name, text in {
            "hosts": settings.hosts(self.shape, place),
            "slurm.conf": settings.slurm_conf(self.shape, place),
            "gres.conf": settings.gres_conf(self.shape, place),
            "cgroup.conf": settings.cgroup_conf(slurm_major=int(version.split(".")[0])),
        }.items():
            (self.folder / name).write_text(text)
        for index in range(self.shape.gpus):
            os.mknod(self.folder / "dev" / f"gpu{index}", 0o666 | stat.S_IFCHR, NULL_DEVICE)

    def _start_munged(self, place: Place, undo: ExitStack) -> None:
        key = self.folder / "munge" / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        words = [f"--socket={place.munge_socket}", f"--key-file={key}", f"--seed-file={key.with_name('seed')}"]
        log = self.folder / "log" / "munged.out"
        daemon = Daemon(
            ["munged", "--foreground", *words, f"--pid-file={self.folder}/run/munged.pid"], log, self.environment
        )
        undo.callback(daemon.stop, signal.SIGKILL)
        ask = ["munge", "--no-input", f"--socket={place.munge_socket}"]
        daemon.wait_until(lambda: succeeds(ask, self.environment), 10, "munged answers")

    def _all_nodes_are_idle(self) -> bool:
        states = self.run("sinfo", "--noheader", "--Node", "--partition=main", "--format=%T").split()
        return states == ["idle"] * self.shape.nodes
