"""Classification of whole texts, or pairs of them: sentiment, topic, entailment."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from llm_dist.batch import NOT_SCORED, Batch
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

    def hidden(self, model: Transformer, batch: Batch) -> Tensor:
        """Of the one position that stands for each row: [B, 1, D]."""
        assert batch.scored is not None
        states = at(model(batch.input_ids, None, batch.document_ids, segment_ids=batch.segment_ids), batch.scored)
        pooled: Tensor = states if model.pooler is None else model.pooler(states)
        return pooled
