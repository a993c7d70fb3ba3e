"""A tensor of a Hugging Face model, and the parameters of ours it is made of; the same row serves both ways.

Knows no class: the tables of rows stand beside it, one file for each kind of model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from llm_dist.config import Model
from llm_dist.model.attention import sinusoids

Shapes = Mapping[str, tuple[int, ...]]

SINUSOIDS = "(sinusoids)"
"""Stands where a table of theirs is computed by ours."""
ZEROS = "(zeros)"
"""Stands where theirs has a table of one row that ours does without."""
_COMPUTED = (SINUSOIDS, ZEROS)


class Row(NamedTuple):
    """A tensor of a Hugging Face model."""

    name: str
    sources: tuple[str, ...]
    """Parameters of ours, joined along their first axis."""
    transposed: bool = False
    """GPT-2 keeps [in, out] where others keep [out, in]."""
    trimmed: bool = False
    """Rows beyond the tokenizer's vocabulary are padding and stay here."""
    rows_in_front: int = 0
    """Rows of theirs that ours does without, before the first of ours."""

    @property
    def is_computed(self) -> bool:
        """Whether no parameter of ours stands behind it."""
        return self.sources[0] in _COMPUTED

    def shape(self, shapes: Shapes, model: Model, vocabulary_tokens: int) -> tuple[int, ...]:
        """Shape of their tensor, given the shapes of ours."""
        if self.is_computed:
            rows = model.max_sequence_tokens if self.sources == (SINUSOIDS,) else 1
            return rows + self.rows_in_front, model.d_model
        rows = self.rows_in_front + sum(shapes[source][0] for source in self.sources)
        shape = (vocabulary_tokens if self.trimmed else rows, *shapes[self.sources[0]][1:])
        return shape[::-1] if self.transposed else shape

    def value(self, weights: Mapping[str, Tensor], model: Model, vocabulary_tokens: int) -> Tensor:
        """Their tensor, made of ours; may share memory with it."""
        whole = self._joined(weights, model)
        whole = whole[:vocabulary_tokens] if self.trimmed else whole
        if self.rows_in_front:
            whole = torch.cat((whole.new_zeros(self.rows_in_front, *whole.shape[1:]), whole))
        return whole.t() if self.transposed else whole

    def _joined(self, weights: Mapping[str, Tensor], model: Model) -> Tensor:
        if self.sources == (SINUSOIDS,):
            return sinusoids(torch.arange(model.max_sequence_tokens)[None], model.d_model)[0]
        if self.sources == (ZEROS,):
            return torch.zeros(1, model.d_model)
        parts = [weights[source] for source in self.sources]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def part(self, theirs: Tensor, source: str, shapes: Shapes) -> Tensor:
        """The parameter `source` of ours out of their tensor; padding that theirs lacks is zero."""
        whole = (theirs.t() if self.transposed else theirs)[self.rows_in_front :]
        first = sum(shapes[before][0] for before in self.sources[: self.sources.index(source)])
        mine = whole[first : first + shapes[source][0]]
        if mine.shape[0] < shapes[source][0]:
            mine = torch.cat((mine, mine.new_zeros(shapes[source][0] - mine.shape[0], *mine.shape[1:])))
        return mine.contiguous()


def linear_rows(theirs: str, *ours: str, has_bias: bool, transposed: bool = False) -> Iterator[Row]:
    """Rows of a matrix product or a norm, and of its bias."""
    yield Row(f"{theirs}.weight", tuple(f"{name}.weight" for name in ours), transposed=transposed)
    if has_bias:
        yield Row(f"{theirs}.bias", tuple(f"{name}.bias" for name in ours))
