from __future__ import annotations

import pytest
import torch

from llm_dist.model.attention import Cache
from llm_dist.model.init import initialize
from llm_dist.model.transformer import Transformer
from tests.unit.model.shapes import CAUSAL, ENCODERS, KINDS, VOCABULARY_TOKENS, built, small, some_ids


@pytest.mark.parametrize("kind", CAUSAL)
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


@pytest.mark.parametrize("kind", ENCODERS)
def test_every_token_of_an_encoder_sees_every_other(kind):
    transformer, ids = built(small(kind, window_tokens=None, global_every=None)), some_ids()
    changed = ids.clone()
    changed[:, 9] = (changed[:, 9] + 1) % VOCABULARY_TOKENS
    with torch.no_grad():
        before, after = transformer(ids), transformer(changed)
    assert (before - after).abs().amax(-1).min() > 1e-6


@pytest.mark.parametrize(
    ("family", "window_tokens", "seeing"),
    [("llama", 4, range(9, 13)), ("modernbert", 4, range(7, 12)), ("llama", 99, range(9, 16)), ("bert", 98, range(16))],
)
def test_a_window_cuts_what_a_token_sees(family, window_tokens, seeing):
    transformer = built(small(family, layers=1, window_tokens=window_tokens, global_every=None))
    ids = some_ids()
    changed = ids.clone()
    changed[:, 9] = (changed[:, 9] + 1) % VOCABULARY_TOKENS
    with torch.no_grad():
        differing = (transformer(ids) != transformer(changed)).any(-1).any(0)
    assert differing.nonzero()[:, 0].tolist() == list(seeing)


def test_every_so_manieth_block_sees_everything():
    model = small("modernbert", layers=5, window_tokens=4, global_every=2)
    assert [model.is_windowed(layer) for layer in range(5)] == [False, True, False, True, False]
    assert not any(small("llama").is_windowed(layer) for layer in range(5))
    assert all(small("mistral").is_windowed(layer) for layer in range(5))


@pytest.mark.parametrize("norm_position", ["pre", "post"])
@pytest.mark.parametrize("feed_forward", ["relu", "gelu"])
def test_a_classic_encoder_is_torch_s_own(norm_position, feed_forward):
    """`nn.TransformerEncoder`, which the original Transformer's encoder is, computes the same from the same weights."""
    model = small("classic", norm_position=norm_position, feed_forward=feed_forward)
    ours = built(model)
    layer = torch.nn.TransformerEncoderLayer(
        *(model.d_model, model.heads, model.width_ff, 0.0, feed_forward, model.norm_eps),
        batch_first=True,
        norm_first=norm_position == "pre",
    )
    final = torch.nn.LayerNorm(model.d_model, model.norm_eps) if norm_position == "pre" else None
    theirs = torch.nn.TransformerEncoder(layer, model.layers, final, enable_nested_tensor=False).eval()
    for theirs_of_one, block in zip(theirs.layers, ours.blocks, strict=True):
        projections = (block.attention.query, block.attention.key, block.attention.value)
        for kind in ("weight", "bias"):
            stacked = torch.cat([getattr(projection, kind) for projection in projections])
            getattr(theirs_of_one.self_attn, f"in_proj_{kind}").data = stacked.detach()
        pairs = [
            (theirs_of_one.self_attn.out_proj, block.attention.output),
            (theirs_of_one.norm1, block.attention_norm),
            (theirs_of_one.linear1, block.feed_forward.up),
            (theirs_of_one.linear2, block.feed_forward.down),
            (theirs_of_one.norm2, block.feed_forward_norm),
        ]
        for module, block_s in pairs:
            module.load_state_dict(block_s.state_dict())
    if final is not None:
        theirs.norm.load_state_dict(ours.norm.state_dict())
    ids = some_ids(3, 16)
    documents = torch.zeros_like(ids)
    documents[1, 11:] = 1  # padding
    with torch.no_grad():
        embedded = ours.embedding(ids) + ours.positions(torch.arange(16))
        expected = theirs(embedded, src_key_padding_mask=documents == 1)
        found = ours(ids, document_ids=documents)
    is_text = documents == 0
    torch.testing.assert_close(found[is_text], expected[is_text], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", CAUSAL)
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
    assert (transformer.head.weight is transformer.embedding.weight) == model.tied_head
    assert ("head.weight" in dict(transformer.named_parameters())) != model.tied_head


def test_dropout_acts_in_training_only():
    transformer, ids = built(small("llama", dropout=0.5)), some_ids()
    torch.manual_seed(0)
    assert not torch.equal(transformer(ids), transformer(ids))
    transformer.eval()
    assert torch.equal(transformer(ids), transformer(ids))
