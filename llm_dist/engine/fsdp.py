"""PyTorch FSDP2: parameters, gradients and moments are sharded by rows; blocks are gathered one at a time.

Built on `fully_shard` itself, not through accelerate: on CPU accelerate 1.15 silently trains without sharding or
without synchronising gradients, and it adds nothing to the four lines below.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from llm_dist import config, optim
from llm_dist.engine import blocks
from llm_dist.engine.engine import Engine, FillParameter
from llm_dist.engine.partition import Partition
from llm_dist.errors import UserError
from llm_dist.runtime import Runtime


class FsdpEngine(Engine):
    """fp32 shards; with bf16, blocks are gathered and computed in bf16 and gradients are reduced in fp32."""

    def __init__(self, trainee: nn.Module, fill: FillParameter, run: config.Config, runtime: Runtime) -> None:
        super().__init__(run, runtime)
        self._mesh = _mesh(runtime, run.engine.shard_ranks)
        policy = MixedPrecisionPolicy()
        if run.engine.precision == "bf16":
            policy = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
            )
        for block in blocks.of(trainee):
            fully_shard(block, mesh=self._mesh, mp_policy=policy)
        fully_shard(trainee, mesh=self._mesh, mp_policy=policy)
        trainee.to_empty(device=runtime.device)  # a model built on the meta device never exists whole
        self.module = self.trainee = trainee
        self._fill_shards(fill)
        self.optimizer = optim.build(trainee.named_parameters(), run.optim)
        self._require_moments(trainee.parameters())
        assert all(isinstance(parameter, DTensor) for parameter in trainee.parameters()), "FSDP left a tensor whole"

    def _fill_shards(self, fill: FillParameter) -> None:
        with torch.no_grad():
            for name, parameter in self.trainee.named_parameters():
                shard = cast(DTensor, parameter)
                rows, offset = _rows_held(shard)
                full = fill(name.removeprefix("model."), parameter.shape)
                shard.to_local().copy_(full.narrow(0, offset, rows) if rows else full[:0])

    def _accumulating(self, is_last: bool) -> AbstractContextManager[None]:
        """Gradients are scattered in every micro-batch and accumulate as shards; replicas meet in the last one."""
        cast(FSDPModule, self.module).set_requires_all_reduce(is_last)
        return nullcontext()

    def _backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def _update(self, may_apply: Callable[[Tensor], bool]) -> tuple[Tensor, bool]:
        shared: Any = nn.utils.clip_grad_norm_(self.module.parameters(), self.run.optim.clip or torch.inf)
        norm = cast(DTensor, shared).full_tensor()
        if is_applied := may_apply(norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm, is_applied

    def _partitions(self) -> Iterable[tuple[str, dict[str, Partition]]]:
        cast(FSDPModule, self.module).reshard()  # an evaluation leaves what lies outside the blocks gathered
        replicas = self._mesh.size(0) if self._mesh.ndim == 2 else 1
        replica = self._mesh.get_local_rank(0) if self._mesh.ndim == 2 else 0
        for name, parameter in self.trainee.named_parameters():
            shape = tuple(parameter.shape)
            _, first_row = _rows_held(cast(DTensor, parameter))
            start = first_row * math.prod(shape[1:])
            tensors = {"param": parameter, **self._moments_of(parameter)}
            yield (
                name,
                {
                    kind: Partition(_held(tensor).view(-1), start, shape, replica, replicas)
                    for kind, tensor in tensors.items()
                },
            )


def _held(tensor: Tensor) -> Tensor:
    """This rank's shard, sharing storage."""
    return cast(DTensor, tensor.detach()).to_local()


def _mesh(runtime: Runtime, shard_ranks: int | None) -> DeviceMesh:
    kind, ranks = runtime.device.type, runtime.ranks
    if shard_ranks is None or shard_ranks == ranks:
        return init_device_mesh(kind, (ranks,), mesh_dim_names=("shard",))
    if ranks % shard_ranks:
        raise UserError(
            f"engine.shard_ranks={shard_ranks} does not divide the {ranks} ranks; choose a divisor or leave it out"
        )
    return init_device_mesh(kind, (ranks // shard_ranks, shard_ranks), mesh_dim_names=("replicate", "shard"))


def _rows_held(parameter: DTensor) -> tuple[int, int]:
    """How many rows of the full tensor this rank holds, and the first of them."""
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return int(shape[0]), int(offset[0]) if shape[0] else 0
