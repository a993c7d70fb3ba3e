"""A real run of two ranks under a real launcher, seen from outside: its processes, its log, its run folder."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from llm_dist.checkpoint import layout
from tests.kill.plan import PHASES, Kill, Phase, Setting

RANKS = 2
EVERY_STEPS = 20
"""How often the runs evaluate."""
PATIENCE_SECONDS = 240.0
VANISH_SECONDS = 45.0
"""Within so many seconds ranks have to be gone whose launcher is gone, or whose neighbour.

torchrun waits 30 s before it kills a rank whose save will not end any more."""
_BEGUN = re.compile(r"attempt \d+: (?:begins|resumed at step \d+) of ")
_STEP = re.compile(r"step +(\d+)/\d+ ")
_LEAVING = re.compile(r"finished at step|stopped at step|stopped before the first step")
_TRIES = 4
"""Occasions to come to a phase that is soon over; then it strikes wherever the run is."""
_LENGTH_SECONDS = {
    "build": 0.15,
    "compilation": 4.0,
    "first step": 0.01,
    "training": 0.3,
    "saving": 0.02,
    "validation": 0.06,
}
"""About how long a phase lasts."""
_OWN_LOG = 'exec "$@" >> "$0/rank_0000$RANK.log" 2>&1'
"""A shell's words that give a rank a log of its own, as llm-launch does; torchrun's would die with torchrun."""


class Victim:
    """One run; `start` it, strike it, and `start` it again until it has finished."""

    def __init__(self, setting: Setting, words: tuple[object, ...], run_folder: Path) -> None:
        self.setting, self.run_folder = setting, run_folder
        self.output = run_folder.parent.parent / "output.log"
        logs = (run_folder if setting.program == "llm-launch" else self.output.parent) / "logs"
        self.logs = [logs / f"rank_{rank:05d}.log" for rank in range(RANKS)]
        self.log = self.logs[0]
        self._command = [str(word) for word in (sys.executable, *self._program(), *words)]
        self.ranks: list[psutil.Process] = []
        self.starts = 0
        self._offset = 0
        self._was_asked = False

    def _program(self) -> tuple[object, ...]:
        if self.setting.program == "llm-launch":
            return ("-m", "launcher.cli", "local", "--ranks", RANKS, "--max-restarts", 999)
        self.log.parent.mkdir(parents=True)
        torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}", "--max-restarts=999")
        rank = ("bash", "-c", _OWN_LOG, self.log.parent, sys.executable, "-m", "llm_dist", "train")
        return (*torchrun, "--no-python", *rank)

    def start(self) -> None:
        """Run the command, the same every time."""
        self.starts += 1
        self._was_asked = False
        with self.output.open("ab") as output:
            self.launcher = subprocess.Popen(self._command, stdout=output, stderr=output, stdin=subprocess.DEVNULL)

    @property
    def code(self) -> int | None:
        """How the launcher ended; None while it runs."""
        return self.launcher.poll()

    @property
    def step(self) -> int:
        """Of the latest complete checkpoint."""
        found = layout.latest(self.run_folder / "checkpoints")
        return found.step if found else 0

    def meet_new_ranks(self) -> bool:
        """Wait for the ranks of a new attempt; False where the launcher ends before."""
        known = {rank.pid for rank in self.ranks}

        def come() -> bool:
            found = [rank for rank in self._children() if rank.pid not in known]
            if len(found) == RANKS:
                self.ranks = found
            return len(found) == RANKS

        met = self._until(come)
        self._offset = self.log.stat().st_size if self.log.exists() else 0
        return met

    def _children(self) -> list[psutil.Process]:
        by_number = {}
        try:
            for child in psutil.Process(self.launcher.pid).children():
                if child.cmdline()[1:3] == ["-m", "llm_dist"] and "RANK" in (environment := child.environ()):
                    by_number[int(environment["RANK"])] = child
        except psutil.Error:
            pass
        return [by_number[number] for number in sorted(by_number)]

    def _until(self, condition: Callable[[], bool], seconds: float = PATIENCE_SECONDS) -> bool:
        deadline = time.monotonic() + seconds
        while not condition():
            if self.code is not None or time.monotonic() > deadline:
                assert self.code is not None, f"nothing happens; {self.output}"
                return False
            time.sleep(0.003)
        return True

    def said(self) -> str:
        """What rank 0 has printed in this attempt."""
        if not self.log.exists():
            return ""
        with self.log.open("rb") as file:
            file.seek(self._offset)
            return file.read().decode(errors="replace")

    def phase(self) -> Phase:
        """What the run is doing, as its log and its folder tell."""
        text = self.said()
        if self._was_asked or _LEAVING.search(text):
            return "shutdown"
        if not _BEGUN.search(text):
            return "build" if self._has_heartbeat() else "imports"
        if self._is_writing():
            return "saving"
        steps = _STEP.findall(text)
        if not steps:
            return "compilation" if self.setting.compiles else "first step"
        last = int(steps[-1])
        evaluated = f"step {last}: " in text
        return "validation" if last % EVERY_STEPS == 0 and not evaluated else "training"

    def _has_heartbeat(self) -> bool:
        try:
            return f'"pid": {self.ranks[0].pid},' in (self.run_folder / "heartbeat.json").read_text()
        except OSError:
            return False

    def _is_writing(self) -> bool:
        checkpoints = self.run_folder / "checkpoints"
        return checkpoints.is_dir() and any(path.name.startswith(".writing-") for path in checkpoints.iterdir())

    def come_to(self, kill: Kill, begin_seconds: float) -> bool:
        """Wait until the run is where the kill is aimed at; False where it ended before."""
        if kill.aim == "imports":
            time.sleep(kill.delay * begin_seconds)
            return self.code is None
        if kill.aim == "shutdown":
            return self._until(lambda: PHASES.index(self.phase()) > PHASES.index("build")) and self._ask_to_leave(kill)
        if kill.aim in ("build", "compilation", "first step"):
            place = PHASES.index(kill.aim)
            return self._until(lambda: PHASES.index(self.phase()) >= place) and self._wait(kill)
        for occasion in range(kill.occasions + _TRIES):
            if not self._until(lambda: self.phase() in (kill.aim, "shutdown")) or not self._wait(kill):
                return False
            if self.phase() == "shutdown" or (self.phase() == kill.aim and occasion >= kill.occasions):
                return True
            self._until(lambda: self.phase() != kill.aim)
        return True

    def _wait(self, kill: Kill) -> bool:
        time.sleep(kill.delay * _LENGTH_SECONDS[kill.aim])
        return self.code is None

    def _ask_to_leave(self, kill: Kill) -> bool:
        self.launcher.send_signal(signal.SIGTERM)
        self._was_asked = True
        time.sleep(kill.delay * 0.5)
        return self.code is None

    def strike(self, kill: Kill) -> None:
        """Do it."""
        one = [self.ranks[kill.rank]]
        match kill.kind:
            case "SIGKILL one rank":
                _signal(one, signal.SIGKILL)
            case "SIGKILL all ranks":
                _signal(self.ranks, signal.SIGKILL)
            case "SIGKILL launcher":
                self.launcher.kill()
            case "SIGTERM launcher":
                self.launcher.send_signal(signal.SIGTERM)
            case "SIGTERM one rank":
                _signal(one, signal.SIGTERM)
            case "SIGSTOP one rank":
                _signal(one, signal.SIGSTOP)
                time.sleep(0.5 + kill.delay)
                _signal(one, signal.SIGKILL)

    def vanish(self) -> float:
        """Wait until the ranks that were struck are gone, all of them; how long that took."""
        since = time.monotonic()
        left = psutil.wait_procs(self.ranks, timeout=VANISH_SECONDS)[1]
        assert not left, f"left behind: {left}; {self.output}"
        return time.monotonic() - since

    def end_of_launcher(self) -> int:
        """Wait for the launcher, which has been asked to end or has nothing left to do."""
        return self.launcher.wait(PATIENCE_SECONDS)

    def close(self) -> None:
        """Leave nothing behind, whatever happened."""
        for rank in self.ranks:
            _signal([rank], signal.SIGKILL)
        self.launcher.kill()
        self.launcher.wait()


def _signal(ranks: list[psutil.Process], number: signal.Signals) -> None:
    for rank in ranks:
        with suppress(psutil.NoSuchProcess):
            rank.send_signal(number)
