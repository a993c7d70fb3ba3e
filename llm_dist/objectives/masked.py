"""Masked language modelling: predict hidden tokens from all that stands around them (BERT, arXiv 1810.04805)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from llm_dist import config
from llm_dist.batch import NOT_SCORED, Batch, LossSum
from llm_dist.model.transformer import Transformer
from llm_dist.objectives.causal import positions_in_documents
from llm_dist.objectives.hiding import Flags, Hidden, Hiding, Ids
from llm_dist.objectives.objective import share
from llm_dist.rows import Rows
from llm_dist.tokenizer import CLS, SEP, Tokenizer


class Framed(NamedTuple):
    """Texts between the tokens that frame them."""

    ids: Ids
    """[n, T]."""
    is_text: Flags
    """[n, T]: what may be hidden."""
    documents: Ids | None
    """[n, T]; None where every row is full and of one document."""


class Masked:
    """Predict the hidden tokens of [cls] text [sep]."""

    scores_text = has_perplexity = False
    num_counts = 2

    def __init__(self, run: config.Config, tokenizer: Tokenizer) -> None:
        self.z_loss = run.objective.z_loss
        self._sequence_tokens = run.data.sequence_tokens
        self._cls_id, self._sep_id = tokenizer.special_ids[CLS], tokenizer.special_ids[SEP]
        self._pad_id = tokenizer.pad_id
        self._hiding = Hiding(run.objective, tokenizer, run.run.seed, run.text_tokens)

    def make_batch(self, rows: Rows, num_rows: int) -> Batch:
        """Some tokens hidden, and which they were as labels; absent rows are padding."""
        framed = self._framed(rows)
        hidden = self._hiding.hide(framed.ids, framed.is_text, rows.step, rows.numbers)
        return self._batch(framed, hidden, num_rows)

    def loss(self, model: Transformer, batch: Batch) -> LossSum:
        """Cross-entropy of the hidden tokens."""
        hidden = model(batch.input_ids, batch.positions, batch.document_ids, segment_ids=batch.segment_ids)
        assert batch.scored is not None
        result: LossSum = model.language(at(hidden, batch.scored), batch.labels, self.z_loss)
        return result

    def count(self, batch: Batch, loss: LossSum) -> Tensor:
        """Hidden tokens that were found, and all of them."""
        assert loss.predicted is not None
        return torch.stack([(loss.predicted == batch.labels).sum(), loss.tokens]).double()

    def scores(self, counts: Tensor) -> dict[str, float]:
        """Share of the hidden tokens that were found."""
        return {"accuracy": share(counts[0], counts[1])}

    def _framed(self, rows: Rows) -> Framed:
        num_rows, text_tokens = rows.inputs.shape
        num_tokens = rows.scored_tokens().astype(np.int64)
        place = np.arange(self._sequence_tokens)
        ids = np.full((num_rows, self._sequence_tokens), self._pad_id, np.int64)
        ids[:, 0] = self._cls_id
        ids[:, 1 : text_tokens + 1] = rows.inputs
        ids[place > num_tokens[:, None]] = self._pad_id
        ids[np.arange(num_rows), num_tokens + 1] = self._sep_id
        is_text = (place > 0) & (place <= num_tokens[:, None])
        return Framed(ids, is_text, self._documents(rows, num_tokens))

    def _documents(self, rows: Rows, num_tokens: Ids) -> Ids | None:
        """The frame belongs to the documents beside it; padding is a document of its own."""
        if rows.document_ids is None and rows.num_scored is None:
            return None
        text_tokens = rows.inputs.shape[1]
        documents = np.zeros((rows.num_rows, self._sequence_tokens), np.int64)
        if rows.document_ids is not None and rows.num_rows:
            documents[:, 1 : text_tokens + 1] = rows.document_ids
            documents[:, 0] = documents[:, 1]
            last = np.maximum(num_tokens, 1)
            documents[np.arange(rows.num_rows), num_tokens + 1] = documents[np.arange(rows.num_rows), last]
        is_padding = np.arange(self._sequence_tokens) > num_tokens[:, None] + 1
        return np.where(is_padding, self._sequence_tokens, documents)

    def _batch(self, framed: Framed, hidden: Hidden, num_rows: int) -> Batch:
        labels = np.where(hidden.tokens >= 0, hidden.tokens, NOT_SCORED)
        documents = None if framed.documents is None else filled(framed.documents, num_rows, 0)
        return Batch(
            filled(hidden.inputs, num_rows, self._pad_id),
            filled(labels, num_rows, NOT_SCORED),
            documents,
            None if documents is None else positions_in_documents(documents),
            scored=filled(hidden.places, num_rows, 0),
        )


def filled(values: Ids, num_rows: int, absent: int) -> Tensor:
    """`values` [n, ...] as int64 with `num_rows` rows, the missing ones being `absent` throughout."""
    whole = torch.full((num_rows, *values.shape[1:]), absent, dtype=torch.int64)
    whole[: len(values)] = torch.from_numpy(np.ascontiguousarray(values))
    return whole


def at(hidden: Tensor, positions: Tensor) -> Tensor:
    """Hidden states [B, T, D] at positions int64 [B, S]: [B, S, D]."""
    return hidden.gather(1, positions[..., None].expand(-1, -1, hidden.size(-1)))
