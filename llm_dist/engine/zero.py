"""DeepSpeed ZeRO-0/1/2/3: optimizer, gradients and parameters partitioned over the ranks.

What DeepSpeed 0.19 does otherwise than its name says is undone here, and tested: it clips at 1.0 unless told, starts
the fp32 masters from bf16-rounded weights, takes a hidden optimizer step when stage 0 runs in bf16, and on CPU
compiles a C++ communication op. It is called directly, not through accelerate, which on CPU silently turns into DDP.

What stays, measured by the tests (50 steps of bf16 differ from `plain` by at most 1e-3 nats): stage 0 in bf16 adds up
micro-batches in bf16; stages 1 and 2 divide bf16 gradients by the number of ranks before the fp32 reduction, exact for
powers of two; a step whose gradients are not finite is left out (by all but stage 0 in fp32), where `plain` and `fsdp`
may take it. Its loss and norm are not finite with any engine, and the trainer does not build on it. An update cannot be
left out by whoever sees its numbers (`can_refuse`): DeepSpeed reduces, measures and updates in one call.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from typing import Any

import torch
from torch import Tensor, nn

from llm_dist import config, optim
from llm_dist.engine.engine import Engine, FillParameter
from llm_dist.engine.partition import Partition
from llm_dist.engine.plain import fill_parameters
from llm_dist.engine.zero_state import view_of
from llm_dist.errors import UserError
from llm_dist.runtime import Runtime

NO_CLIPPING = 1e30
"""DeepSpeed reads 0 as "clip at the default" in some classes; a bound that nothing reaches is unambiguous."""


class ZeroEngine(Engine):
    """DeepSpeed reduces, clips and partitions; loop, schedule and checkpoint are ours."""

    def __init__(self, trainee: nn.Module, fill: FillParameter, run: config.Config, runtime: Runtime) -> None:
        super().__init__(run, runtime)
        deepspeed = _import_deepspeed(runtime)
        fill_parameters(trainee, fill)
        self.trainee = trainee.to(runtime.device)
        initial = _copies(trainee) if run.engine.precision == "bf16" else {}
        with redirect_stdout(io.StringIO()):  # it reports its memory there, where results belong
            wrapped, *_ = deepspeed.initialize(
                model=self.trainee,
                optimizer=optim.build(trainee.named_parameters(), run.optim),
                config=deepspeed_config(run),
                dist_init_required=False,
            )
        assert wrapped.dp_world_size == runtime.ranks, "DeepSpeed sees another number of ranks"
        assert wrapped.zero_optimization_stage() == run.engine.zero_stage, "DeepSpeed chose another stage"
        self._deepspeed: Any = wrapped
        self.module = wrapped
        self.optimizer = _innermost(wrapped.optimizer)
        self._view = view_of(wrapped.optimizer, self.trainee)
        self._require_moments(self._view.flats())
        if initial:
            self._undo_initial_rounding(initial)

    def _undo_initial_rounding(self, initial: dict[str, Tensor]) -> None:
        """Masters start from the fp32 weights, and from no earlier step."""
        for flat in self._view.flats():
            for value in self.optimizer.state[flat].values():
                if isinstance(value, Tensor):
                    value.zero_()
        for name, parameter in self.trainee.named_parameters():
            held = self._view.range_of(parameter)
            held.view(held.flat).copy_(initial[name].view(-1)[held.start : held.start + held.length])
        self._view.refresh()

    def _accumulating(self, is_last: bool) -> AbstractContextManager[None]:
        self._deepspeed.set_gradient_accumulation_boundary(is_last)
        return nullcontext()

    def _backward(self, loss: Tensor) -> None:
        self._deepspeed.backward(loss)

    can_refuse = False

    def _update(self, may_apply: Callable[[Tensor], bool]) -> tuple[Tensor, bool]:
        has_no_own_norm = self._deepspeed.optimizer is self.optimizer
        norm = self._averaged_gradient_norm() if has_no_own_norm else None
        self._deepspeed.step()
        norm = self._deepspeed.get_global_grad_norm() if norm is None else norm
        assert norm is not None, "DeepSpeed reported no gradient norm"
        norm = torch.as_tensor(norm, dtype=torch.float32)
        may_apply(norm)  # its answer comes too late here; whoever asked hears of it
        return norm, True

    def _averaged_gradient_norm(self) -> Tensor:
        """Stage 0 in fp32 reports none; its gradients are already averaged when the last backward is over."""
        return nn.utils.get_total_norm([p.grad for p in self.trainee.parameters() if p.grad is not None])

    def _partitions(self) -> Iterable[tuple[str, dict[str, Partition]]]:
        rank, ranks = (self.runtime.rank, self.runtime.ranks) if self._view.is_replicated else (0, 1)
        for name, parameter in self.trainee.named_parameters():
            held = self._view.range_of(parameter)
            buffers = {"param": held.flat, **self._moments_of(held.flat)}
            yield (
                name,
                {
                    kind: Partition(held.view(buffer), held.start, held.shape, rank, ranks)
                    for kind, buffer in buffers.items()
                },
            )

    def state_was_written(self, optimizer_steps: int) -> None:
        """As `Engine.state_was_written`; the working weights are rounded from the masters anew."""
        super().state_was_written(optimizer_steps)
        self._view.refresh()

    def close(self) -> None:
        """Release DeepSpeed's buffers and hooks."""
        self._deepspeed.destroy()


def deepspeed_config(run: config.Config) -> dict[str, Any]:
    """What DeepSpeed is told: every default that would change the mathematics is set."""
    stage, is_bf16 = run.engine.zero_stage, run.engine.precision == "bf16"
    told: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": run.optim.clip or NO_CLIPPING,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "bf16": {"enabled": is_bf16},
    }
    if is_bf16:
        told["communication_data_type"] = "fp32"
    if is_bf16 and stage > 0:
        told["data_types"] = {"grad_accum_dtype": "fp32"}
    return told


def _import_deepspeed(runtime: Runtime) -> Any:
    if runtime.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    try:
        import deepspeed
    except ModuleNotFoundError:
        raise UserError(
            'engine.name="zero" needs DeepSpeed: pip install "llm_dist[zero]", or choose engine.name="fsdp"'
        ) from None
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if runtime.device.type == "cpu":
        # Its shared-memory all-reduce is compiled at every start and needs g++ and ninja; gloo is as fast.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _copies(trainee: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainee.named_parameters()}


def _innermost(wrapper: Any) -> torch.optim.Optimizer:
    while not isinstance(wrapper, torch.optim.Optimizer):
        wrapper = wrapper.optimizer
    return wrapper
