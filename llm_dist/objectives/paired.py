"""Masked language modelling of two texts, and whether they belong together.

next sentence  the second text goes on where the first ends, or comes from another document (BERT, arXiv 1810.04805)
order          the second text goes on where the first ends, or the two have changed places (ALBERT, arXiv 1909.11942)

A text is any segment of a document: it is cut where (seed, step, row) says, so no sentences need to be found.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from llm_dist import config
from llm_dist.batch import NOT_SCORED, Batch, LossSum
from llm_dist.draws import fractions, keys
from llm_dist.model.transformer import Transformer
from llm_dist.objectives.hiding import Ids, most_hidden
from llm_dist.objectives.masked import Framed, Masked, at, filled
from llm_dist.objectives.objective import share
from llm_dist.rows import Rows, TokenArray
from llm_dist.tokenizer import Tokenizer

TOGETHER, APART = 0, 1
"""Labels of a pair, as Hugging Face numbers them."""
_CUT, _PARTNER_CUT, _VERDICT = 21, 22, 23
"""What a key is for; part of what a run computes, so these never change."""


class _Pair(NamedTuple):
    first: Ids
    second: Ids
    label: int


class Paired(Masked):
    """Predict the hidden tokens of [cls] text [sep] text [sep], and from [cls] whether the texts belong together."""

    num_counts = 4

    def __init__(self, run: config.Config, tokenizer: Tokenizer) -> None:
        super().__init__(run, tokenizer)
        self._seed = run.run.seed
        self._is_order = run.objective.name == "masked_sop"
        self._separator_id = tokenizer.separator_id
        self._weight = run.objective.pair_weight * most_hidden(run.objective, run.text_tokens)
        """A pair counts as much as the hidden tokens of a full row: the mean of both losses has the same weight."""

    def make_batch(self, rows: Rows, num_rows: int) -> Batch:
        """The texts of each row beside one another, some tokens hidden; absent rows are padding."""
        texts = [self._pair(rows, row, number) for row, number in enumerate(rows.numbers.tolist())]
        framed, segments = self._side_by_side(texts)
        hidden = self._hiding.hide(framed.ids, framed.is_text, rows.step, rows.numbers)
        return replace(
            self._batch(framed, hidden, num_rows),
            segment_ids=filled(segments, num_rows, 0),
            pair_labels=filled(np.array([text.label for text in texts], np.int64), num_rows, NOT_SCORED),
        )

    def loss(self, model: Transformer, batch: Batch) -> LossSum:
        """Cross-entropy of the hidden tokens; that of the verdicts on the pairs is added for the gradient."""
        hidden = model(batch.input_ids, batch.positions, batch.document_ids, segment_ids=batch.segment_ids)
        assert batch.scored is not None and batch.pair_labels is not None
        assert model.pair_head is not None and model.pooler is not None
        of_tokens: LossSum = model.language(at(hidden, batch.scored), batch.labels, self.z_loss)
        of_pairs: LossSum = model.pair_head(model.pooler(hidden[:, 0]), batch.pair_labels)
        return of_tokens._replace(
            penalty=of_tokens.penalty + self._weight * of_pairs.nats, predicted_pairs=of_pairs.predicted
        )

    def count(self, batch: Batch, loss: LossSum) -> Tensor:
        """Hidden tokens that were found, all of them; pairs that were judged rightly, all of them."""
        assert loss.predicted_pairs is not None and batch.pair_labels is not None
        right = (loss.predicted_pairs == batch.pair_labels).sum()
        pairs = torch.stack([right, (batch.pair_labels != NOT_SCORED).sum()]).double()
        return torch.cat([super().count(batch, loss), pairs])

    def scores(self, counts: Tensor) -> dict[str, float]:
        """Share of the hidden tokens that were found, and of the pairs that were judged rightly."""
        return {**super().scores(counts), "pair_accuracy": share(counts[2], counts[3])}

    def _pair(self, rows: Rows, row: int, number: int) -> _Pair:
        text = self._text(rows.inputs[row, : rows.scored_tokens()[row]])
        if len(text) < 2:
            return _Pair(text, text[:0], NOT_SCORED)
        cut = self._cut(_CUT, rows.step, number, len(text))
        first, second = text[:cut], text[cut:]
        if fractions(keys(self._seed, _VERDICT, rows.step, number))[0] < 0.5:
            return _Pair(first, second, TOGETHER)
        if self._is_order:
            return _Pair(second, first, APART)
        assert rows.partners is not None and rows.num_partner_tokens is not None, "the reading pairs its rows"
        other = self._text(rows.partners[row, : rows.num_partner_tokens[row]])
        if len(other) < 2:
            return _Pair(first, second, TOGETHER)
        # Cut inside, too, and as long as the true one where it can be: neither beginning nor length tells them apart.
        room = len(other) - len(second) if len(other) > len(second) else len(other) - 1
        start = self._cut(_PARTNER_CUT, rows.step, number, room + 1)
        return _Pair(first, other[start : start + len(second)], APART)

    def _text(self, tokens: TokenArray) -> Ids:
        """Without the separator that begins a document."""
        begins = len(tokens) > 0 and tokens[0] == self._separator_id
        return tokens[1 if begins else 0 :].astype(np.int64)

    def _cut(self, purpose: int, step: int, number: int, num_tokens: int) -> int:
        """Where a text of at least two tokens is cut: neither part is empty."""
        return 1 + int(keys(self._seed, purpose, step, number)[0] % np.uint64(num_tokens - 1))

    def _side_by_side(self, texts: list[_Pair]) -> tuple[Framed, Ids]:
        """[cls] first [sep] second [sep], and the segment of each token."""
        shape = len(texts), self._sequence_tokens
        ids, segments = np.full(shape, self._pad_id, np.int64), np.zeros(shape, np.int64)
        is_text, documents = np.zeros(shape, np.bool_), np.full(shape, self._sequence_tokens, np.int64)
        for row, (first, second, _) in enumerate(texts):
            middle = 1 + len(first)
            end = middle + 1 + len(second)
            ids[row, 0], ids[row, middle], ids[row, end] = self._cls_id, self._sep_id, self._sep_id
            ids[row, 1:middle], ids[row, middle + 1 : end] = first, second
            is_text[row, 1:middle] = is_text[row, middle + 1 : end] = True
            segments[row, middle + 1 : end + 1] = 1
            documents[row, : end + 1] = 0
        return Framed(ids, is_text, documents), segments
