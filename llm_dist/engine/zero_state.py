"""Where DeepSpeed keeps its full-precision state: each parameter's range inside the flat buffers of this rank.

Four optimizer classes of DeepSpeed keep it in four ways; which one is at work depends on stage and precision. All of
them hold a contiguous range of each parameter, which is all a checkpoint needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Range:
    """Elements [start, start + length) of one parameter lie at flat[offset : offset + length]."""

    flat: Tensor
    offset: int
    length: int
    start: int
    shape: tuple[int, ...]

    def view(self, buffer: Tensor) -> Tensor:
        """The range inside `buffer`, which is laid out like `flat`."""
        return buffer.detach().view(-1).narrow(0, self.offset, self.length)


class StateView(Protocol):
    """How one optimizer class of DeepSpeed is read and written."""

    is_replicated: bool
    """Every rank holds every parameter whole."""

    def flats(self) -> Sequence[Tensor]:
        """The full-precision buffers that the torch optimizer updates."""

    def range_of(self, parameter: nn.Parameter) -> Range:
        """Where this rank holds `parameter`."""

    def refresh(self) -> None:
        """Make the working copies follow the full-precision buffers; collective."""


class Partitioned:
    """Stages 1 and 2: a group's parameters lie one after another in a buffer that is cut at rank borders."""

    is_replicated = False

    def __init__(self, wrapper: Any) -> None:
        self._wrapper = wrapper
        is_bf16_class = hasattr(wrapper, "fp32_groups_flat_partition")
        self._flats = wrapper.fp32_groups_flat_partition if is_bf16_class else wrapper.single_partition_of_fp32_groups

    def flats(self) -> Sequence[Tensor]:
        """One buffer per parameter group."""
        return list(self._flats)

    def range_of(self, parameter: nn.Parameter) -> Range:
        """From DeepSpeed's own link between a parameter and its fragment."""
        mapping, shape = parameter._hp_mapping, tuple(parameter.shape)  # type: ignore[attr-defined]
        if mapping is None:
            return Range(self._flats[0], 0, 0, 0, shape)
        held = mapping.hp_fragment_address
        flat = self._flats[mapping.param_group_index]
        return Range(flat, held.start, held.numel, mapping.lp_fragment_address.start, shape)

    def refresh(self) -> None:
        """Copy the masters into the working weights and gather them."""
        self._wrapper.update_lp_params()


class FullyPartitioned:
    """Stage 3: every parameter is cut into equal parts, the last one padded."""

    is_replicated = False

    def __init__(self, wrapper: Any) -> None:
        self._wrapper = wrapper

    def flats(self) -> Sequence[Tensor]:
        """One buffer per sub-group."""
        return list(self._wrapper.fp32_partitioned_groups_flat)

    def range_of(self, parameter: nn.Parameter) -> Range:
        """From the position DeepSpeed keeps for the parameter's gradient, which the master shares."""
        part: Any = parameter
        group, offset, part_elements = self._wrapper.grad_position[self._wrapper.get_param_id(parameter)]
        first = dist.get_rank(part.ds_process_group) * part_elements
        length = max(0, min(part_elements, part.ds_numel - first))
        flat = self._wrapper.fp32_partitioned_groups_flat[group]
        return Range(flat, offset, length, min(first, part.ds_numel), tuple(part.ds_shape))

    def refresh(self) -> None:
        """Small parameters stay gathered between steps: partition them again first, or they keep stale values."""
        wrapper = self._wrapper
        wrapper.checkpoint_event_prologue()
        for group, master in enumerate(wrapper.fp32_partitioned_groups_flat):
            working = wrapper.fp16_partitioned_groups_flat[group]
            working.data.copy_(master.data)
            parts = wrapper.fp16_partitioned_groups[group]
            for part, values in zip(parts, wrapper.unflatten(working, parts), strict=True):
                part.data = values.data
        if hasattr(wrapper, "invalidate_secondary_tensor"):
            wrapper.invalidate_secondary_tensor()
        wrapper.checkpoint_event_epilogue()


class Whole:
    """Stage 0: every rank holds every parameter; in bf16 beside a full-precision master."""

    is_replicated = True

    def __init__(self, parameters: Sequence[nn.Parameter], masters: Sequence[Tensor]) -> None:
        self._parameters = parameters
        self._masters = masters
        self._master_of = {id(p): master for p, master in zip(parameters, masters, strict=True)}

    def flats(self) -> Sequence[Tensor]:
        """The masters, one per parameter."""
        return list(self._masters)

    def range_of(self, parameter: nn.Parameter) -> Range:
        """All of it."""
        return Range(self._master_of[id(parameter)], 0, parameter.numel(), 0, tuple(parameter.shape))

    def refresh(self) -> None:
        """Round the masters into the working weights, where the two differ."""
        with torch.no_grad():
            for parameter, master in zip(self._parameters, self._masters, strict=True):
                if parameter is not master:
                    parameter.copy_(master)


def view_of(wrapper: Any, trainee: nn.Module) -> StateView:
    """The view that fits what DeepSpeed built."""
    parameters = list(trainee.parameters())
    if hasattr(wrapper, "fp32_partitioned_groups_flat"):
        return FullyPartitioned(wrapper)
    if hasattr(wrapper, "update_lp_params") and hasattr(parameters[0], "_hp_mapping"):
        return Partitioned(wrapper)
    if hasattr(wrapper, "fp16_groups") and hasattr(wrapper, "fp32_groups"):
        pairs = [
            (p, master)
            for working, masters in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True)
            for p, master in zip(working, masters, strict=True)
        ]
        return Whole([p for p, _ in pairs], [master for _, master in pairs])
    assert isinstance(wrapper, torch.optim.Optimizer), f"unknown DeepSpeed optimizer {type(wrapper).__name__}"
    return Whole(parameters, parameters)
