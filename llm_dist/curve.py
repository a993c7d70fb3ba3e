"""The loss curve of a run as a picture."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from llm_dist import metrics
from llm_dist.config import run_config_path
from llm_dist.errors import UserError


@dataclass(frozen=True)
class Curve:
    """What was drawn."""

    picture: str
    steps: int
    last_loss_nats: float


def draw(run: Path, out: Path | None = None) -> Curve:
    """Draw training and held-out loss over tokens into `out` (default: loss.png in the run folder).

    Raises:
        UserError: `run` is no run folder, or nothing has been logged yet.
    """
    run_config_path(run)
    records = metrics.read(run / "metrics.jsonl")
    logged = [record for record in records if "loss_nats" in record]
    if not logged:
        raise UserError(f"{run}/metrics.jsonl holds no logged step yet; train until log.every_steps has passed")
    picture = out or run / "loss.png"
    _figure(run.name, records, logged).savefig(picture, dpi=130)
    return Curve(str(picture), logged[-1]["step"], logged[-1]["loss_nats"])


def _figure(name: str, records: list[dict], logged: list[dict]):  # type: ignore[no-untyped-def, type-arg]
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([r["step"] for r in logged], [r["loss_nats"] for r in logged], linewidth=1, label="training")
    for held_out in sorted({key for record in records for key in record.get("eval", {})}):
        points = [(r["step"], r["eval"][held_out]["loss_nats"]) for r in records if held_out in r.get("eval", {})]
        axes.plot(*zip(*points, strict=True), marker="o", label=held_out, zorder=3)
    attempts = [now["step"] for before, now in pairwise(logged) if now["attempt"] != before["attempt"]]
    for number, step in enumerate(attempts):
        axes.axvline(step, color="#999999", linestyle=":", label="started again" if number == 0 else None)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=name)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
