"""How well a model predicts held-out text: every token scored once, as perplexity and bits per byte."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from llm_dist.batch import Batch, LossSum
from llm_dist.data.holdout import HoldoutWindows
from llm_dist.data.index import ShardSet
from llm_dist.objectives import Objective
from llm_dist.runtime import Runtime


@dataclass(frozen=True)
class Evaluation:
    """Result on one held-out folder."""

    loss_nats: float
    """Mean negative log-likelihood per token."""
    perplexity: float
    """exp(loss_nats); infinite where that overflows."""
    bits_per_byte: float
    """Bits per UTF-8 byte of the text: comparable between tokenizers."""
    tokens: int
    """Tokens scored."""
    bytes: int
    """UTF-8 bytes of the text that was scored."""


class EvaluationStopped(Exception):
    """It was left before its end, on all ranks together; it has no result."""


def evaluate(
    loss_of: Callable[[Batch], LossSum],
    objective: Objective,
    shards: ShardSet,
    runtime: Runtime,
    *,
    sequence_tokens: int,
    document_mask: bool = False,
    sequences_per_batch: int = 8,
    max_sequences: int | None = None,
    must_stop: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Score a held-out folder in consecutive windows of `sequence_tokens`, partial ones included.

    Collective: all ranks call this. Windows are dealt to the ranks in turn, and every rank makes the same number of
    calls of `loss_of`, because an engine that shards parameters gathers them in each.

    `must_stop` is asked before each batch and answers the same on all ranks.

    Raises:
        EvaluationStopped: `must_stop` said so.
    """
    windows = HoldoutWindows(shards, sequence_tokens, document_mask, max_sequences)
    own = range(runtime.rank, windows.num_windows, runtime.ranks)
    most_windows = -(-windows.num_windows // runtime.ranks)
    sums = torch.zeros(2, dtype=torch.float64)
    for first in range(0, most_windows, sequences_per_batch):
        if must_stop():
            raise EvaluationStopped
        chosen = own[first : first + sequences_per_batch]
        batch = objective.make_batch(windows.rows(chosen), sequences_per_batch)
        loss = loss_of(batch.to(runtime.device))
        sums += torch.stack([loss.nats.double(), loss.tokens.double()]).cpu()
    nats, tokens = runtime.sum(sums).tolist()
    return _evaluation(nats, int(tokens), windows.num_bytes)


def _evaluation(nats: float, tokens: int, num_bytes: int) -> Evaluation:
    mean = nats / max(1, tokens)
    perplexity = math.exp(mean) if mean < 700 else math.inf
    return Evaluation(mean, perplexity, nats / math.log(2) / max(1, num_bytes), tokens, num_bytes)
