"""Tagging of words: named entities, parts of speech."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from llm_dist import config
from llm_dist.batch import NOT_SCORED, Batch, LossSum
from llm_dist.model.transformer import Transformer
from llm_dist.objectives.entities import OUTSIDE, Found, count_found
from llm_dist.objectives.labelled import Labelled
from llm_dist.objectives.masked import filled
from llm_dist.rows import Rows
from llm_dist.tokenizer import Tokenizer


class Tag(Labelled):
    """One label per word, at its first token; entities, where labels are O and B-, I-, E-, S- names."""

    def __init__(self, run: config.Config, tokenizer: Tokenizer, weights: Sequence[float] | None) -> None:
        super().__init__(run, tokenizer, weights)
        self.has_entities = OUTSIDE in self.labels
        self.num_counts += len(Found._fields)

    def count(self, batch: Batch, loss: LossSum) -> Tensor:
        """How often each label was taken for each; entities found rightly, found, and there."""
        assert loss.predicted is not None
        found = count_found(self._sentences(batch.labels, loss.predicted) if self.has_entities else [])
        return torch.cat([super().count(batch, loss).cpu(), torch.tensor(found, dtype=torch.float64)])

    def scores(self, counts: Tensor) -> dict[str, float]:
        """Accuracy and mean F1 of the words' labels, and F1 of the entities."""
        right, found, there = counts[-len(Found._fields) :].tolist()
        f1 = 2 * right / (found + there) if found + there else 0.0
        return {**super().scores(counts[: -len(Found._fields)]), "f1": f1}

    def _sentences(self, labels: Tensor, predicted: Tensor) -> Iterator[tuple[list[str], list[str]]]:
        """True and predicted tags of each row."""
        for true, guessed in zip(labels.cpu(), predicted.cpu(), strict=True):
            is_word = true != NOT_SCORED
            yield self._names(true[is_word]), self._names(guessed[is_word])

    def _names(self, ids: Tensor) -> list[str]:
        return [self.labels[id_] for id_ in ids.tolist()]

    def make_batch(self, rows: Rows, num_rows: int) -> Batch:
        """Absent rows are padding without labels."""
        assert rows.targets is not None
        batch, _ = self.unlabelled(rows, num_rows)
        targets = rows.targets[:, : batch.input_ids.size(1)].astype(np.int64)
        return replace(batch, labels=filled(targets, num_rows, NOT_SCORED))

    def hidden(self, model: Transformer, batch: Batch) -> Tensor:
        """Of every position: [B, T, D]."""
        states: Tensor = model(batch.input_ids, None, batch.document_ids, segment_ids=batch.segment_ids)
        return states
