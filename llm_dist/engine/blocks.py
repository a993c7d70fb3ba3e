"""What is done to a model's repeated blocks from outside: recompute in the backward pass, compile."""

from __future__ import annotations

import functools
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from llm_dist import config
from llm_dist.errors import UserError

KEPT_OPERATORS = frozenset(
    {
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten.bmm.default,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    }
)
"""Selective recompute keeps what is expensive to compute and recomputes the rest (arXiv 2205.05198)."""


COMPILER = "a C++ compiler (g++ on PATH, or CXX) and Python's headers (python3-dev)"


def of(trainee: nn.Module) -> nn.ModuleList:
    """The repeated blocks of a trainee."""
    blocks = trainee.blocks
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def prepare(blocks: nn.ModuleList, engine: config.Engine, has_dropout: bool, report: Callable[[str], None]) -> None:
    """Apply `engine.recompute` and `engine.compile` to each block, in place; parameter names do not change."""
    for block in blocks:
        if engine.recompute != "none":
            _recompute(block, selective=engine.recompute == "selective", has_dropout=has_dropout)
    if _should_compile(engine, report):
        for block in blocks:
            block.compile()


def has_compiler(device_type: str) -> bool:
    """Whether torch.compile can build code here: the C++ compiler it calls, Python's headers, Triton for a GPU."""
    default = "clang++" if sys.platform == "darwin" else "g++"
    has_headers = Path(sysconfig.get_path("include"), "Python.h").is_file()
    if not has_headers or shutil.which(os.environ.get("CXX", default)) is None:
        return False
    if device_type == "cpu":
        return True
    from torch.utils._triton import has_triton

    return bool(has_triton())


def _recompute(block: nn.Module, selective: bool, has_dropout: bool) -> None:
    extra: dict[str, Any] = {}
    if selective:
        extra["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _keep_expensive)
    block.forward = functools.partial(
        checkpoint, block.forward, use_reentrant=False, preserve_rng_state=has_dropout, **extra
    )


def _keep_expensive(_context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in KEPT_OPERATORS else CheckpointPolicy.PREFER_RECOMPUTE


def _should_compile(engine: config.Engine, report: Callable[[str], None]) -> bool:
    if engine.compile == "off":
        return False
    if engine.name == "zero" and engine.zero_stage == 3:
        report("engine.compile: off with ZeRO-3, whose parameter hooks break every graph")
        return False
    if has_compiler("cuda" if torch.cuda.is_available() else "cpu"):
        return True
    if engine.compile == "on":
        raise UserError(f"engine.compile=on needs {COMPILER}; install them, or set engine.compile=auto")
    report(f"engine.compile: off; it needs {COMPILER}")
    return False
