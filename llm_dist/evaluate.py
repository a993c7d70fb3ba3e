"""How well a model does on held-out text: its loss, and what follows from it or is counted beside it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from llm_dist.batch import Batch, LossSum
from llm_dist.data.holdout import Windows
from llm_dist.objectives.objective import Objective
from llm_dist.runtime import Runtime


@dataclass(frozen=True)
class Evaluation:
    """Result on one held-out folder."""

    loss_nats: float
    """Mean negative log-likelihood per scored token, or per label."""
    perplexity: float | None
    """exp(loss_nats), infinite where that overflows; None where tokens are not predicted from those before them."""
    bits_per_byte: float | None
    """Bits per UTF-8 byte of the text, comparable between tokenizers; None where not all of it is scored."""
    tokens: int
    """Tokens, or labels, scored."""
    bytes: int
    """UTF-8 bytes of the text that was scored."""
    scores: dict[str, float] = field(default_factory=dict)
    """What the objective counts besides, by name; more is better."""

    def by(self, name: str) -> float:
        """What the best evaluation is the least in: the loss, or a score with its sign changed."""
        return self.loss_nats if name == "loss" else -self.scores[name]

    def words(self) -> str:
        """For people, in one line."""
        parts = [f"loss {self.loss_nats:.4f} nats"]
        if self.perplexity is not None:
            parts.append(f"perplexity {self.perplexity:.2f}")
        if self.bits_per_byte is not None:
            parts.append(f"{self.bits_per_byte:.4f} bits per byte")
        return ", ".join([*parts, *(f"{name.replace('_', ' ')} {value:.4f}" for name, value in self.scores.items())])


class EvaluationStopped(Exception):
    """It was left before its end, on all ranks together; it has no result."""


def evaluate(
    loss_of: Callable[[Batch], LossSum],
    objective: Objective,
    windows: Windows,
    runtime: Runtime,
    *,
    sequences_per_batch: int = 8,
    must_stop: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Score held-out text in all of its windows.

    Collective: all ranks call this. Windows are dealt to the ranks in turn, and every rank makes the same number of
    calls of `loss_of`, because an engine that shards parameters gathers them in each.

    `must_stop` is asked before each batch and answers the same on all ranks.

    Raises:
        EvaluationStopped: `must_stop` said so.
    """
    own = range(runtime.rank, windows.num_windows, runtime.ranks)
    most_windows = -(-windows.num_windows // runtime.ranks)
    sums = torch.zeros(2 + objective.num_counts, dtype=torch.float64)
    for first in range(0, most_windows, sequences_per_batch):
        if must_stop():
            raise EvaluationStopped
        chosen = own[first : first + sequences_per_batch]
        batch = objective.make_batch(windows.rows(chosen), sequences_per_batch).to(runtime.device)
        loss = loss_of(batch)
        sums[:2] += torch.stack([loss.nats.double(), loss.tokens.double()]).cpu()
        sums[2:] += objective.count(batch, loss).cpu()
    total = runtime.sum(sums)
    nats, tokens = total[:2].tolist()
    mean, scores = nats / max(1, tokens), objective.scores(total[2:])
    perplexity = (math.exp(mean) if mean < 700 else math.inf) if objective.has_perplexity else None
    bits_per_byte = nats / math.log(2) / max(1, windows.num_bytes) if objective.scores_text else None
    return Evaluation(mean, perplexity, bits_per_byte, int(tokens), windows.num_bytes, scores)
