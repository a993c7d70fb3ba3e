"""Which tokens of a row are hidden, and what stands in their place: a pure function of (seed, step, row).

Whole units are hidden, drawn in random order until the share is reached: a unit is a token, a word, or a span of words
whose number is geometric (SpanBERT, arXiv 1907.10529). Of the hidden tokens most become the mask, some another token,
and some stay (BERT, arXiv 1810.04805). Knows no torch.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from llm_dist import config
from llm_dist.draws import fractions, keys
from llm_dist.errors import UserError
from llm_dist.tokenizer import MASK, Tokenizer
from llm_dist.tokenizer_words import Words

Ids = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

_ORDER, _SPAN, _FATE, _OTHER = 11, 12, 13, 14
"""What a key is for; part of what a run computes, so these never change."""


class Hidden(NamedTuple):
    """Rows with some of their tokens hidden, and which those were."""

    inputs: Ids
    """[n, T]."""
    places: Ids
    """[n, S]: positions of the hidden tokens, rising; behind the last of a row, 0."""
    tokens: Ids
    """[n, S]: the hidden tokens; behind the last of a row, -1."""


class Hiding:
    """The rule of a run file."""

    def __init__(self, objective: config.Objective, tokenizer: Tokenizer, seed: int, text_tokens: int) -> None:
        """Rows have at most `text_tokens` tokens of text each."""
        self._objective, self._seed = objective, seed
        self.most_hidden = most_hidden(objective, text_tokens)
        """S, of every batch alike."""
        if MASK not in tokenizer.special_ids:
            raise UserError(f"{tokenizer.folder}: the tokenizer has no mask token, which hides tokens; choose another")
        self._mask_id = tokenizer.special_ids[MASK]
        self._is_special = np.zeros(tokenizer.vocabulary_tokens, np.bool_)
        self._is_special[list(tokenizer.special_ids.values())] = True
        self._ordinary = np.flatnonzero(~self._is_special)
        self._words = Words(tokenizer) if objective.mask_unit != "token" else None

    def hide(self, ids: Ids, is_text: Flags, step: int, numbers: Ids) -> Hidden:
        """Hide tokens among those of `ids` [n, T] that are text; the rows' indices in their step are `numbers` [n]."""
        may_hide = is_text & ~self._is_special[ids]
        units = self._units(ids, may_hide, step, numbers)
        places = np.zeros((len(ids), self.most_hidden), np.int64)
        tokens = np.full((len(ids), self.most_hidden), -1, np.int64)
        inputs = ids.copy()
        for row, number in enumerate(numbers.tolist()):
            candidates = np.flatnonzero(may_hide[row])
            chosen = self._chosen(candidates, units[row, candidates], step, number)
            places[row, : len(chosen)], tokens[row, : len(chosen)] = chosen, ids[row, chosen]
            inputs[row, chosen] = self._replaced(ids[row, chosen], chosen, step, number)
        return Hidden(inputs, places, tokens)

    def _chosen(self, candidates: Ids, units: Ids, step: int, number: int) -> Ids:
        """The positions to hide, rising, given the unit of each candidate: whole units while there is room."""
        if not len(candidates):
            return candidates
        wanted = min(self.most_hidden, max(1, round(self._objective.mask_fraction * len(candidates))))
        drawn = keys(self._seed, _ORDER, step, number, units.astype(np.uint64))
        order = np.lexsort((candidates, drawn))
        if self._words is None:
            return np.sort(candidates[order[:wanted]])
        borders = np.flatnonzero(np.diff(drawn[order])) + 1
        taken: list[Ids] = []
        left = wanted
        for unit in np.split(order, borders):
            if len(unit) <= left:
                taken.append(unit)
                left -= len(unit)
            if not left:
                break
        if not taken:  # the first unit alone is more than may be hidden
            taken = [order[:wanted]]
        return np.sort(candidates[np.concatenate(taken)])

    def _units(self, ids: Ids, may_hide: Flags, step: int, numbers: Ids) -> Ids:
        """Number of the unit that each token belongs to: [n, T]."""
        if self._words is None:
            return np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
        begins = self._words.begin(ids)
        begins[:, 1:] |= may_hide[:, 1:] != may_hide[:, :-1]
        if self._objective.mask_unit == "span":
            rows, places = np.meshgrid(numbers, np.arange(ids.shape[1]), indexing="ij")
            drawn = keys(self._seed, _SPAN, step, rows.ravel().astype(np.uint64), places.ravel().astype(np.uint64))
            begins &= fractions(drawn).reshape(ids.shape) < 1.0 / self._objective.span_words
            begins[:, 1:] |= may_hide[:, 1:] != may_hide[:, :-1]
        return np.cumsum(begins, axis=1)

    def _replaced(self, tokens: Ids, places: Ids, step: int, number: int) -> Ids:
        """What stands for the hidden `tokens` [k] at `places` [k]."""
        if not len(tokens):
            return tokens
        where = places.astype(np.uint64)
        fate = fractions(keys(self._seed, _FATE, step, number, where))
        other = self._ordinary[keys(self._seed, _OTHER, step, number, where) % np.uint64(len(self._ordinary))]
        is_mask = fate < self._objective.mask_token_fraction
        is_other = fate < self._objective.mask_token_fraction + self._objective.random_token_fraction
        return np.where(is_mask, self._mask_id, np.where(is_other, other, tokens))


def most_hidden(objective: config.Objective, text_tokens: int) -> int:
    """Most tokens that are hidden in a row of `text_tokens` tokens of text."""
    return max(1, round(objective.mask_fraction * text_tokens))
