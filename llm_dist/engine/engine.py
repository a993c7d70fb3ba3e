"""What every engine does: one optimizer step over micro-batches, whatever is sharded and whoever shards it.

An engine receives a trainee: a module with `blocks` (a ModuleList) whose `forward(batch)` returns a `LossSum`. It
knows neither model nor data. The gradient
it applies is d(sum of the step's loss) / (valid tokens of the whole step), over all ranks and micro-batches; each
subclass undoes what its vendor averages.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llm_dist import config, optim
from llm_dist.batch import Batch, LossSum
from llm_dist.engine.partition import Partition
from llm_dist.runtime import Runtime, derived_seed

MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ()}
"""State tensors an optimizer keeps for each parameter."""


FillParameter = Callable[[str, torch.Size], Tensor]
"""Full fp32 initial value of the named parameter."""


@dataclass(frozen=True)
class StepResult:
    """What one step reports, without waiting for the device."""

    nats: Tensor
    """fp64 scalar on the device: loss of this rank's rows, summed, without penalties."""
    grad_norm: Tensor
    """fp32 scalar: global norm of the averaged gradient before clipping."""
    was_applied: bool = True
    """Whether the update was made."""


Accepts = Callable[[Tensor, Tensor], bool]
"""Whether a step with this rank's nats and the gradient norm may be applied; the same on every rank."""


class Engine(ABC):
    """Base of all engines: the accumulation loop is written once, here."""

    module: nn.Module
    """What is called: the trainee, possibly wrapped by a vendor."""
    trainee: nn.Module
    """The trainee itself, whose parameter names are the names of the state."""
    optimizer: torch.optim.Optimizer
    """The torch optimizer that does the update."""
    can_refuse = True
    """Whether an update can be left out once its numbers are known."""

    def __init__(self, run: config.Config, runtime: Runtime) -> None:
        self.run = run
        self.runtime = runtime

    def train_step(
        self,
        micro_batches: Sequence[Batch],
        valid_tokens: int,
        lr: float,
        step: int,
        accepts: Accepts = lambda nats, grad_norm: True,
    ) -> StepResult:
        """One optimizer step over this rank's micro-batches (the same number on every rank).

        Args:
            micro_batches: batches on the device; absent rows carry no labels.
            valid_tokens: scored positions of the whole step, over all ranks.
            lr: the step's learning rate; groups scale it.
            step: steps finished before this one; seeds dropout together with rank and micro-batch.
            accepts: asked before the update, which is left out where it says no. Engines that cannot leave it out
                (`can_refuse`) ask, too, and make it.

        Collective: all ranks call this.
        """
        self.module.train()
        optim.set_learning_rate(self.optimizer, lr)
        scale = self.runtime.ranks / max(1, valid_tokens)
        nats = torch.zeros((), dtype=torch.float64, device=self.runtime.device)
        for index, batch in enumerate(micro_batches):
            if self.run.model.dropout:
                torch.manual_seed(derived_seed("dropout", self.run.run.seed, step, self.runtime.rank, index))
            with self._accumulating(is_last=index == len(micro_batches) - 1):
                loss: LossSum = self.module(batch)
                self._backward(loss.total * scale)
            nats += loss.nats.detach()
        norm, was_applied = self._update(lambda norm: accepts(nats, norm))
        return StepResult(nats, norm, was_applied)

    @torch.no_grad()
    def eval_step(self, batch: Batch) -> LossSum:
        """Loss of one batch of this rank; collective: all ranks call this equally often."""
        self.module.eval()
        loss: LossSum = self.module(batch)
        return loss

    def state(self) -> dict[str, Partition]:
        """This rank's partition of every state tensor: "param/NAME" and, per moment of the optimizer, "MOMENT/NAME".

        The values are live: writing into them and then calling `state_was_written` changes what is trained.
        """
        return {
            f"{kind}/{name.removeprefix('model.')}": partition
            for name, kinds in self._partitions()
            for kind, partition in kinds.items()
        }

    @property
    def optimizer_steps(self) -> int:
        """Updates the optimizer counts (Adam's bias correction)."""
        return next((int(state["step"]) for state in self.optimizer.state.values() if "step" in state), 0)

    def state_was_written(self, optimizer_steps: int) -> None:
        """Make values written into `state()` take effect: working copies follow, the optimizer's count is set.

        Collective: all ranks call this.
        """
        for state in self.optimizer.state.values():
            if "step" in state:
                state["step"] = torch.full_like(torch.as_tensor(state["step"]), float(optimizer_steps))

    def close(self) -> None:
        """Release what the vendor holds."""
        self.optimizer.zero_grad(set_to_none=True)

    def _require_moments(self, parameters: Iterable[Tensor]) -> None:
        """Create the optimizer's state now, zeroed, where it is created lazily."""
        for parameter in parameters:
            if not parameter.requires_grad:
                continue
            state = self.optimizer.state[parameter]
            moments = MOMENTS[self.run.optim.name]
            if moments and "exp_avg" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            for moment in moments:
                if moment not in state:
                    state[moment] = torch.zeros_like(parameter, requires_grad=False)

    def _moments_of(self, parameter: Tensor) -> dict[str, Any]:
        """None of a parameter that is frozen."""
        if parameter not in self.optimizer.state:
            return {}
        return {moment: self.optimizer.state[parameter][moment] for moment in MOMENTS[self.run.optim.name]}

    @abstractmethod
    def _accumulating(self, is_last: bool) -> AbstractContextManager[None]:
        """Context of one micro-batch: what a vendor can leave to the last one, it reduces over ranks there only."""

    @abstractmethod
    def _backward(self, loss: Tensor) -> None: ...

    @abstractmethod
    def _update(self, may_apply: Callable[[Tensor], bool]) -> tuple[Tensor, bool]:
        """Clip, update where `may_apply` of the norm says so, clear gradients; the norm, and whether it was applied."""

    @abstractmethod
    def _partitions(self) -> Iterable[tuple[str, dict[str, Partition]]]:
        """Parameter name -> partitions by kind ("param" and moments)."""
