"""A run that trains on the test cluster, and what the tests ask of it."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from launcher.attempts import heartbeat, latest_complete_step
from launcher.slurm import starts
from tests.slurm.cluster import Cluster
from tests.slurm.daemons import wait_until

LAUNCH = (sys.executable, "-m", "launcher.cli")
SITE = "check = false\nsignal_seconds = 60\n"
RANKS = ("--nodes", "2", "--ranks-per-node", "1", "--time", "10")
OVER = ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL")


class Submitted:
    """One run and its job."""

    def __init__(self, cluster: Cluster, run_file: Path, run: Path) -> None:
        self.cluster, self.run_file, self.run = cluster, run_file, run
        self.site = run_file.with_name("site.toml")
        self.site.write_text(SITE)
        self.job = ""

    def launch(self, *words: object, seconds: float = 90) -> str:
        """What a command of llm-launch prints."""
        return self.cluster.run(*LAUNCH, *(str(word) for word in words), seconds=seconds)

    def submit(self, *overrides: str, options: Sequence[str] = RANKS) -> str:
        """Submit it; the number of its job."""
        said = self.launch("slurm", self.run_file, *options, "--site", self.site, "--json", *overrides)
        self.job = json.loads(said.splitlines()[-1])["jobs"][0]
        return self.job

    def status(self) -> dict[str, Any]:
        """As scripts see it."""
        return json.loads(self.launch("status", self.run, "--json").splitlines()[-1])

    def wait_until(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        """Or fail with the job's own log."""
        try:
            wait_until(condition, seconds, what)
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{self.log()}\n{self.cluster.job(self.job)}") from None

    def wait_for_step(self, step: int, seconds: float = 60) -> None:
        """Until a checkpoint at or after `step` stands."""
        self.wait_until(lambda: (latest_complete_step(self.run) or 0) >= step, seconds, f"step {step} is saved")

    def wait_for_state(self, *states: str, seconds: float = 60) -> dict[str, str]:
        """Of its job."""
        self.wait_until(lambda: self.cluster.job(self.job)["JobState"] in states, seconds, f"{' or '.join(states)}")
        return self.cluster.job(self.job)

    def wait_for_requeue(self, seconds: float = 60) -> None:
        """Until it waits again; then spare it the two minutes that Slurm lets requeued jobs wait."""
        self.wait_for_state("PENDING", seconds=seconds)
        self.cluster.skip_requeue_delay(self.job)

    def finish(self, seconds: float = 120) -> None:
        """Until the job has come to its end in order, and nothing of it is left on any node."""
        found = self.wait_for_state(*OVER, seconds=seconds)
        assert found["JobState"] == "COMPLETED", (found, self.log())
        self.wait_until(lambda: not self.left_behind(), 30, "nothing is left on the nodes")

    def left_behind(self) -> list[str]:
        """Processes of jobs on the nodes."""
        return [f"{node.name}: {each.command}" for node in self.cluster.nodes for each in node.processes()]

    def rank_pid(self, node: str) -> int:
        """The rank's process on a node, as this machine counts."""
        found = [each for each in self.cluster.node(node).processes() if "llm_dist train" in each.command]
        return min(each.pid for each in found)

    def kill_rank(self, node: str, number: signal.Signals = signal.SIGKILL) -> None:
        os.kill(self.rank_pid(node), number)

    def wait_for_rank(self, node: str, seconds: float = 60) -> None:
        """Until one trains there."""

        def is_there() -> bool:
            return any("llm_dist train" in each.command for each in self.cluster.node(node).processes())

        self.wait_until(is_there, seconds, f"a rank on {node}")

    def wait_for_sign_of_life(self, seconds: float = 60) -> None:
        """Of rank 0, from now on."""
        now = time.time()
        self.wait_until(lambda: (heartbeat(self.run) or {}).get("time", 0) > now, seconds, "a sign of life of rank 0")

    def starts(self) -> list[starts.Start]:
        return starts.read_all(self.run)

    def actions(self) -> list[str | None]:
        """What followed from each start."""
        return [start.action for start in self.starts()]

    def log(self) -> str:
        """What the supervisor said."""
        return "".join(path.read_text() for path in sorted((self.run / "slurm").glob("job_*.log")))
