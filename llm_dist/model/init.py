"""First weights: one table of which parameter starts how, and values that depend on seed and name alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from llm_dist import config

TABLE: tuple[tuple[str, str], ...] = (
    ("*.adapter.up", "zeros"),
    ("*.adapter.down", "normal"),
    ("*norm.weight", "ones"),
    ("*.bias", "zeros"),
    ("blocks.*.attention.output.weight", "residual"),
    ("blocks.*.feed_forward.down.weight", "residual"),
    ("*.weight", "normal"),
)
"""The first pattern that fits a parameter's name says how it starts. residual: normal, scaled by 1/sqrt(2 layers), so
that the sum over all blocks starts with the variance of one (GPT-2)."""


def rule_of(name: str) -> str:
    """How the parameter of this name starts."""
    for pattern, rule in TABLE:
        if fnmatchcase(name, pattern):
            return rule
    raise AssertionError(f"no first value is known for parameter {name}")


def initial_value(name: str, shape: Sequence[int], model: config.Model, std: float, seed: int) -> Tensor:
    """First value of a parameter, fp32 on the CPU: the same for every engine, rank and order of asking."""
    rule = rule_of(name)
    if rule == "ones":
        return torch.ones(*shape)
    if rule == "zeros":
        return torch.zeros(*shape)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    scale = std if rule == "normal" else std / (2 * model.layers) ** 0.5
    return torch.empty(*shape).normal_(0.0, scale, generator=generator)


@torch.no_grad()
def initialize(module: nn.Module, model: config.Model, std: float, seed: int) -> None:
    """Fill every parameter of a `Transformer` in place; parameters must be whole, not sharded."""
    for name, parameter in module.named_parameters():
        parameter.copy_(initial_value(name, parameter.shape, model, std, seed))
