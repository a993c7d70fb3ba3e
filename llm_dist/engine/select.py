"""The engine a run file names, ready to train."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from llm_dist import config
from llm_dist.engine import blocks
from llm_dist.engine.engine import Engine, FillParameter
from llm_dist.errors import UserError
from llm_dist.runtime import Runtime

CONSTRUCTION_DEVICE = {"plain": "cpu", "zero": "cpu", "fsdp": "meta"}
"""Where the trainee of an engine is built: on the meta device where no rank ever holds it whole."""


def build(
    trainee: nn.Module, fill: FillParameter, run: config.Config, runtime: Runtime, report: Callable[[str], None]
) -> Engine:
    """Prepare the trainee's blocks, then hand it to the engine; collective: all ranks call this.

    Args:
        trainee: module to train, with `blocks`, whose forward(batch) returns a `LossSum`.
        fill: full initial value of each parameter, by name.
        run: the run file.
        runtime: this process.
        report: where a remark for the user goes.
    """
    if run.engine.shard_ranks is not None and run.engine.name != "fsdp":
        raise UserError(f'engine.shard_ranks works with engine.name="fsdp", not "{run.engine.name}"')
    freeze(trainee, run.optim.frozen)
    blocks.prepare(blocks.of(trainee), run.engine, run.model.dropout > 0, report)
    match run.engine.name:
        case "plain":
            from llm_dist.engine.plain import PlainEngine

            return PlainEngine(trainee, fill, run, runtime)
        case "zero":
            from llm_dist.engine.zero import ZeroEngine

            return ZeroEngine(trainee, fill, run, runtime)
        case "fsdp":
            from llm_dist.engine.fsdp import FsdpEngine

            return FsdpEngine(trainee, fill, run, runtime)


def freeze(trainee: nn.Module, patterns: Sequence[str]) -> None:
    """Let the parameters whose names fit a pattern stay as they are.

    Raises:
        UserError: a pattern fits none, or no parameter is left to train.
    """
    named = {name.removeprefix("model."): parameter for name, parameter in trainee.named_parameters()}
    for pattern in patterns:
        fitting = [name for name in named if fnmatchcase(name, pattern)]
        if not fitting:
            raise UserError(f"optim.frozen: no parameter fits {pattern!r}; there are {_some(list(named))}")
        for name in fitting:
            named[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in named.values()):
        raise UserError(f"optim.frozen={list(patterns)} leaves nothing to train; leave a pattern out")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + f" ... {names[-1]}"
