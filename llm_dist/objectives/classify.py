"""Classification of whole texts, or pairs of them: sentiment, topic, entailment."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from llm_dist.batch import NOT_SCORED, Batch, LossSum
from llm_dist.model.transformer import Transformer
from llm_dist.objectives.labelled import Labelled
from llm_dist.objectives.masked import at, filled
from llm_dist.rows import Rows


class Classify(Labelled):
    """One label per text: from the first position of an encoder, from the last token of a decoder."""

    def make_batch(self, rows: Rows, num_rows: int) -> Batch:
        """Absent rows are padding without a label."""
        assert rows.targets is not None
        batch, num_tokens = self.unlabelled(rows, num_rows)
        place = num_tokens - 1 if self._is_causal else torch.zeros_like(num_tokens)
        labels = filled(rows.targets.astype(np.int64), num_rows, NOT_SCORED)[:, None]
        return replace(batch, labels=labels, scored=place[:, None])

    def loss(self, model: Transformer, batch: Batch) -> LossSum:
        """Cross-entropy of the labels."""
        assert batch.scored is not None and model.class_head is not None
        hidden = at(model(batch.input_ids, None, batch.document_ids, segment_ids=batch.segment_ids), batch.scored)
        pooled = hidden if model.pooler is None else model.pooler(hidden)
        result: LossSum = model.class_head(pooled, batch.labels, self.weights_on(hidden.device))
        return result
