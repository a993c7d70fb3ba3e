"""One rank alone, or PyTorch DDP: every rank holds everything. The oracle that other engines are compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from llm_dist import config, optim
from llm_dist.engine.engine import Engine, FillParameter
from llm_dist.engine.partition import Partition
from llm_dist.runtime import Runtime


class PlainEngine(Engine):
    """Full-precision parameters, gradients and moments on every rank; gradients are averaged by DDP."""

    def __init__(self, trainee: nn.Module, fill: FillParameter, run: config.Config, runtime: Runtime) -> None:
        super().__init__(run, runtime)
        fill_parameters(trainee, fill)
        self.trainee = trainee.to(runtime.device)
        self.optimizer = optim.build(trainee.named_parameters(), run.optim)
        self._require_moments(trainee.parameters())
        self.module: nn.Module = self.trainee
        if runtime.ranks > 1:
            self.module = DistributedDataParallel(self.trainee, gradient_as_bucket_view=True)
            self._settle_buckets()

    def _settle_buckets(self) -> None:
        """Let DDP lay out its buckets for good, on gradients of zero.

        It does so after its first backward pass, by order of arrival, and how three or more ranks add up depends on
        where an element lies: without this the first step after a resume differs in the last bit.
        """
        self.trainee.forward = lambda: sum(0.0 * parameter.sum() for parameter in self.trainee.parameters())
        self.module().backward()
        del self.trainee.forward
        self.optimizer.zero_grad(set_to_none=True)

    def _accumulating(self, is_last: bool) -> AbstractContextManager[None]:
        if isinstance(self.module, DistributedDataParallel) and not is_last:
            return self.module.no_sync()
        return nullcontext()

    def _backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def _update(self, may_apply: Callable[[Tensor], bool]) -> tuple[Tensor, bool]:
        norm = nn.utils.clip_grad_norm_(self.trainee.parameters(), self.run.optim.clip or torch.inf)
        if is_applied := may_apply(norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm, is_applied

    def _partitions(self) -> Iterable[tuple[str, dict[str, Partition]]]:
        rank, ranks = self.runtime.rank, self.runtime.ranks
        for name, parameter in self.trainee.named_parameters():
            tensors = {"param": parameter, **self._moments_of(parameter)}
            shape = tuple(parameter.shape)
            yield (
                name,
                {kind: Partition(tensor.detach().view(-1), 0, shape, rank, ranks) for kind, tensor in tensors.items()},
            )


def fill_parameters(trainee: nn.Module, fill: FillParameter) -> None:
    """Write every parameter's full initial value; the same on every rank, so nothing needs to be broadcast."""
    with torch.no_grad():
        for name, parameter in trainee.named_parameters():
            parameter.copy_(fill(name.removeprefix("model."), parameter.shape))
