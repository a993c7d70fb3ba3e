"""Causal language modelling: predict each token from those before it."""

from __future__ import annotations

import torch
from torch import Tensor

from llm_dist.batch import NOT_SCORED, Batch, LossSum
from llm_dist.model.transformer import Transformer
from llm_dist.objectives.objective import Unscored
from llm_dist.rows import NOT_LABELLED, Rows


class Causal(Unscored):
    """Predict each token from those before it; where inputs are labelled, only those that a label marks."""

    scores_text = has_perplexity = True

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
        if rows.targets is not None:  # what follows a position has its target one further, and the last has none
            is_marked = torch.zeros(num_present, sequence_tokens, dtype=torch.bool)
            is_marked[:, :-1] = torch.from_numpy(rows.targets[:, 1:] != NOT_LABELLED)
            labels[:num_present][~is_marked] = NOT_SCORED
        if rows.num_context is not None:
            is_context = torch.arange(sequence_tokens) < torch.from_numpy(rows.num_context)[:, None]
            labels[:num_present][is_context] = NOT_SCORED
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


def positions_in_documents(document_ids: Tensor) -> Tensor:
    """Position of each token inside its document, int64 [B, T], from document ids [B, T]."""
    index = torch.arange(document_ids.shape[1]).expand_as(document_ids)
    opens = torch.ones_like(document_ids, dtype=torch.bool)
    opens[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return index - torch.where(opens, index, 0).cummax(dim=1).values
