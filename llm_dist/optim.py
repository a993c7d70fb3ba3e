"""Which parameter is updated how, and the learning rate of a step.

The rate is a pure function of (run file, step): there is no scheduler object to save.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from llm_dist import config

NEVER_DECAYED = ("embedding.", "positions.", "segments.")


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices decay; norms, biases and embeddings do not. Empty groups are left out."""
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in named:
        is_matrix = parameter.ndim >= 2 and not any(part in name for part in NEVER_DECAYED)
        (decayed if is_matrix else kept).append(parameter)
    groups = [(decayed, weight_decay), (kept, 0.0)]
    return [{"params": params, "weight_decay": decay, "lr_scale": 1.0} for params, decay in groups if params]


def build(named: Iterable[tuple[str, nn.Parameter]], optim: config.Optim) -> torch.optim.Optimizer:
    """The optimizer of `optim` over the named parameters."""
    groups = parameter_groups(named, optim.weight_decay)
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
