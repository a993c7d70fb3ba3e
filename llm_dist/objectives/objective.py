"""What is learnt: an objective turns rows of tokens into a batch, a batch into a loss, and losses into a score.

It owns both ends, what is hidden and what is scored, so a new objective is one class with these methods.
Model and objective meet in `Trainee.forward`, so that an engine which shards parameters gathers them where the
loss is computed.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from llm_dist.batch import Batch, LossSum
from llm_dist.model.transformer import Transformer
from llm_dist.rows import Rows


class Objective(Protocol):
    """The ends of learning."""

    scores_text: bool
    """Whether every token of a text is scored once, so that the loss is one of the text: bits per byte."""
    has_perplexity: bool
    """Whether tokens are predicted from all that stands before them."""
    num_counts: int
    """How many numbers `count` gives."""

    def make_batch(self, rows: Rows, num_rows: int) -> Batch:
        """Batch of exactly `num_rows` rows; those beyond `rows` are absent and weigh nothing."""

    def loss(self, model: Transformer, batch: Batch) -> LossSum:
        """Loss of the batch, summed over its scored positions."""

    def count(self, batch: Batch, loss: LossSum) -> Tensor:
        """fp64 [num_counts]: what `scores` needs of an evaluated batch, to be added over batches and ranks."""

    def scores(self, counts: Tensor) -> dict[str, float]:
        """How good the predictions are, by name; more is better. `counts` [num_counts] are summed over all batches."""


class Unscored:
    """Part of objectives that are judged by their loss alone."""

    num_counts = 0

    def count(self, batch: Batch, loss: LossSum) -> Tensor:
        """Nothing."""
        return torch.zeros(0, dtype=torch.float64)

    def scores(self, counts: Tensor) -> dict[str, float]:
        """Nothing."""
        return {}


class Trainee(nn.Module):
    """Model and objective as one module: what an engine trains."""

    def __init__(self, model: Transformer, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    @property
    def blocks(self) -> nn.ModuleList:
        """The repeated layers, which an engine may shard, compile or recompute one by one."""
        return self.model.blocks

    def forward(self, batch: Batch) -> LossSum:
        """Loss of one micro-batch."""
        return self.objective.loss(self.model, batch)


def share(right: Tensor, all_of_them: Tensor) -> float:
    """`right` / `all_of_them`; 0 where there are none."""
    return float(right / all_of_them) if all_of_them else 0.0
