"""What a run folder tells about its run: where it is, how fast, how long still, and what went wrong.

Reads files that may be written at this moment; asks no process and no scheduler.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from launcher.attempts import attempts, hang_verdict, heartbeat, is_running, latest_complete_step, read_table
from launcher.goodput import Goodput, read_goodput
from launcher.goodput import lines as goodput_lines
from launcher.ranks import HEADER
from launcher.wording import duration_in_words
from llm_dist import config
from llm_dist.checkpoint.layout import latest, read_manifest
from llm_dist.metrics import read as metrics_of

_TAIL_BYTES = 65_536
_ERROR = re.compile(r"error: .+|(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Refused|Interrupt)\b.*")
State = Literal["not started", "running", "finished", "not running"]


@dataclass(frozen=True)
class Status:
    """One look at a run."""

    run: str
    state: State
    step: int
    """Optimizer steps finished, as far as reported."""
    steps: int
    loss_nats: float | None
    tokens_per_second: float | None
    seconds_left: float | None
    attempts: int
    latest_checkpoint_step: int | None
    heartbeat_age_seconds: float | None
    phase: str | None
    """What rank 0 said it was doing."""
    error: str | None
    """Last error line of the last attempt, or who made it hang, where the run is neither running nor finished."""
    goodput: Goodput | None
    """Where the hours went."""
    forked_from: str | None
    """Run and step that this one began from, where it is a fork."""


def read_status(run: Path) -> Status:
    """Look at a run folder.

    Raises:
        UserError: it is not a run folder.
    """
    wanted = config.load(run)
    beat = heartbeat(run) or {}
    newest = _newest(run / "metrics.jsonl")
    saved = latest_complete_step(run)
    state = _state(run, wanted, saved)
    step = max(saved or 0, newest.get("step", 0), int(beat.get("step", 0)) if state == "running" else 0)
    speed = newest.get("tokens_per_second")
    seconds_left = (wanted.run.steps - step) * wanted.batch.tokens_per_step / speed if speed else None
    return Status(
        run=str(run),
        state=state,
        step=step,
        steps=wanted.run.steps,
        loss_nats=newest.get("loss_nats"),
        tokens_per_second=speed,
        seconds_left=None if state == "finished" else seconds_left,
        attempts=len(attempts(run)),
        latest_checkpoint_step=saved,
        heartbeat_age_seconds=time.time() - float(beat["time"]) if "time" in beat else None,
        phase=beat.get("phase"),
        error=(_hang(run) or last_error(run)) if state == "not running" else None,
        goodput=read_goodput(run, time.time() if state == "not running" else None),
        forked_from=_origin(run),
    )


def _origin(run: Path) -> str | None:
    origin = (read_table(run / "source.json") or {}).get("forked_from")
    return None if origin is None else f"{origin['run']} at step {origin['step']}"


def _hang(run: Path) -> str | None:
    words = hang_verdict(run)
    return None if words is None else f"hang: {words}"


def last_error(run: Path) -> str | None:
    """The error line that ends the last attempt in the log of the lowest rank that has one."""
    for log in sorted((run / "logs").glob("rank_*.log")):
        for line in reversed(_last_attempt(log)):
            if _ERROR.fullmatch(line.strip()):
                return f"{log.stem}: {line.strip()}"
    return None


def render(status: Status) -> str:
    """A few lines for a person."""
    saved, loss = status.latest_checkpoint_step, status.loss_nats
    lines = [
        f"{status.run}: {status.state}" + (f" ({status.phase})" if status.state == "running" and status.phase else ""),
        f"  step        {status.step} of {status.steps}",
        f"  loss        {'-' if loss is None else f'{loss:.4f} nats per token'}",
        f"  speed       {'-' if status.tokens_per_second is None else f'{status.tokens_per_second:,.0f} tokens/s'}",
        f"  time left   {'-' if status.seconds_left is None else duration_in_words(status.seconds_left)}",
        f"  checkpoint  {'none yet' if saved is None else f'step {saved}'}",
        f"  attempts    {status.attempts}",
    ]
    if status.forked_from is not None:
        lines.append(f"  forked from {status.forked_from}")
    if status.goodput is not None:
        first, *rest = goodput_lines(status.goodput)
        lines += [f"  goodput     {first}", *(f"              {line}" for line in rest)]
    if status.error:
        lines.append(f"  last error  {status.error}")
    return "\n".join(lines)


def _state(run: Path, wanted: config.Config, saved: int | None) -> State:
    if is_running(run):
        return "running"
    if saved is not None and (saved >= wanted.run.steps or _is_out_of_patience(run, wanted)):
        return "finished"
    return "not running" if attempts(run) else "not started"


def _is_out_of_patience(run: Path, wanted: config.Config) -> bool:
    found = latest(run / "checkpoints")
    if wanted.eval.patience is None or found is None:
        return False
    waited = read_manifest(found.folder).trajectory.get("evaluations_without_improvement", 0)
    return bool(waited >= wanted.eval.patience)


def _newest(metrics: Path) -> dict[str, Any]:
    """The training line written last: of the newest attempt, which may be at an earlier step than the one before."""
    lines = (record for record in metrics_of(metrics) if "loss_nats" in record)
    return max(lines, key=lambda line: (line["attempt"], line["step"]), default={})


def _last_attempt(log: Path) -> list[str]:
    with log.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _TAIL_BYTES))
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    starts = [index for index, line in enumerate(lines) if line.startswith(HEADER)]
    return lines[starts[-1] :] if starts else lines
