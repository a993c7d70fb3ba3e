"""What this device can do: the matmul rate that utilisation is measured against."""

from __future__ import annotations

import time

import torch

from llm_dist.model.layers import product


def matmul_flops_per_second(
    device: torch.device, dtype: torch.dtype, rows: int, width: int, seconds: float = 0.15
) -> float:
    """Rate of [rows, width] @ [width, 4 width] products, the best of repeated runs over about `seconds`."""
    left = torch.randn(rows, width, device=device, dtype=dtype)
    right = torch.randn(width, 4 * width, device=device, dtype=dtype)
    flops = 2.0 * rows * width * 4 * width
    fastest, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < seconds:
        before = time.perf_counter()
        product(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize()
        fastest = min(fastest, time.perf_counter() - before)
    return flops / fastest
