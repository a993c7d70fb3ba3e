"""What is done to blocks from outside, on blocks of two products each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from llm_dist import config
from llm_dist.engine import blocks
from llm_dist.errors import UserError


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(8, 8, generator=generator))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.dropout(torch.relu(x @ self.weight)) @ self.weight.t()
        return x + torch.sin(y)


class Calls(TorchDispatchMode):
    """Counts how often each operator runs."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] = self.counts.get(str(func), 0) + 1
        return func(*args, **(kwargs or {}))


def chain(engine: config.Engine, has_dropout: bool = True) -> nn.Sequential:
    layers = nn.ModuleList(Block() for _ in range(3))
    remarks: list[str] = []
    blocks.prepare(layers, engine, has_dropout, remarks.append)
    assert remarks == []
    return nn.Sequential(*layers)


def gradients(model: nn.Sequential) -> tuple[list[Tensor], dict[str, int]]:
    torch.manual_seed(5)
    with Calls() as calls:
        model(torch.linspace(-1, 1, 32).view(4, 8)).square().sum().backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None], calls.counts


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_gives_the_same_gradients_with_dropout(recompute: str) -> None:
    expected, _ = gradients(chain(config.Engine(compile="off")))
    found, _ = gradients(chain(config.Engine(compile="off", recompute=recompute)))

    assert len(found) == 3
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize(("recompute", "products", "relus"), [("none", 6, 3), ("selective", 6, 6), ("full", 12, 6)])
def test_selective_recompute_keeps_products_and_recomputes_the_rest(recompute: str, products: int, relus: int) -> None:
    _, calls = gradients(chain(config.Engine(compile="off", recompute=recompute)))
    in_backward = 4 * 3 - 1  # nobody asks for the gradient of the input

    assert calls["aten.mm.default"] == products + in_backward
    assert calls["aten.relu.default"] == relus


def test_parameter_names_stay() -> None:
    model = chain(config.Engine(compile="off", recompute="full"))

    assert [name for name, _ in model.named_parameters()] == ["0.weight", "1.weight", "2.weight"]


def test_attention_on_this_machine_is_among_what_is_kept() -> None:
    query = torch.randn(1, 2, 16, 8, requires_grad=True)
    with Calls() as calls:
        nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)

    attention = [name for name in calls.counts if "scaled_dot_product" in name]
    assert attention and set(attention) <= {str(operator) for operator in blocks.KEPT_OPERATORS}


def remarks_of(**keys: Any) -> list[str]:
    remarks: list[str] = []
    blocks.prepare(nn.ModuleList(), config.Engine(**keys), False, remarks.append)
    return remarks


def test_a_missing_compiler_is_said_in_one_line_or_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)

    assert not blocks.has_compiler("cpu")
    assert remarks_of(compile="off") == []
    (line,) = remarks_of(compile="auto")
    assert "off" in line and "g++" in line and "\n" not in line
    with pytest.raises(UserError, match=r"engine\.compile=on needs a C"):
        remarks_of(compile="on")


def test_the_compiler_that_cxx_names_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "my-compiler"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    (tmp_path / "Python.h").touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(blocks.sysconfig, "get_path", lambda name: str(tmp_path))

    monkeypatch.setenv("CXX", "my-compiler")
    assert blocks.has_compiler("cpu")
    monkeypatch.setenv("CXX", "another")
    assert not blocks.has_compiler("cpu")
    monkeypatch.setenv("CXX", "my-compiler")
    (tmp_path / "Python.h").unlink()
    assert not blocks.has_compiler("cpu")


def test_zero_3_is_not_compiled_and_says_so() -> None:
    (line,) = remarks_of(name="zero", zero_stage=3, compile="on")

    assert "ZeRO-3" in line
