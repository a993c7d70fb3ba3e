"""The [lora] section: low-rank updates of some layers instead of new weights of all."""

from __future__ import annotations

from llm_dist.config_fields import Section, from_now, identity

ADAPTER = ".adapter."
"""In the names of an adapter's parameters, behind that of its layer."""
NEW_HEADS = ("pooler.", "pair_head.", "class_head.")
"""Heads that a task brings with it: they are trained beside the adapters."""


class Lora(Section):
    """Low-rank updates of chosen linear layers (arXiv 2106.09685); all else stays as `init.from` gives it."""

    rank: int | None = identity(None, ge=1)
    """Rank r of each update: a layer's weight W acts as W + alpha / r * up down; absent: all weights are trained."""
    alpha: float = identity(16.0, gt=0)
    """Scale of the updates, divided by the rank."""
    targets: list[str] = identity(["*.attention.query", "*.attention.value"], min_length=1)
    """Patterns of the names of layers in blocks, as in `["blocks.*.attention.*", "blocks.11.feed_forward.*"]`."""
    dropout: float = from_now(0.0, ge=0, lt=1)
    """Share of an update's inputs that are left out at random in training."""

    @property
    def scale(self) -> float:
        """Factor of the updates."""
        assert self.rank is not None
        return self.alpha / self.rank
