"""The layers that every family is made of; pure functions of tensors that know no run, no engine and no device.

One rule of precision: parameters may be held in any dtype, and each layer casts its weight to the dtype of the
activations where it uses it. Norms compute in fp32 whatever the activations are.

Shape letters: B batch, T sequence, D model width, E head width, F feed-forward width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_dist import config

HOST_MULTIPLIES_BF16: bool = (
    torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    and torch.ops.mkldnn._is_mkldnn_bf16_supported()
)
"""Whether this machine's CPU kernels multiply bf16 matrices faster than fp32 ones (AVX-512 or AMX on x86)."""


def widened_on(x: Tensor) -> bool:
    """Whether products of `x` are best computed on fp32 copies: bf16 on a CPU without bf16 units."""
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and not HOST_MULTIPLIES_BF16


def product(left: Tensor, right: Tensor) -> Tensor:
    """Matrix product in the dtype of `left`, accumulated in fp32, on the units this machine has."""
    if widened_on(left):
        return (left.float() @ right.float()).to(left.dtype)
    return left @ right


class WidenedLinear(torch.autograd.Function):
    """`F.linear` of bf16 tensors through fp32 copies that live only during the product.

    Same result as bf16 units that accumulate in fp32, to the last rounding; keeps no more than they do.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """Multiply x [..., in] by weight [out, in]."""
        ctx.save_for_backward(x, weight)
        return F.linear(x.float(), weight.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of x and weight, each in its dtype."""
        x, weight = ctx.saved_tensors
        gradient = gradients[0].float()
        for_x = for_weight = None
        if ctx.needs_input_grad[0]:
            for_x = (gradient @ weight.float()).to(x.dtype)
        if ctx.needs_input_grad[1]:
            for_weight = (gradient.flatten(0, -2).t() @ x.flatten(0, -2).float()).to(weight.dtype)
        return for_x, for_weight


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Product of x [..., in] with weight [out, in], plus bias [out]: [..., out] in the dtype of `x`."""
    weight = weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    if widened_on(x):
        y: Tensor = WidenedLinear.apply(x, weight)  # type: ignore[no-untyped-call]
        return y if bias is None else y + bias
    return F.linear(x, weight, bias)


def _parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=torch.float32))


class Adapter(nn.Module):
    """A low-rank update of a linear layer: scale * up(down(dropout(x))) (LoRA, arXiv 2106.09685)."""

    def __init__(self, inputs: int, outputs: int, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.down = _parameter(rank, inputs)
        self.up = _parameter(outputs, rank)
        self.scale = scale
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return linear(linear(self.dropout(x), self.down, None), self.up, None) * self.scale


class Linear(nn.Module):
    """Matrix product with a weight [out, in] and, where the family has them, a bias [out]."""

    adapter: Adapter | None
    """An update of the weight that is trained in its stead."""

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.weight = _parameter(outputs, inputs)
        self.bias = _parameter(outputs) if bias else None
        self.adapter = None

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        y = linear(x, self.weight, self.bias)
        return y if self.adapter is None else y + self.adapter(x)


class Embedding(nn.Module):
    """A table [rows, D]; what it looks up is in `compute_dtype`, which sets the dtype of all activations."""

    def __init__(self, rows: int, width: int, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = _parameter(rows, width)
        self.compute_dtype = compute_dtype

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [...] -> [..., D]."""
        return F.embedding(ids, self.weight).to(self.compute_dtype)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis (arXiv 1910.07467), computed in fp32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = _parameter(width)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D] in the dtype of `x`."""
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class LayerNorm(nn.Module):
    """(x - mean) / std * weight + bias over the last axis (arXiv 1607.06450), computed in fp32."""

    def __init__(self, width: int, eps: float, bias: bool = True) -> None:
        super().__init__()
        self.weight = _parameter(width)
        self.bias = _parameter(width) if bias else None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D] in the dtype of `x`."""
        # bf16 in, bf16 statistics kept: torch's CPU kernel would hand rounded ones to the backward pass.
        weight = self.weight.to(x.dtype).float()
        bias = None if self.bias is None else self.bias.to(x.dtype).float()
        return F.layer_norm(x.float(), weight.shape, weight, bias, self.eps).to(x.dtype)


ACTIVATIONS: dict[config.FeedForwardKind, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu,
    "geglu": F.gelu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}
"""The function in each kind of feed-forward; in gated ones, of the gate."""


class GatedFeedForward(nn.Module):
    """down(activation(gate(x)) * up(x)): SwiGLU, GeGLU (arXiv 2002.05202)."""

    def __init__(self, width: int, width_ff: int, kind: config.FeedForwardKind, bias: bool) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[kind]
        self.gate = Linear(width, width_ff, bias)
        self.up = Linear(width, width_ff, bias)
        self.down = Linear(width_ff, width, bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        y: Tensor = self.down(self.activation(self.gate(x)) * self.up(x))
        return y


class FeedForward(nn.Module):
    """down(activation(up(x)))."""

    def __init__(self, width: int, width_ff: int, kind: config.FeedForwardKind, bias: bool) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[kind]
        self.up = Linear(width, width_ff, bias)
        self.down = Linear(width_ff, width, bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        y: Tensor = self.down(self.activation(self.up(x)))
        return y


def norm_of(model: config.Model) -> nn.Module:
    """A norm of the model's kind."""
    if model.norm == "rms":
        return RMSNorm(model.d_model, model.norm_eps)
    return LayerNorm(model.d_model, model.norm_eps, model.norm_bias)
