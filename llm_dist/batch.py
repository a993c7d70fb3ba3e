"""What travels between data, objective, model and engine: tensors with stated shapes and nothing else.

Letters used everywhere: B batch, T sequence, D model width, H heads, K key/value heads, E head width,
F feed-forward width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

NOT_SCORED = -100
"""Label of a position that carries no loss."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank."""

    input_ids: Tensor
    """int64 [B, T]."""
    labels: Tensor
    """int64 [B, T], or [B, S] where `scored` is given; `NOT_SCORED` where nothing is predicted."""
    document_ids: Tensor | None = None
    """int64 [B, T]; attention stays among equal ids of a row. None: the whole row is one document."""
    positions: Tensor | None = None
    """int64 [B, T]; position inside the document. None: 0..T-1."""
    segment_ids: Tensor | None = None
    """int64 [B, T]; which of two texts a token belongs to. None: all of them to the first."""
    scored: Tensor | None = None
    """int64 [B, S]; the positions that `labels` belong to. None: every position has a label."""
    pair_labels: Tensor | None = None
    """int64 [B]; whether a row's two texts belong together; `NOT_SCORED` where there is no row."""

    def to(self, device: torch.device) -> Batch:
        """Copy to `device`, asynchronously where the host memory is pinned."""
        moved = {
            field.name: value.to(device, non_blocking=True)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **moved)

    def num_valid(self) -> int:
        """How many positions carry loss."""
        return int((self.labels != NOT_SCORED).sum())


class LossSum(NamedTuple):
    """A loss as sums, so that it can be added over micro-batches and ranks before it is divided once."""

    nats: Tensor
    """fp32 scalar: negative log-likelihood summed over the scored positions."""
    tokens: Tensor
    """int64 scalar: how many positions were scored."""
    penalty: Tensor
    """fp32 scalar: what is added to the nats for the gradient only (z-loss, the loss of pairs)."""
    predicted: Tensor | None = None
    """int64, shaped as the labels: the likeliest of each; None where gradients are computed."""
    predicted_pairs: Tensor | None = None
    """int64 [B]: the likelier verdict on each pair; None where there are no pairs."""

    @property
    def total(self) -> Tensor:
        """What the gradient is taken of."""
        return self.nats + self.penalty
