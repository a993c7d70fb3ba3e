"""Which layers have low-rank updates, and the shapes of these, as arithmetic; imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

from llm_dist.config import Lora
from llm_dist.config_lora import ADAPTER
from llm_dist.errors import UserError

Shape = tuple[int, ...]


def adapted_layers(shapes: Mapping[str, Shape], lora: Lora) -> list[str]:
    """Names of the layers that `lora.targets` means, in the order of `shapes`; none where LoRA is off.

    Raises:
        UserError: a pattern fits no layer.
    """
    if lora.rank is None:
        return []
    layers = [
        name.removesuffix(".weight")
        for name, shape in shapes.items()
        if name.startswith("blocks.") and name.endswith(".weight") and len(shape) == 2
    ]
    for pattern in lora.targets:
        if not any(fnmatchcase(layer, pattern) for layer in layers):
            first_block = ", ".join(layer for layer in layers if layer.startswith("blocks.0."))
            raise UserError(f"lora.targets: no layer fits {pattern!r}; the first block has {first_block}")
    return [layer for layer in layers if any(fnmatchcase(layer, pattern) for pattern in lora.targets)]


def with_adapters(shapes: dict[str, Shape], lora: Lora) -> dict[str, Shape]:
    """The shapes, and behind those of each layer that has an update those of its parts: down [r, in], up [out, r]."""
    layers = set(adapted_layers(shapes, lora))
    if lora.rank is None or not layers:
        return shapes
    every: dict[str, Shape] = {}
    for name, shape in shapes.items():
        every[name] = shape
        layer, _, kind = name.rpartition(".")
        if layer in layers and (kind == "bias" or f"{layer}.bias" not in shapes):
            outputs, inputs = shapes[f"{layer}.weight"]
            every |= {f"{layer}{ADAPTER}down": (lora.rank, inputs), f"{layer}{ADAPTER}up": (outputs, lora.rank)}
    return every
