"""How tests run commands, and what they read afterwards."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typer.testing import CliRunner

from llm_dist import cli, metrics
from llm_dist.checkpoint import layout, store
from llm_dist.engine.partition import Partition

TRAIN = (sys.executable, "-m", "llm_dist", "train")
LAUNCH = (sys.executable, "-m", "launcher.cli", "local")
SECONDS = 240
"""A command that takes longer hangs."""


@dataclass(frozen=True)
class Said:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        assert self.code == 0, self.err
        return json.loads(self.out.splitlines()[-1])

    @property
    def mistake(self) -> str:
        """The one line of a command that refused."""
        assert self.code == 2, (self.code, self.err)
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.err
        assert "Traceback" not in self.err
        return lines[0].removeprefix("error: ")


def llm_dist(*words: object, stdin: str | bytes | None = None) -> Said:
    """Run `llm-dist` in this process; what is no mistake of the user's comes out as it was raised."""
    result = CliRunner().invoke(cli.app, [str(word) for word in words], input=stdin, catch_exceptions=False)
    return Said(result.exit_code, result.stdout, result.stderr)


def run(command: Sequence[object], **environment: str) -> Said:
    """Run a command to its end as a process of its own."""
    process = subprocess.Popen(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # a launcher's ranks, too
        out, err = process.communicate()
        raise AssertionError(f"{command} hangs:\n{err}") from None
    return Said(process.returncode, out, err)


class Started:
    """A command that runs beside the test; killed with all its children's groups at the end of the context."""

    def __init__(self, command: Sequence[object]) -> None:
        self.process = subprocess.Popen(
            [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def until(self, condition: Callable[[], object]) -> None:
        """Wait for something the command does."""
        deadline = time.monotonic() + SECONDS
        while not condition():
            if self.process.poll() is not None:
                raise AssertionError(f"ended with {self.process.returncode}: {self.process.communicate()[1]}")
            assert time.monotonic() < deadline, "waited in vain"
            time.sleep(0.02)

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self) -> Said:
        out, err = self.process.communicate(timeout=SECONDS)
        return Said(self.process.returncode, out, err)


def losses(run_folder: Path) -> dict[int, float]:
    """Training loss of every logged step, the last attempt's word."""
    return {r["step"]: r["loss_nats"] for r in metrics.read(run_folder / "metrics.jsonl") if "loss_nats" in r}


def steps_saved(run_folder: Path) -> list[int]:
    return [found.step for found in layout.list_complete(run_folder / "checkpoints")]


def state_at_end(run_folder: Path) -> dict[str, Tensor]:
    """Every parameter and moment of the latest checkpoint, full, by name."""
    found = layout.find(run_folder)
    shapes = layout.read_manifest(found.folder).state
    state = {key: Partition(torch.empty(math.prod(shape)), 0, shape) for key, shape in shapes.items()}
    store.read_into(found.folder, state)
    return {key: partition.values for key, partition in state.items()}


def assert_same_end(run_folder: Path, other: Path) -> None:
    """Same last step, same losses, and every element of the state equal, bit for bit."""
    assert losses(run_folder) == losses(other)
    assert layout.find(run_folder).step == layout.find(other).step
    ours, theirs = state_at_end(run_folder), state_at_end(other)
    assert ours.keys() == theirs.keys()
    assert any(key.startswith("exp_avg_sq/") for key in ours)
    different = [key for key in ours if not torch.equal(ours[key], theirs[key])]
    assert not different
