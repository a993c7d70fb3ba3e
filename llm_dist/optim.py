"""Which parameter is updated how, and the learning rate of a step.

The rate is a pure function of (run file, step): there is no scheduler object to save.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from llm_dist import config

NEVER_DECAYED = ("embedding.", "positions.", "segments.")
_BELOW_BLOCKS = (*NEVER_DECAYED, "embedding_norm.")
_BLOCK = re.compile(r"(?:^|\.)blocks\.(\d+)\.")


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], weight_decay: float, layer_lr_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Groups that are updated alike; matrices decay, norms, biases and embeddings do not. Empty groups are left out.

    The rate of a block is `layer_lr_decay` times that of the block above it; heads have the whole rate, embeddings less
    than the lowest block (ULMFiT, arXiv 1801.06146, section 3.2). Parameters without a gradient are in no group.
    """
    learning = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    num_blocks = max((int(block[1]) + 1 for name, _ in learning if (block := _BLOCK.search(name))), default=0)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in learning:
        is_matrix = parameter.ndim >= 2 and not any(part in name for part in NEVER_DECAYED)
        scale = layer_lr_decay ** (num_blocks + 1 - _depth(name, num_blocks))
        groups.setdefault((scale, weight_decay if is_matrix else 0.0), []).append(parameter)
    by_rate = sorted(groups.items(), key=lambda group: group[0], reverse=True)
    return [{"params": params, "weight_decay": decay, "lr_scale": scale} for (scale, decay), params in by_rate]


def _depth(name: str, num_blocks: int) -> int:
    """0 below the blocks, then the blocks, then what is above them."""
    if block := _BLOCK.search(name):
        return int(block[1]) + 1
    return 0 if any(part in name for part in _BELOW_BLOCKS) else num_blocks + 1


def build(named: Iterable[tuple[str, nn.Parameter]], optim: config.Optim) -> torch.optim.Optimizer:
    """The optimizer of `optim` over the named parameters."""
    groups = parameter_groups(named, optim.weight_decay, optim.layer_lr_decay)
    if optim.name == "sgd":
        return torch.optim.SGD(groups, lr=optim.lr)
    return torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Write the step's rate into every group; a group scales it by its own `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def learning_rate(run: config.Config, step: int) -> float:
    """Rate of the update that turns `step` finished steps into `step + 1`.

    Past the end of the schedule the rate stays at its last value.
    """
    optim, total = run.optim, run.schedule_steps
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    span = max(1, total - optim.warmup_steps)
    progress = min(1.0, (step - optim.warmup_steps) / span)
    return optim.lr * _shape(optim, progress)


def _shape(optim: config.Optim, progress: float) -> float:
    final = optim.final_lr_fraction
    match optim.schedule:
        case "constant":
            return 1.0
        case "linear":
            return 1.0 - (1.0 - final) * progress
        case "cosine":
            return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress))
        case "wsd":
            into_decay = max(0.0, progress - (1.0 - optim.decay_fraction)) / optim.decay_fraction
            return 1.0 - (1.0 - final) * into_decay
