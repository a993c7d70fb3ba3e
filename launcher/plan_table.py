"""Shows a plan to a person."""

from __future__ import annotations

from collections.abc import Iterator

from launcher.wording import bytes_in_words, count_in_words, duration_in_words
from llm_dist.config import Config
from llm_dist.plan import Plan


def render(config: Config, plan: Plan, suggestion: str | None) -> str:
    """A table of a screen's height."""
    rows = [*_model(config, plan), *_step(config, plan), *_memory(plan), *_pace(plan, suggestion)]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" if name else "" for name, value in rows]
    return "\n".join([*lines, *(f"warning: {warning}" for warning in plan.warnings)])


def _model(config: Config, plan: Plan) -> Iterator[tuple[str, str]]:
    trained = "" if plan.num_trained == plan.num_parameters else f", {count_in_words(plan.num_trained)} of them trained"
    yield "parameters", f"{count_in_words(plan.num_parameters)} (vocabulary {plan.vocabulary_tokens:,}){trained}"
    yield "FLOPs per token", f"{plan.flops_per_token:.3g} (causal {plan.flops_per_token_causal:.3g})"
    yield "Hugging Face", plan.hugging_face or f"not exportable: {plan.not_exportable}"
    epochs = "" if plan.epochs is None else f", {plan.epochs:.2f} epochs"
    yield "tokens", f"{count_in_words(plan.tokens)} in {config.run.steps:,} steps{epochs}"
    yield "", ""


def _step(config: Config, plan: Plan) -> Iterator[tuple[str, str]]:
    rows = plan.rows
    yield "step", f"{config.batch.tokens_per_step:,} tokens, {rows.sequences_per_step:,} sequences"
    yield "ranks", f"{rows.ranks:,} x {rows.num_micro_batches} micro-batches of {rows.rows_per_micro_batch}"
    nearest = f"; none with {' or '.join(rows.nearest)}" if rows.nearest else ""
    yield "waste", f"{rows.waste:.1%} of the computed rows are absent{nearest}"
    yield "traffic", f"{bytes_in_words(plan.traffic_bytes_per_step)} sent per rank and step"
    yield "", ""


def _memory(plan: Plan) -> Iterator[tuple[str, str]]:
    memory = plan.memory
    for kind in ("weights", "gradients", "optimizer", "working", "activations", "head"):
        yield f"{kind} per rank", bytes_in_words(getattr(memory, kind))
    yield "peak per rank", f"{bytes_in_words(memory.peak)} (without libraries and CUDA context)"


def _pace(plan: Plan, suggestion: str | None) -> Iterator[tuple[str, str]]:
    pace = plan.pace
    if pace is None:
        return
    yield "", ""
    verdict = "fits" if pace.fits else f"does not fit; fits with {suggestion}"
    yield f"on {pace.gpu}", f"{verdict} ({bytes_in_words(pace.memory_bytes)} each)"
    yield (
        "time",
        (
            f"{pace.seconds_per_step:.3g} s per step, {duration_in_words(pace.days * 86_400)} in all "
            f"(assuming {pace.utilisation:.0%} of the dense bf16 peak)"
        ),
    )
    cost = "" if pace.cost is None else f", cost {pace.cost:,.0f}"
    yield "GPU hours", f"{pace.gpu_hours:,.1f}{cost}"
