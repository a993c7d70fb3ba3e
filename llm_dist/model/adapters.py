"""Low-rank updates of linear layers (LoRA, arXiv 2106.09685): put beside the layers, or into their weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from llm_dist.config import Lora
from llm_dist.config_lora import ADAPTER
from llm_dist.model.adapter_size import adapted_layers
from llm_dist.model.layers import Adapter, Linear


def add_adapters(model: nn.Module, lora: Lora) -> None:
    """Give every layer that `lora.targets` means an update, not yet initialised."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name in adapted_layers(shapes, lora):
        layer = model.get_submodule(name)
        assert isinstance(layer, Linear) and lora.rank is not None
        outputs, inputs = layer.weight.shape
        layer.adapter = Adapter(inputs, outputs, lora.rank, lora.scale, lora.dropout)


def merged(weights: Mapping[str, Tensor], lora: Lora) -> dict[str, Tensor]:
    """Full parameters of the same model without updates: each is added to the weight of its layer."""
    result = {name: value for name, value in weights.items() if ADAPTER not in name}
    for name, up in weights.items():
        if name.endswith(f"{ADAPTER}up"):
            layer = name.removesuffix(f"{ADAPTER}up")
            update = up.double() @ weights[f"{layer}{ADAPTER}down"].double()
            weight = result[f"{layer}.weight"]
            result[f"{layer}.weight"] = (weight.double() + lora.scale * update).to(torch.float32)
    return result
