from __future__ import annotations

import pytest
import torch

from llm_dist.model.attention import Cache
from llm_dist.model.init import initialize
from llm_dist.model.transformer import Transformer
from tests.unit.model.shapes import KINDS, VOCABULARY_TOKENS, built, small, some_ids


@pytest.mark.parametrize("kind", KINDS)
def test_no_token_sees_the_future(kind):
    transformer, ids = built(small(kind)), some_ids()
    changed = ids.clone()
    changed[:, 9] = (changed[:, 9] + 1) % VOCABULARY_TOKENS
    with torch.no_grad():
        before, after = transformer(ids), transformer(changed)
    assert torch.equal(before[:, :9], after[:, :9])
    assert (before[:, 9:] - after[:, 9:]).abs().amax(-1).min() > 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_masked_documents_are_as_if_alone(kind):
    transformer, ids = built(small(kind)), some_ids(1, 12)
    lengths = (5, 4, 3)
    documents = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    with torch.no_grad():
        together = transformer(ids, positions, documents)
        alone = torch.cat([transformer(part) for part in ids.split(lengths, 1)], 1)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_cache_changes_nothing(kind):
    transformer, ids = built(small(kind)), some_ids()
    cache = Cache(transformer.config, 2, 16, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        whole = transformer(ids)
        pieces = torch.cat([transformer(part, cache=cache) for part in ids.split([6, 1, 4, 1, 4], 1)], 1)
    assert cache.num_tokens == 16
    torch.testing.assert_close(pieces, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_is_near_fp32_and_gives_fp32_gradients(kind):
    model, ids = small(kind), some_ids()
    losses, gradients = [], []
    for dtype in (torch.float32, torch.bfloat16):
        transformer = built(model, dtype, std=0.05)
        hidden = transformer(ids)
        assert hidden.dtype == dtype
        loss = transformer.head(hidden, ids.roll(-1, 1))
        loss.total.backward()
        assert all(parameter.grad.dtype == torch.float32 for parameter in transformer.parameters())
        losses.append(loss.nats.item())
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in transformer.parameters()]))
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)
    assert (gradients[1] - gradients[0]).norm() < 0.03 * gradients[0].norm()


@pytest.mark.parametrize("kind", KINDS)
def test_weights_an_engine_holds_in_bf16_give_the_same_hidden_states(kind):
    model, ids = small(kind), some_ids()
    held_in_fp32, held_in_bf16 = built(model, torch.bfloat16), built(model, torch.bfloat16).to(torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(held_in_fp32(ids), held_in_bf16(ids))


@pytest.mark.parametrize("kind", ["qwen3", "gpt2-sinusoidal"])
def test_meta_device_loses_nothing(kind):
    model, ids = small(kind), some_ids()
    with torch.device("meta"):
        transformer = Transformer(model, VOCABULARY_TOKENS, torch.float32)
    assert not list(transformer.buffers())
    transformer = transformer.to_empty(device="cpu")
    initialize(transformer, model, 0.2, 0)
    with torch.no_grad():
        assert torch.equal(transformer(ids), built(model)(ids))


@pytest.mark.parametrize("kind", KINDS)
def test_tied_head_is_one_parameter(kind):
    model = small(kind)
    transformer = built(model)
    assert (transformer.head.weight is transformer.embedding.weight) == model.head_is_tied
    assert ("head.weight" in dict(transformer.named_parameters())) != model.head_is_tied


def test_dropout_acts_in_training_only():
    transformer, ids = built(small("llama", dropout=0.5)), some_ids()
    torch.manual_seed(0)
    assert not torch.equal(transformer(ids), transformer(ids))
    transformer.eval()
    assert torch.equal(transformer(ids), transformer(ids))
