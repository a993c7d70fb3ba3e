"""What a model of a given shape holds and computes, as arithmetic; imports no torch, so that a login node can plan.

Everything is a function of the run file's `[model]` and the tokenizer's vocabulary. Tests hold each formula against
what the real module registers and what autograd really keeps; nothing here may guess.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Literal, NamedTuple

from llm_dist.config import Model

Precision = Literal["fp32", "bf16"]
Recompute = Literal["none", "selective", "full"]
Shape = tuple[int, ...]

FP32_BYTES = 4
ACTIVATION_BYTES: dict[Precision, int] = {"fp32": FP32_BYTES, "bf16": 2}

SHORT_ATTENTION_TOKENS = 256
"""Below this many keys a CPU computes bf16 attention in fp32: its bf16 backward pass is slower than the cast."""

HEAD_CHUNK_LOGITS = 2**24
HEAD_CHUNK_MIN_ROWS = 512


def padded_vocabulary(model: Model, vocabulary_tokens: int) -> int:
    """Rows of the embedding: the vocabulary rounded up to a multiple of `model.vocabulary_multiple`."""
    return -(-vocabulary_tokens // model.vocabulary_multiple) * model.vocabulary_multiple


def head_chunk_rows(padded_vocabulary_tokens: int) -> int:
    """Positions whose logits exist at one time in the head."""
    return max(HEAD_CHUNK_MIN_ROWS, HEAD_CHUNK_LOGITS // padded_vocabulary_tokens)


def parameter_shapes(model: Model, vocabulary_tokens: int) -> dict[str, Shape]:
    """Names and shapes exactly as `Transformer.named_parameters` gives them, in that order."""
    width, vocabulary = model.d_model, padded_vocabulary(model, vocabulary_tokens)
    shapes: dict[str, Shape] = {"embedding.weight": (vocabulary, width)}
    if model.position_kind == "learned":
        shapes["positions.weight"] = (model.max_sequence_tokens, width)
    for layer in range(model.layers):
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in _block_shapes(model)}
    shapes |= dict(_norm_shapes(model, "norm"))
    if not model.head_is_tied:
        shapes["head.weight"] = (vocabulary, width)
    return shapes


def _norm_shapes(model: Model, name: str) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (model.d_model,)
    if model.family == "gpt2":
        yield f"{name}.bias", (model.d_model,)


def _linear_shapes(model: Model, name: str, inputs: int, outputs: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (outputs, inputs)
    if model.family == "gpt2":
        yield f"{name}.bias", (outputs,)


def _block_shapes(model: Model) -> Iterator[tuple[str, Shape]]:
    width, width_ff, width_kv = model.d_model, model.width_ff, model.num_kv_heads * model.d_head
    yield from _norm_shapes(model, "attention_norm")
    yield from _linear_shapes(model, "attention.query", width, width)
    yield from _linear_shapes(model, "attention.key", width, width_kv)
    yield from _linear_shapes(model, "attention.value", width, width_kv)
    yield from _linear_shapes(model, "attention.output", width, width)
    if model.qk_norm:
        yield "attention.query_norm.weight", (model.d_head,)
        yield "attention.key_norm.weight", (model.d_head,)
    yield from _norm_shapes(model, "feed_forward_norm")
    if model.family == "llama":
        yield from _linear_shapes(model, "feed_forward.gate", width, width_ff)
    yield from _linear_shapes(model, "feed_forward.up", width, width_ff)
    yield from _linear_shapes(model, "feed_forward.down", width_ff, width)


class NumParameters(NamedTuple):
    """How many numbers are learnt; padded vocabulary rows count."""

    total: int
    without_embedding: int
    """Without token embedding and position table; a head that is tied to the embedding goes with it."""


def num_parameters(model: Model, vocabulary_tokens: int) -> NumParameters:
    """Count the parameters."""
    sizes = {name: prod(shape) for name, shape in parameter_shapes(model, vocabulary_tokens).items()}
    tables = sizes["embedding.weight"] + sizes.get("positions.weight", 0)
    return NumParameters(sum(sizes.values()), sum(sizes.values()) - tables)


class FlopsPerToken(NamedTuple):
    """Floating-point operations of forward and backward pass for one token, recomputation not counted."""

    full: float
    """6 N + 12 L D T: every query meets every key (PaLM, arXiv 2204.02311, appendix B)."""
    causal: float
    """6 N + 6 L D T: a query meets, on average, half of the keys."""


def flops_per_token(model: Model, vocabulary_tokens: int, sequence_tokens: int) -> FlopsPerToken:
    """FLOPs of training one token; N counts what multiplies: no lookup tables, but the head, tied or not."""
    multiplied = num_parameters(model, vocabulary_tokens).without_embedding
    if model.head_is_tied:
        multiplied += padded_vocabulary(model, vocabulary_tokens) * model.d_model
    attention = 12.0 * model.layers * model.d_model * sequence_tokens
    return FlopsPerToken(6.0 * multiplied + attention, 6.0 * multiplied + attention / 2)


def saved_activation_bytes(
    model: Model,
    num_sequences: int,
    sequence_tokens: int,
    precision: Precision,
    recompute: Recompute,
    *,
    attention_in_fp32: bool | None = None,
) -> int:
    """Bytes that autograd keeps from the forward pass until the backward pass, without the head.

    Casts of fp32 weights are not in it (`weight_copy_bytes`), nor is the block that is recomputed
    (`block_activation_bytes`). `attention_in_fp32` says whether a bf16 run's attention call gets fp32 inputs, which
    depends on the machine; when None, what a CPU with bf16 units does.
    """
    num_tokens = num_sequences * sequence_tokens
    width_bytes = num_tokens * model.d_model * ACTIVATION_BYTES[precision]
    if recompute == "full":
        blocks = model.layers * width_bytes
    else:
        per_block = block_activation_bytes(
            model,
            num_sequences,
            sequence_tokens,
            precision,
            selective=recompute == "selective",
            attention_in_fp32=attention_in_fp32,
        )
        blocks = model.layers * per_block
    ids = num_tokens * 8
    rotary = sequence_tokens * model.d_head * FP32_BYTES if model.position_kind == "rotary" else 0
    positions = sequence_tokens * 8 if model.position_kind == "learned" else 0
    embedding_dropout = width_bytes if model.dropout else 0
    final_norm = num_tokens * _norm_bytes(model)
    return blocks + ids + rotary + positions + embedding_dropout + final_norm


def block_activation_bytes(
    model: Model,
    num_sequences: int,
    sequence_tokens: int,
    precision: Precision,
    *,
    selective: bool = False,
    attention_in_fp32: bool | None = None,
) -> int:
    """Bytes that autograd keeps of one block; `selective`: only its input and its matmul and attention outputs."""
    if attention_in_fp32 is None:
        attention_in_fp32 = sequence_tokens < SHORT_ATTENTION_TOKENS
    activation = ACTIVATION_BYTES[precision]
    in_attention = FP32_BYTES if attention_in_fp32 else activation
    width, width_ff, width_kv = model.d_model, model.width_ff, model.num_kv_heads * model.d_head
    attention = (2 * width + 2 * width_kv) * in_attention + model.heads * FP32_BYTES
    if selective:
        projections = (2 * width + 2 * width_kv) * activation
        feed_forward = (width_ff * (2 if model.family == "llama" else 1) + width) * activation
        output = (width + model.heads * FP32_BYTES // in_attention) * in_attention
        per_token = width * activation + projections + output + feed_forward
    else:
        cast_output = width * activation if in_attention != activation else 0
        norms = 2 * (_norm_bytes(model) + width * activation) + _qk_norm_bytes(model)
        feed_forward = width_ff * (4 if model.family == "llama" else 2) * activation
        dropout = 2 * width * activation if model.dropout else 0
        per_token = attention + cast_output + norms + feed_forward + dropout
    return num_sequences * sequence_tokens * per_token


def _norm_bytes(model: Model) -> int:
    """What one norm keeps per token: its input in fp32, its statistics, and for RMSNorm the normalised input."""
    if model.family == "gpt2":
        return model.d_model * FP32_BYTES + 2 * FP32_BYTES
    return 2 * model.d_model * FP32_BYTES + FP32_BYTES


def _qk_norm_bytes(model: Model) -> int:
    heads = model.heads + model.num_kv_heads
    return heads * (2 * model.d_head * FP32_BYTES + FP32_BYTES) if model.qk_norm else 0


def weight_copy_bytes(model: Model, vocabulary_tokens: int, precision: Precision) -> int:
    """Bytes of the bf16 copies that autograd keeps of the blocks' weights where an engine holds them in fp32."""
    if precision == "fp32":
        return 0
    shapes = parameter_shapes(model, vocabulary_tokens)
    return sum(prod(shape) for name, shape in shapes.items() if name.startswith("blocks.")) * ACTIVATION_BYTES["bf16"]


class HeadBytes(NamedTuple):
    """Memory of the language head's loss."""

    kept: int
    """From forward to backward pass: gradients of hidden states and of the weight."""
    transient: int
    """On top while the loss is computed: one chunk of logits and the cast weight."""


def head_bytes(
    model: Model, vocabulary_tokens: int, num_sequences: int, sequence_tokens: int, precision: Precision
) -> HeadBytes:
    """Memory of the loss in training; the logits of all positions never exist at one time."""
    activation, vocabulary = ACTIVATION_BYTES[precision], padded_vocabulary(model, vocabulary_tokens)
    num_tokens = num_sequences * sequence_tokens
    kept = num_tokens * model.d_model * activation + vocabulary * model.d_model * FP32_BYTES
    rows = min(num_tokens, head_chunk_rows(vocabulary))
    narrow_copies = 0 if precision == "fp32" else 2 * rows * vocabulary * activation
    cast_weight = 0 if precision == "fp32" else vocabulary * model.d_model * activation
    weight_product = vocabulary * model.d_model * activation
    return HeadBytes(kept, rows * vocabulary * FP32_BYTES + narrow_copies + cast_weight + weight_product)
