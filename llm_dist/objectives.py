"""What is learnt: an objective turns rows of tokens into a batch and a batch into a loss.

It owns both ends, what is hidden and what is scored, so a new objective is one class with these two methods.
Model and objective meet in `Trainee.forward`, so that an engine which shards parameters gathers them where the
loss is computed.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from llm_dist import config
from llm_dist.batch import NOT_SCORED, Batch, LossSum
from llm_dist.model.transformer import Transformer
from llm_dist.rows import Rows


class Objective(Protocol):
    """The two ends of learning."""

    def make_batch(self, rows: Rows, num_rows: int) -> Batch:
        """Batch of exactly `num_rows` rows; those beyond `rows` are absent and weigh nothing."""

    def loss(self, model: Transformer, batch: Batch) -> LossSum:
        """Loss of the batch, summed over its scored positions."""


class Causal:
    """Predict each token from those before it."""

    def __init__(self, z_loss: float = 0.0) -> None:
        self.z_loss = z_loss

    def make_batch(self, rows: Rows, num_rows: int) -> Batch:
        """Labels are what follows each input; absent rows repeat token 0, and they and padding are not scored."""
        num_present, sequence_tokens = rows.inputs.shape
        input_ids = torch.zeros(num_rows, sequence_tokens, dtype=torch.int64)
        labels = torch.full((num_rows, sequence_tokens), NOT_SCORED, dtype=torch.int64)
        input_ids[:num_present] = torch.from_numpy(rows.inputs)
        labels[:num_present] = torch.from_numpy(rows.following)
        if rows.num_scored is not None:
            is_padding = torch.arange(sequence_tokens) >= torch.from_numpy(rows.num_scored)[:, None]
            labels[:num_present][is_padding] = NOT_SCORED
        if rows.document_ids is None:
            return Batch(input_ids, labels)
        documents = torch.zeros(num_rows, sequence_tokens, dtype=torch.int64)
        documents[:num_present] = torch.from_numpy(rows.document_ids)
        return Batch(input_ids, labels, documents, positions_in_documents(documents))

    def loss(self, model: Transformer, batch: Batch) -> LossSum:
        """Cross-entropy of the next token."""
        hidden = model(batch.input_ids, batch.positions, batch.document_ids)
        result: LossSum = model.language(hidden, batch.labels, self.z_loss)
        return result


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


def build(objective: config.Objective) -> Objective:
    """The objective a run file names."""
    return Causal(objective.z_loss)


def positions_in_documents(document_ids: Tensor) -> Tensor:
    """Position of each token inside its document, int64 [B, T], from document ids [B, T]."""
    index = torch.arange(document_ids.shape[1]).expand_as(document_ids)
    opens = torch.ones_like(document_ids, dtype=torch.bool)
    opens[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return index - torch.where(opens, index, 0).cummax(dim=1).values
