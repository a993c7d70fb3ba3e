"""What classifying texts and tagging words have in common: rows [cls] text [sep] (text [sep]), and classes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from llm_dist import config
from llm_dist.batch import Batch, LossSum
from llm_dist.model.transformer import Transformer
from llm_dist.objectives.confusion import confusion, scores_of
from llm_dist.objectives.masked import filled
from llm_dist.rows import Rows
from llm_dist.tokenizer import SEP, Tokenizer

TRIMMED_TO = 16
"""A batch is as long as its longest row, rounded up to a multiple of this: few shapes, little padding."""


class Labelled(ABC):
    """Part of objectives that learn classes from labels that people gave."""

    scores_text = has_perplexity = False

    def __init__(self, run: config.Config, tokenizer: Tokenizer, weights: Sequence[float] | None) -> None:
        self._is_causal, self._pad_id = run.model.is_causal, tokenizer.pad_id
        self._sep_id, self._has_segments = tokenizer.special_ids[SEP], run.model.segments > 1
        self.labels = list(run.data.labels)
        self.num_counts = len(self.labels) ** 2
        self._weights = None if weights is None else torch.tensor(weights, dtype=torch.float32)

    @abstractmethod
    def make_batch(self, rows: Rows, num_rows: int) -> Batch:
        """Batch of exactly `num_rows` rows; those beyond `rows` are absent and weigh nothing."""

    @abstractmethod
    def hidden(self, model: Transformer, batch: Batch) -> Tensor:
        """Hidden states of the positions that `batch.labels` [B, S] belong to: [B, S, D]."""

    def loss(self, model: Transformer, batch: Batch) -> LossSum:
        """Cross-entropy of the labels."""
        assert model.class_head is not None
        hidden = self.hidden(model, batch)
        result: LossSum = model.class_head(hidden, batch.labels, self.weights_on(hidden.device))
        return result

    def weights_on(self, device: torch.device) -> Tensor | None:
        """What multiplies the loss of each label."""
        return None if self._weights is None else self._weights.to(device)

    def count(self, batch: Batch, loss: LossSum) -> Tensor:
        """How often each label was taken for each: [labels^2], by true label, then predicted one."""
        assert loss.predicted is not None
        return confusion(batch.labels, loss.predicted, len(self.labels))

    def scores(self, counts: Tensor) -> dict[str, float]:
        """Accuracy, and F1 as the mean over labels."""
        return scores_of(counts.view(len(self.labels), -1).numpy())

    def unlabelled(self, rows: Rows, num_rows: int) -> tuple[Batch, Tensor]:
        """The rows, without labels, and their lengths [num_rows]."""
        num_tokens = rows.scored_tokens().astype(np.int64)
        length = trimmed_tokens(rows)
        ids = np.where(np.arange(length) < num_tokens[:, None], rows.inputs[:, :length], self._pad_id)
        documents = (np.arange(length) >= num_tokens[:, None]).astype(np.int64)
        batch = Batch(filled(ids, num_rows, self._pad_id), torch.empty(0), filled(documents, num_rows, 0))
        if self._has_segments:  # the second text begins behind the first [sep]
            behind = np.cumsum(ids == self._sep_id, axis=1) - (ids == self._sep_id)
            segments = np.minimum(behind, 1) * (1 - documents)
            batch = replace(batch, segment_ids=filled(segments, num_rows, 0))
        return batch, filled(num_tokens, num_rows, 1)


def trimmed_tokens(rows: Rows) -> int:
    """Length of a batch of the rows."""
    longest = int(rows.scored_tokens().max(initial=1))
    return min(int(rows.inputs.shape[1]), -(-longest // TRIMMED_TO) * TRIMMED_TO)
