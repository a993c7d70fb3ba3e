"""One start of the ranks on all nodes: an srun, watched from the batch step until it is gone."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.attempts import heartbeat, latest_complete_step, next_attempt
from launcher.slurm import controller, starts
from launcher.slurm.allocation import Allocation, meeting_address, meeting_port
from launcher.slurm.controller import ControllerSilent, SlurmRefused
from launcher.slurm.decide import Asked
from launcher.watching import say

_POLL_SECONDS = 0.5
STEP_GRACE_SECONDS = 60.0
"""How long after the first node has come to its end the step may last: Slurm's `--wait`, and once more ours."""
_ALL_ENDED_SECONDS = 5.0
"""The same after the last one."""
SILENCE_SECONDS = 900.0
"""How long rank 0 may stand still before the step is ended. Ranks that can judge a hang do so long before."""


@dataclass(frozen=True)
class Terms:
    """What the job was submitted with, as far as it matters inside."""

    run: Path
    nodes: int
    """How many nodes the ranks need; what the allocation has more are spares."""
    ranks_per_node: int
    interface: str = ""
    signal_seconds: float = 180.0
    max_failures: int = 3
    may_requeue: bool = True
    has_check: bool = True
    """Whether nodes are measured before the ranks start."""
    exclude_hours: float = 24.0
    python: str = sys.executable
    """Interpreter of the ranks, inside the container if there is one."""
    step: tuple[str, ...] = ()
    """More options of srun."""
    wrapper: tuple[str, ...] = ()
    """In front of the ranks' command, for example `apptainer exec IMAGE`."""
    accepted: tuple[str, ...] = ()


def on_each(terms: Terms, allocation: Allocation, nodes: Sequence[str]) -> list[str]:
    """Words that start one process of a module of ours on each of the nodes; the module's name follows."""
    count = str(len(nodes))
    words = ["srun", f"--nodes={count}", f"--ntasks={count}", "--ntasks-per-node=1", f"--nodelist={','.join(nodes)}"]
    words += ["--kill-on-bad-exit=1", f"--wait={STEP_GRACE_SECONDS:.0f}", "--export=ALL"]
    words += [f"--cpus-per-task={allocation.cpus_per_task}"] if allocation.cpus_per_task else []
    return [*words, *terms.step, *terms.wrapper, terms.python, "-m"]


def ranks_command(
    terms: Terms, allocation: Allocation, nodes: Sequence[str], number: int, probe: Path | None = None
) -> list[str]:
    """What starts all ranks, to train or, with `probe`, to check the network and report into that folder.

    Raises:
        UserError: the first node has no address at which others reach it.
    """
    words = ["launcher.slurm.node", str(terms.run), "--nodes", str(len(nodes))]
    words += ["--address", _meeting_address(terms, allocation, nodes)]
    words += ["--port", str(meeting_port(allocation.job, number))]
    words += ["--start", str(number), "--attempt", str(next_attempt(terms.run))]
    words += ["--ranks-per-node", str(terms.ranks_per_node)]
    words += [word for key in terms.accepted for word in ("--accept", key)]
    words += ["--probe", str(probe)] if probe is not None else []
    return [*on_each(terms, allocation, nodes), *words]


def _meeting_address(terms: Terms, allocation: Allocation, nodes: Sequence[str]) -> str:
    if len(nodes) == 1:
        return "127.0.0.1"
    return meeting_address(terms.interface, nodes[0], is_here=nodes[0] == allocation.nodes[0])


class Step:
    """The running srun of one start."""

    def __init__(self, command: Sequence[str], terms: Terms, allocation: Allocation, number: int, nodes: int) -> None:
        self._terms, self._job, self._number, self._nodes = terms, allocation.job, number, nodes
        self._process = subprocess.Popen(command)
        self._is_asked = False

    def see_to_the_end(self, asked: Callable[[], Asked | None]) -> None:
        """Until srun is gone, passing on that the ranks are to stop; it is ended where it waits in vain."""
        sign, sign_at, has_lived = self._sign_of_life(), time.monotonic(), False
        first_end_at: float | None = None
        while self._process.poll() is None:
            time.sleep(_POLL_SECONDS)
            if (why := asked()) is not None:
                self._ask_to_stop(why)
            now, num_ended = time.monotonic(), len(starts.read_node_ends(self._terms.run, self._number))
            if num_ended and first_end_at is None:
                first_end_at = now
            if (new := self._sign_of_life()) != sign:
                sign, sign_at, has_lived = new, now, True
            grace = _ALL_ENDED_SECONDS if num_ended == self._nodes else 2 * STEP_GRACE_SECONDS
            if first_end_at is not None and now > first_end_at + grace:
                return self._end("nodes have come to their end and srun has not noticed")
            if has_lived and now > sign_at + SILENCE_SECONDS:
                return self._end(f"rank 0 has given no sign of life for {SILENCE_SECONDS:.0f} s")
        return None

    def _ask_to_stop(self, why: Asked) -> None:
        if not self._is_asked:
            self._is_asked = True
            say(f"asked to end ({why}): the ranks save and leave")
            self._process.send_signal(signal.SIGUSR1)  # srun passes it on to every task, whatever the controller does

    def _sign_of_life(self) -> object:
        beat = heartbeat(self._terms.run) or {}
        return beat.get("time"), beat.get("step"), latest_complete_step(self._terms.run)

    def _end(self, why: str) -> None:
        say(f"{why}: ending the step")
        self._process.kill()
        self._process.wait()
        try:
            if (step := self._newest()) is not None:
                controller.cancel("--signal=KILL", f"{self._job}.{step}")
        except (SlurmRefused, ControllerSilent) as error:  # what is left cannot write: a newer attempt fences it off
            say(str(error))

    def _newest(self) -> str | None:
        """Number of the job's newest step of ranks that Slurm still sees."""
        lines = controller.ask("squeue", "--noheader", "--steps", f"--jobs={self._job}", "--format=%i").split()
        numbers = [line.rpartition(".")[2] for line in lines]
        return max((each for each in numbers if each.isdigit()), key=int, default=None)
