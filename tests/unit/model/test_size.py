from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from llm_dist.config import Heads, Model
from llm_dist.model import size
from llm_dist.model.init import initialize
from llm_dist.model.layers import HOST_MULTIPLIES_BF16
from llm_dist.model.transformer import Transformer
from tests.unit.model.shapes import KINDS, VOCABULARY_TOKENS, small, some_ids

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HERE = size.Machine(is_cpu=True, multiplies_bf16=HOST_MULTIPLIES_BF16)
B, T = 2, 48


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("position_kind", [None, "learned"])
def test_shapes_are_the_module_s(kind, position_kind):
    model = small(kind, **({"positions": position_kind} if position_kind else {}))
    with torch.device("meta"):
        transformer = Transformer(model, VOCABULARY_TOKENS, torch.float32)
    registered = {name: tuple(parameter.shape) for name, parameter in transformer.named_parameters()}
    assert list(size.parameter_shapes(model, VOCABULARY_TOKENS).items()) == list(registered.items())
    total = sum(parameter.numel() for parameter in transformer.parameters())
    assert size.num_parameters(model, VOCABULARY_TOKENS).total == total


def test_counts_of_a_model_everybody_knows():
    gpt2 = Model(family="gpt2", layers=12, d_model=768, heads=12, max_sequence_tokens=1024, vocabulary_multiple=1)
    assert size.num_parameters(gpt2, 50_257) == (124_439_808, 124_439_808 - (50_257 + 1024) * 768)
    flops = size.flops_per_token(gpt2, 50_257, 1024)
    assert flops.full == 6 * (124_439_808 - 1024 * 768) + 12 * 12 * 768 * 1024
    assert flops.full - flops.causal == 6 * 12 * 768 * 1024


@given(st.integers(1, 300_000), st.integers(1, 512))
def test_padding_reaches_the_next_multiple_and_is_idempotent(tokens, multiple):
    model = small("llama", vocabulary_multiple=multiple)
    padded = size.padded_vocabulary(model, tokens)
    assert padded % multiple == 0 and tokens <= padded < tokens + multiple
    assert size.padded_vocabulary(model, padded) == padded


def kept_by_autograd(transformer: Transformer, recompute: str) -> int:
    """Bytes of distinct storages saved for the backward pass, parameters not counted."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in transformer.parameters()}
    saved: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor.detach())
        return tensor

    if recompute == "full":
        for block in transformer.blocks:
            block.forward = recomputed(block.forward, pack)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        transformer(some_ids(B, T))
    return sum(saved.values())


def recomputed(forward, pack):
    def run(x, rotary, *rest):
        for argument in (x, *(rotary or ())):
            pack(argument)
        return checkpoint(forward, x, rotary, *rest, use_reentrant=False)

    return run


def measured_model(model: Model, precision: size.Precision, held: torch.dtype) -> Transformer:
    transformer = Transformer(model, VOCABULARY_TOKENS, DTYPES[precision])
    initialize(transformer, model, 0.02, 0)
    return transformer.to(held)


@pytest.mark.parametrize("kind", ["llama-grouped", "qwen3", "gpt2", "mistral", "bert", "classic", "modernbert"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_activation_bytes_are_what_autograd_keeps(kind, precision, recompute, dropout):
    model = small(kind, layers=3, d_model=64, d_ff=160, dropout=dropout)
    measured = kept_by_autograd(measured_model(model, precision, DTYPES[precision]), recompute)
    predicted = size.saved_activation_bytes(model, B, T, precision, recompute, HERE)
    assert predicted == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_fp32_weights_in_a_bf16_run_keep_their_copies(kind):
    model = small(kind, layers=3, d_model=64)
    held_in_bf16, held_in_fp32 = (
        kept_by_autograd(measured_model(model, "bf16", held), "none") for held in (torch.bfloat16, torch.float32)
    )
    copies = size.weight_copy_bytes(model, VOCABULARY_TOKENS, "bf16")
    assert held_in_fp32 - held_in_bf16 == pytest.approx(copies, rel=0.05)
    assert size.weight_copy_bytes(model, VOCABULARY_TOKENS, "fp32") == 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_head_keeps_gradients_and_no_logits(precision):
    model = small("llama")
    transformer = measured_model(model, precision, torch.float32)
    loss = transformer.head(transformer(some_ids(B, T)), some_ids(B, T))
    gradients = [gradient for gradient in loss.nats.grad_fn.kept if gradient is not None]
    kept = sum(gradient.untyped_storage().nbytes() for gradient in gradients)
    assert size.head_bytes(model, VOCABULARY_TOKENS, B, T, precision).kept == kept


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_head_with_a_transform_keeps_what_that_needs(precision):
    model = small("bert", d_model=64)
    transformer = measured_model(model, precision, torch.float32 if precision == "fp32" else torch.bfloat16)
    hidden = transformer(some_ids(B, T)).detach().requires_grad_()
    kept: dict[int, int] = {hidden.untyped_storage().data_ptr(): hidden.untyped_storage().nbytes()}
    weights = {parameter.untyped_storage().data_ptr() for parameter in transformer.parameters()}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = transformer.head(hidden, some_ids(B, T))
    gradients = sum(gradient.untyped_storage().nbytes() for gradient in loss.nats.grad_fn.kept)
    predicted = size.head_bytes(model, VOCABULARY_TOKENS, B, T, precision).kept
    assert predicted == pytest.approx(sum(kept.values()) + gradients, rel=0.05)


@pytest.mark.parametrize(
    "heads", [Heads(), Heads(pair=True), Heads(language=False, classes=5), Heads(False, classes=5, per_token=True)]
)
@pytest.mark.parametrize("kind", ["llama", "bert", "modernbert"])
def test_shapes_of_heads_are_the_module_s(kind, heads):
    model = small(kind)
    with torch.device("meta"):
        transformer = Transformer(model, VOCABULARY_TOKENS, torch.float32, heads)
    registered = {name: tuple(parameter.shape) for name, parameter in transformer.named_parameters()}
    assert list(size.parameter_shapes(model, VOCABULARY_TOKENS, heads).items()) == list(registered.items())


@settings(max_examples=50)
@given(
    st.sampled_from(sorted(KINDS)),
    st.sampled_from(["fp32", "bf16"]),
    st.integers(1, 8),
    st.integers(1, 64),
    st.integers(1, 8),
)
def test_recomputing_more_keeps_less(kind, precision, num_sequences, num_tokens, layers):
    model = small(kind, layers=layers)
    none, selective, full = (
        size.saved_activation_bytes(model, num_sequences, num_tokens, precision, recompute)
        for recompute in ("none", "selective", "full")
    )
    assert full < selective < none


def test_logits_of_a_chunk_do_not_grow_with_the_batch():
    model = small("llama")
    few, many = (size.head_bytes(model, 50_000, num, 2048, "bf16") for num in (1, 64))
    assert few.transient == many.transient and few.kept < many.kept


def test_a_login_node_needs_no_torch():
    code = "import sys, llm_dist.model.size; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
