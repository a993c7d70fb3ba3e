"""The run folder: who owns it, which attempt this is, and what the run was made from.

config.json   the frozen run file            attempts/      one record per start
source.json   code, versions, host           checkpoints/   step_00000100/ ...
metrics.jsonl one line per logged step       logs/          one file per rank
skipped.jsonl one line per step left out     heartbeats/    one file per rank: signs of life, and verdicts on hangs
tokenizer/    copy of the data's             goodput/       one file per start: where the hours went
                                             tensorboard/   mirror of metrics.jsonl
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_dist import config, runtime
from llm_dist.checkpoint import layout
from llm_dist.config_resume import check_owner, check_resume
from llm_dist.errors import ResumeRefused, UserError
from llm_dist.publishing import publish


class RunFolder:
    """Paths of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.json"
        self.source = path / "source.json"
        self.metrics = path / "metrics.jsonl"
        self.heartbeat = path / "heartbeat.json"
        self.heartbeats = path / "heartbeats"
        self.goodput = path / "goodput"
        self.skipped = path / "skipped.jsonl"
        self.attempts = path / "attempts"
        self.checkpoints = path / "checkpoints"
        self.tokenizer = path / "tokenizer"

    def open(self, run: config.Config, data: Mapping[str, str], accepted: Sequence[str]) -> config.Config:
        """Create the folder or join the run it holds; returns the run file with its schedule frozen.

        Only rank 0 calls this. `data` are the fingerprints of what the run file names; nothing is written when refused.

        Raises:
            ResumeRefused: the folder holds another run.
            UserError: the folder holds something that is no run, or cannot be written.
        """
        try:
            return self._open(run, data, accepted)
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot write the run folder: {error.strerror}; choose another run.dir"
            ) from None

    def _open(self, run: config.Config, data: Mapping[str, str], accepted: Sequence[str]) -> config.Config:
        if self.config.is_file():
            check_owner(self.config, accepted)
            before = config.load(self.config)
            if run.optim.total_steps is None:
                update = {"total_steps": before.optim.total_steps}
                run = run.model_copy(update={"optim": run.optim.model_copy(update=update)})
            latest = layout.latest(self.checkpoints)
            check_resume(before, run, accepted, latest.step if latest else 0)
            self._check_data(data)
        elif self.path.is_dir() and any(entry.name != "logs" for entry in self.path.iterdir()):
            raise UserError(f"{self.path} exists and is not a run folder; choose another run.name or run.dir")
        run = run.frozen()
        self.attempts.mkdir(parents=True, exist_ok=True)
        self.checkpoints.mkdir(exist_ok=True)
        publish(self.config, run.to_json())
        return run

    def _check_data(self, data: Mapping[str, str]) -> None:
        """Every source the run began on is there; new ones may join."""
        before = json.loads(self.source.read_text(encoding="utf-8"))["fingerprints"] if self.source.is_file() else {}
        for name, then in before.items():
            if data.get(name) != then:
                raise ResumeRefused(
                    f"{what_differs(name, data.get(name), then)}; restore it or choose another run.name"
                )

    def begin_attempt(self, record: Mapping[str, Any], data: Mapping[str, str], tokenizer: Path) -> int:
        """Take the next attempt number; a number is taken once, whoever else starts. Only rank 0 calls this.

        `record` says how this attempt was started. The run keeps a copy of its tokenizer, so that its checkpoints
        can be used without its data.
        """
        if not self.tokenizer.exists():
            copied = self.tokenizer.with_name("tokenizer.tmp")
            shutil.copytree(tokenizer, copied, dirs_exist_ok=True)
            copied.rename(self.tokenizer)
        number = 1 + max((int(path.stem.split("_")[1]) for path in self.attempts.glob("attempt_*.json")), default=0)
        while True:
            try:
                descriptor = os.open(self._attempt_path(number), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
                break
            except FileExistsError:
                number += 1
        if self.heartbeats.is_dir():  # an earlier attempt's, perhaps of more ranks
            for stale in self.heartbeats.glob("rank_*"):
                stale.unlink(missing_ok=True)
        with os.fdopen(descriptor, "w") as file:
            json.dump({"attempt": number, "started": time.time(), "host": socket.gethostname(), **record}, file)
        before = json.loads(self.source.read_text(encoding="utf-8")) if self.source.is_file() else {}
        origin = {name: before[name] for name in ("forked_from",) if name in before}
        publish(self.source, json.dumps({**_source(data), **origin}, indent=2) + "\n")
        return number

    def _attempt_path(self, number: int) -> Path:
        return self.attempts / f"attempt_{number:04d}.json"


def what_differs(name: str, now: str | None, before: str) -> str:
    """In words: which fingerprint is another than the run's, `name` being `data.SOURCE` or `tokenizer`."""
    what = f"source {name.removeprefix('data.')} of data.train" if name.startswith("data.") else "the tokenizer"
    if now is None:
        return f"{what} is missing, but the run read it"
    return f"{what} has fingerprint {now[:12]}, but the run's had {before[:12]}"


def _source(data: Mapping[str, str]) -> dict[str, Any]:
    """What the run is made from: commit and uncommitted difference of the code where it runs from a checkout, data."""
    here = Path(__file__)
    is_checkout = _git(here.parent, "ls-files", "--error-unmatch", here.name) is not None
    commit = _git(here.parent, "rev-parse", "HEAD") if is_checkout else None
    return {
        "commit": commit and commit.strip(),
        "diff": _git(here.parent, "diff", "HEAD") if is_checkout else None,
        "versions": runtime.versions(),
        "host": socket.gethostname(),
        "fingerprints": dict(data),
    }


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        answer = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return answer.stdout if answer.returncode == 0 else None
