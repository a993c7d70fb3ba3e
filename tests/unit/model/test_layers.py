from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from llm_dist.config import Model
from llm_dist.model import layers
from llm_dist.model.attention import Attention, attend, rotary_tables, rotate, same_document, sinusoids, visible
from llm_dist.model.layers import LayerNorm, Linear, RMSNorm
from tests.unit.model.shapes import small


def filled(module: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(1.0, 0.5, generator=generator)
    return module


def test_rms_norm_is_its_formula():
    norm, x = filled(RMSNorm(16, 1e-5)), torch.randn(3, 16)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected)


def test_layer_norm_is_its_formula():
    norm, x = filled(LayerNorm(16, 1e-5)), torch.randn(3, 16)
    centred = x - x.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias
    torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
def test_norm_statistics_are_fp32(kind):
    """A large common offset or scale ruins bf16 statistics; the result must be the rounded fp32 one."""
    norm = filled(kind(512, 1e-5)).to(torch.bfloat16)
    x = (torch.randn(4, 512) * 3 + 20).to(torch.bfloat16)
    expected = kind(512, 1e-5)
    expected.load_state_dict({name: value.float() for name, value in norm.state_dict().items()})
    assert norm(x).dtype == torch.bfloat16
    torch.testing.assert_close(norm(x), expected(x.float()).to(torch.bfloat16), rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("native", [True, False], ids=["bf16-units", "no-bf16-units"])
def test_bf16_linear_keeps_fp32_weights_exact_to_rounding(monkeypatch, native):
    monkeypatch.setattr(layers, "HOST_MULTIPLIES_BF16", native)
    layer = filled(Linear(32, 24, bias=True))
    x = torch.randn(2, 5, 32).to(torch.bfloat16).requires_grad_()
    y = layer(x)
    y.float().square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    wide = x.detach().float().requires_grad_()
    weight, bias = (p.detach().to(torch.bfloat16).float().requires_grad_() for p in layer.parameters())
    reference = F.linear(wide, weight, bias)
    reference.square().sum().backward()
    assert y.dtype == torch.bfloat16 and gradients["weight"].dtype == torch.float32
    for ours, theirs in [
        (y, reference),
        (x.grad, wide.grad),
        *zip(gradients.values(), (weight.grad, bias.grad), strict=True),
    ]:
        assert (ours.float() - theirs).norm() <= 6e-3 * theirs.norm()


def test_rotary_turns_pairs_and_depends_on_distance_alone():
    query, key = torch.randn(2, 1, 1, 1, 8).unbind(0)

    def score(at: int, other: int) -> torch.Tensor:
        turned = [
            rotate(x, rotary_tables(torch.tensor([[position]]), 8, 10_000.0))
            for x, position in ((query, at), (key, other))
        ]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(3, 1), score(1003, 1001), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(score(0, 0), (query * key).sum())
    assert abs(score(5, 1) - score(3, 1)) > 1e-3


def test_rotary_of_bf16_is_exact_far_out():
    """Positions of 100,000 have no bf16; the tables stay fp32 whatever the activations are."""
    cos, _ = rotary_tables(torch.tensor([[100_001]]), 4, 10_000.0)
    assert cos.dtype == torch.float32
    assert cos.flatten()[0].item() == pytest.approx(math.cos(100_001), abs=1e-5)


def test_sinusoids_are_the_paper_s_up_to_the_embedding_scale():
    table = sinusoids(torch.arange(7)[None], 16)[0] * math.sqrt(16)
    assert table[5, 0].item() == pytest.approx(math.sin(5), abs=1e-6)
    assert table[5, 1].item() == pytest.approx(math.cos(5), abs=1e-6)
    assert table[5, 6].item() == pytest.approx(math.sin(5 / 10_000 ** (6 / 16)), abs=1e-6)


@pytest.mark.parametrize("num_tokens", [8, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [True, False])
def test_attention_is_its_formula(num_tokens, dtype, masked):
    query, key, value = (torch.randn(2, heads, num_tokens, 8).to(dtype) for heads in (4, 2, 2))
    ids = torch.arange(num_tokens)[None].expand(2, -1) // 5
    past = visible(num_tokens, num_tokens, small("llama"), is_windowed=False, device=torch.device("cpu"))
    mask = same_document(ids if masked else torch.zeros_like(ids)) & past
    wide_key, wide_value = (x.float().repeat_interleave(2, 1) for x in (key, value))
    scores = (query.float() @ wide_key.transpose(2, 3) / 8**0.5).masked_fill(~mask, float("-inf"))
    expected = scores.softmax(-1) @ wide_value
    mixed = attend(query, key, value, mask if masked else None)
    assert mixed.dtype == dtype
    torch.testing.assert_close(mixed.float(), expected, rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 3e-2)


def test_one_query_sees_every_key():
    query, key, value = torch.randn(1, 2, 1, 4), torch.randn(1, 2, 9, 4), torch.randn(1, 2, 9, 4)
    expected = (query @ key.transpose(2, 3) / 2).softmax(-1) @ value
    torch.testing.assert_close(attend(query, key, value, None), expected)


def test_qk_norm_bounds_the_scores():
    """With unit norm weights, queries and keys have rms 1 whatever the projections hold."""
    attention = Attention(Model(layers=1, d_model=16, heads=2, qk_norm=True))
    seen: list[torch.Tensor] = []
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=100.0)
    for norm in (attention.query_norm, attention.key_norm):
        torch.nn.init.ones_(norm.weight)
        norm.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    attention(torch.randn(1, 4, 16), None, None, None)
    for normed in seen:
        torch.testing.assert_close(normed.square().mean(-1), torch.ones(1, 4, 2), rtol=1e-3, atol=1e-3)
    assert len(seen) == 2
