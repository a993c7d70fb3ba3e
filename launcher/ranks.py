"""The processes of one attempt on this machine: started together, watched, and never left behind.

Knows nothing of training: a rank is a command with an environment and a log file. Other machines may have ranks of the
same attempt; `World` says which are ours.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

HEADER = "=== attempt "
"""How the line begins that each attempt writes into each rank's log."""
_PR_SET_PDEATHSIG = 1
_OF_OTHERS = ("TORCHELASTIC_", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_", "SLURM_PROCID", "SLURM_LOCALID")
"""Beginnings of variables in which an outer launcher describes other ranks than ours."""


@dataclass(frozen=True)
class World:
    """All ranks of an attempt, which of them are this machine's, and where they meet."""

    ranks: int
    here: int
    """How many of them run on this machine."""
    port: int
    first: int = 0
    """The lowest of them."""
    address: str = "127.0.0.1"
    interface: str | None = "lo"
    """Network interface that leads to the others; None: let the libraries look for it."""

    @property
    def numbers(self) -> range:
        """The ranks of this machine."""
        return range(self.first, self.first + self.here)


@dataclass
class Rank:
    """One process."""

    number: int
    process: subprocess.Popen[bytes]
    log: Path
    log_start_bytes: int
    """Where this attempt's part of the log begins."""

    def poll(self) -> int | None:
        """Exit code, negative for a signal; None while it runs."""
        if self.process.returncode is None and _has_ended(self.process.pid):
            # Its children share its group, whose id is certainly still its own until the process is reaped.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.poll()

    def send(self, number: signal.Signals) -> None:
        """Signal the process if it still runs."""
        if self.poll() is None:
            self.process.send_signal(number)

    def last_lines(self, count: int) -> list[str]:
        """The newest lines of this attempt in its log."""
        with self.log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(self.log_start_bytes, size - 65_536))
            text = file.read().decode("utf-8", errors="replace")
        return [line for line in text.splitlines() if line.strip()][-count:]


class Ranks:
    """All processes of an attempt."""

    def __init__(self, members: Sequence[Rank]) -> None:
        self.members = members

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def rank(self, number: int) -> Rank:
        """The rank of that number, which runs on this machine."""
        return self.members[number - self.members[0].number]

    def codes(self) -> dict[int, int]:
        """Exit codes of the ranks that have ended."""
        found = {rank.number: rank.poll() for rank in self.members}
        return {number: code for number, code in found.items() if code is not None}

    def send(self, number: signal.Signals) -> None:
        """Signal every rank that runs."""
        for rank in self.members:
            rank.send(number)

    def wait(self, seconds: float, meanwhile: Callable[[], None] = lambda: None) -> bool:
        """Whether all ended within `seconds`."""
        deadline = time.monotonic() + seconds
        while len(self.codes()) < len(self.members):
            if time.monotonic() > deadline:
                return False
            meanwhile()
            time.sleep(0.05)
        return True

    def terminate(self, grace_seconds: float, meanwhile: Callable[[], None] = lambda: None) -> None:
        """SIGTERM, so that ranks may save; SIGKILL for those that have not gone in time."""
        self.send(signal.SIGTERM)
        self.wait(grace_seconds, meanwhile)
        self.kill()

    def kill(self) -> None:
        """SIGKILL what runs, children included, and wait until it has gone."""
        for rank in self.members:
            if rank.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(rank.process.pid, signal.SIGKILL)
        for rank in self.members:
            rank.process.wait()


def start(command: Sequence[str], world: World, logs: Path, attempt: int) -> Ranks:
    """Start `command` once per rank of this machine; each rank's output is appended to its file under `logs`."""
    logs.mkdir(parents=True, exist_ok=True)
    started = Ranks(members := [])
    try:
        for number in world.numbers:
            environment = rank_environment(os.environ, number, world)
            header = f"{HEADER}{attempt} | rank {number} of {world.ranks} | {socket.gethostname()}"
            members.append(_start_rank(command, number, environment, log_path(logs, number), header))
    except BaseException:
        started.kill()
        raise
    return started


def rank_environment(outer: Mapping[str, str], rank: int, world: World) -> dict[str, str]:
    """What torch.distributed reads, and a share of the cores; what the user has set is kept."""
    kept = {name: value for name, value in outer.items() if not name.startswith(_OF_OTHERS)}
    threads = max(1, len(os.sched_getaffinity(0)) // world.here) if hasattr(os, "sched_getaffinity") else 1
    defaults = {"OMP_NUM_THREADS": str(threads)}
    if sys.platform == "linux" and world.interface is not None:
        defaults["GLOO_SOCKET_IFNAME"] = world.interface  # else gloo resolves the host name, which may lead nowhere
    return {
        **defaults,
        **kept,
        "RANK": str(rank),
        "WORLD_SIZE": str(world.ranks),
        "LOCAL_RANK": str(rank - world.first),
        "LOCAL_WORLD_SIZE": str(world.here),
        "MASTER_ADDR": world.address,
        "MASTER_PORT": str(world.port),
        "PYTHONUNBUFFERED": "1",
    }


def log_path(logs: Path, rank: int) -> Path:
    """File that holds what a rank printed, over all attempts."""
    return logs / f"rank_{rank:05d}.log"


def _start_rank(command: Sequence[str], number: int, environment: dict[str, str], path: Path, header: str) -> Rank:
    with path.open("ab") as log:
        log.write(f"{header} | {time.strftime('%Y-%m-%d %H:%M:%S')} ===\n".encode())
        log.flush()
        start_bytes = log.tell()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # a terminal's Ctrl-C reaches only the launcher, which passes it on once
            preexec_fn=_die_with(os.getpid()),  # noqa: PLW1509 - the launcher has one thread
        )
    return Rank(number, process, path, start_bytes)


def _die_with(launcher_pid: int) -> Callable[[], None] | None:
    """Have the kernel send SIGTERM to a rank whose launcher is gone, however it went."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def in_child() -> None:
        if prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0) != 0 or os.getppid() != launcher_pid:
            os._exit(1)

    return in_child


def _has_ended(pid: int) -> bool:
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True
