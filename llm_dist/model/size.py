"""What a model of a given shape holds and computes, as arithmetic; imports no torch, so that a login node can plan.

Everything is a function of the run file's `[model]` and the tokenizer's vocabulary. Tests hold each formula against
what the real module registers and what autograd really keeps; nothing here may guess.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Literal, NamedTuple

from llm_dist.config import LANGUAGE, Heads, Lora, Model
from llm_dist.model.adapter_size import with_adapters

Precision = Literal["fp32", "bf16"]
Recompute = Literal["none", "selective", "full"]
Shape = tuple[int, ...]

FP32_BYTES = 4
ACTIVATION_BYTES: dict[Precision, int] = {"fp32": FP32_BYTES, "bf16": 2}

SHORT_ATTENTION_TOKENS = 256
"""Below this many keys a CPU computes bf16 attention in fp32: its bf16 backward pass is slower than the cast."""

HEAD_CHUNK_LOGITS = 2**24
HEAD_CHUNK_MIN_ROWS = 512
_BODY = ("blocks.", "norm.", "embedding_norm.")


class Machine(NamedTuple):
    """What the kernels that are chosen, and so what they keep, depend on."""

    is_cpu: bool
    multiplies_bf16: bool
    """Whether it has units for bf16 products; a CPU without them widens their operands to fp32."""

    def widens(self, precision: Precision) -> bool:
        """Whether products run on fp32 copies."""
        return self.is_cpu and precision == "bf16" and not self.multiplies_bf16

    def attention_bytes(self, precision: Precision, sequence_tokens: int) -> int:
        """Bytes of an element that attention reads and keeps."""
        is_short = self.is_cpu and sequence_tokens < SHORT_ATTENTION_TOKENS
        return FP32_BYTES if is_short or self.widens(precision) else ACTIVATION_BYTES[precision]


GPU = Machine(is_cpu=False, multiplies_bf16=True)


def padded_vocabulary(model: Model, vocabulary_tokens: int) -> int:
    """Rows of the embedding: the vocabulary rounded up to a multiple of `model.vocabulary_multiple`."""
    return -(-vocabulary_tokens // model.vocabulary_multiple) * model.vocabulary_multiple


def head_chunk_rows(padded_vocabulary_tokens: int) -> int:
    """Positions whose logits exist at one time in the head."""
    return max(HEAD_CHUNK_MIN_ROWS, HEAD_CHUNK_LOGITS // padded_vocabulary_tokens)


def parameter_shapes(
    model: Model, vocabulary_tokens: int, heads: Heads = LANGUAGE, lora: Lora | None = None
) -> dict[str, Shape]:
    """Names and shapes exactly as `Transformer.named_parameters` gives them, in that order.

    Raises:
        UserError: `lora.targets` means no layer.
    """
    width, vocabulary = model.d_model, padded_vocabulary(model, vocabulary_tokens)
    shapes: dict[str, Shape] = {"embedding.weight": (vocabulary, width)}
    if model.positions == "learned":
        shapes["positions.weight"] = (model.max_sequence_tokens, width)
    if model.segments:
        shapes["segments.weight"] = (model.segments, width)
    if model.embedding_norm:
        shapes |= dict(_norm_shapes(model, "embedding_norm"))
    for layer in range(model.layers):
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in _block_shapes(model, layer)}
    if model.norm_position == "pre":
        shapes |= dict(_norm_shapes(model, "norm"))
    shapes |= dict(_head_shapes(model, vocabulary, heads))
    return shapes if lora is None else with_adapters(shapes, lora)


def _head_shapes(model: Model, vocabulary: int, heads: Heads) -> Iterator[tuple[str, Shape]]:
    width = model.d_model
    if heads.language:
        if not model.tied_head:
            yield "head.weight", (vocabulary, width)
        if model.head_transform:
            yield "head.bias", (vocabulary,)
            yield from _linear_shapes("head.transform.dense", width, width, model.biases == "all")
            yield from _norm_shapes(model, "head.transform.norm")
    if heads.has_pooler(model):
        yield from _linear_shapes("pooler.dense", width, width, has_bias=True)
    if heads.pair:
        yield from _linear_shapes("pair_head.output", width, 2, has_bias=True)
    if heads.classes:
        yield from _linear_shapes("class_head.output", width, heads.classes, has_bias=True)


def _norm_shapes(model: Model, name: str) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (model.d_model,)
    if model.norm_bias:
        yield f"{name}.bias", (model.d_model,)


def _linear_shapes(name: str, inputs: int, outputs: int, has_bias: bool) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (outputs, inputs)
    if has_bias:
        yield f"{name}.bias", (outputs,)


def _block_shapes(model: Model, layer: int) -> Iterator[tuple[str, Shape]]:
    width, width_ff = model.d_model, model.width_ff
    width_q, width_kv = model.heads * model.d_head, model.num_kv_heads * model.d_head
    into, others = model.biases != "none", model.biases == "all"
    if model.has_attention_norm(layer):
        yield from _norm_shapes(model, "attention_norm")
    yield from _linear_shapes("attention.query", width, width_q, into)
    yield from _linear_shapes("attention.key", width, width_kv, into)
    yield from _linear_shapes("attention.value", width, width_kv, into)
    yield from _linear_shapes("attention.output", width_q, width, others)
    if model.qk_norm:
        yield "attention.query_norm.weight", (model.d_head,)
        yield "attention.key_norm.weight", (model.d_head,)
    yield from _norm_shapes(model, "feed_forward_norm")
    if model.is_gated:
        yield from _linear_shapes("feed_forward.gate", width, width_ff, others)
    yield from _linear_shapes("feed_forward.up", width, width_ff, others)
    yield from _linear_shapes("feed_forward.down", width_ff, width, others)


class NumParameters(NamedTuple):
    """How many numbers are learnt; padded vocabulary rows count."""

    total: int
    without_embedding: int
    """Without token embedding and position table; a head that is tied to the embedding goes with it."""


def num_parameters(model: Model, vocabulary_tokens: int, heads: Heads = LANGUAGE) -> NumParameters:
    """Count the parameters."""
    sizes = {name: prod(shape) for name, shape in parameter_shapes(model, vocabulary_tokens, heads).items()}
    tables = sum(sizes.get(name, 0) for name in ("embedding.weight", "positions.weight", "segments.weight"))
    return NumParameters(sum(sizes.values()), sum(sizes.values()) - tables)


class FlopsPerToken(NamedTuple):
    """Floating-point operations of forward and backward pass for one token, recomputation not counted."""

    full: float
    """6 N + 12 L H E T: every query meets every key (PaLM, arXiv 2204.02311, appendix B)."""
    causal: float
    """6 N + 6 L H E T: a query meets, on average, half of the keys; `full` where attention is not causal."""


def flops_per_token(
    model: Model, vocabulary_tokens: int, sequence_tokens: int, heads: Heads = LANGUAGE, scored_share: float = 1.0
) -> FlopsPerToken:
    """FLOPs of training one token; N counts what multiplies: no lookup tables, but the head, tied or not.

    `scored_share` of the tokens reach the head; of the others it computes nothing.
    """
    shapes = parameter_shapes(model, vocabulary_tokens, heads)
    body = sum(prod(shape) for name, shape in shapes.items() if name.startswith(_BODY))
    head = sum(prod(shape) for name, shape in shapes.items() if name.startswith("head."))
    if heads.language and model.tied_head:
        head += padded_vocabulary(model, vocabulary_tokens) * model.d_model
    multiplied = body + scored_share * head
    attention = 12.0 * model.layers * model.heads * model.d_head * sequence_tokens
    return FlopsPerToken(
        6.0 * multiplied + attention, 6.0 * multiplied + (attention / 2 if model.is_causal else attention)
    )


def saved_activation_bytes(
    model: Model,
    num_sequences: int,
    sequence_tokens: int,
    precision: Precision,
    recompute: Recompute,
    machine: Machine = GPU,
) -> int:
    """Bytes that autograd keeps from the forward pass until the backward pass, without the head.

    Casts of fp32 weights are not in it (`weight_copy_bytes`), nor is what a block that is recomputed keeps then
    (`backward_block_bytes`).
    """
    num_tokens = num_sequences * sequence_tokens
    blocks = model.layers * block_activation_bytes(model, num_sequences, sequence_tokens, precision, recompute, machine)
    ids = num_tokens * 8
    tables = 2 if model.window_tokens is not None and model.window_rope_theta not in (None, model.rope_theta) else 1
    rotary = tables * sequence_tokens * model.d_head * FP32_BYTES if model.positions == "rotary" else 0
    positions = sequence_tokens * 8 if model.positions == "learned" else 0
    embedding_norm = num_tokens * _norm_bytes(model) if model.embedding_norm else 0
    embedding_dropout = num_tokens * model.d_model * ACTIVATION_BYTES[precision] if model.dropout else 0
    final_norm = num_tokens * _norm_bytes(model) if model.norm_position == "pre" else 0
    return blocks + ids + rotary + positions + embedding_norm + embedding_dropout + final_norm


def block_activation_bytes(
    model: Model,
    num_sequences: int,
    sequence_tokens: int,
    precision: Precision,
    recompute: Recompute,
    machine: Machine = GPU,
) -> int:
    """Bytes that autograd keeps of one block from the forward pass on."""
    in_attention = machine.attention_bytes(precision, sequence_tokens)
    match recompute:
        case "full":
            per_token = model.d_model * ACTIVATION_BYTES[precision]
        case "selective":
            per_token = _selective_bytes(model, precision, in_attention, machine)
        case "none":
            per_token = _whole_block_bytes(model, precision, in_attention)
    return num_sequences * sequence_tokens * per_token


def _whole_block_bytes(model: Model, precision: Precision, in_attention: int) -> int:
    """Per token: all that the backward pass of one block needs."""
    activation, width = ACTIVATION_BYTES[precision], model.d_model
    width_q, width_kv = model.heads * model.d_head, model.num_kv_heads * model.d_head
    attention = (2 * width_q + 2 * width_kv) * in_attention + model.heads * FP32_BYTES
    cast_output = width_q * activation if in_attention != activation else 0
    norms = 2 * (_norm_bytes(model) + width * activation) + _qk_norm_bytes(model)
    feed_forward = model.width_ff * _kept_factors(model) * activation
    dropout = 2 * width * activation if model.dropout else 0
    return attention + cast_output + norms + feed_forward + dropout


def _selective_bytes(model: Model, precision: Precision, in_attention: int, machine: Machine) -> int:
    """Per token: a block's input and what its products and its attention return."""
    width, width_q, width_kv = model.d_model, model.heads * model.d_head, model.num_kv_heads * model.d_head
    product = FP32_BYTES if machine.widens(precision) else ACTIVATION_BYTES[precision]
    projections = (width + width_q + 2 * width_kv) * product
    feed_forward = (model.width_ff * (2 if model.is_gated else 1) + width) * product
    attention = width_q * in_attention + model.heads * FP32_BYTES
    return width * ACTIVATION_BYTES[precision] + projections + attention + feed_forward


def backward_block_bytes(
    model: Model,
    num_sequences: int,
    sequence_tokens: int,
    precision: Precision,
    recompute: Recompute,
    machine: Machine = GPU,
) -> int:
    """Bytes on top of what is kept while a block's backward pass runs: what it recomputes, and gradients at once."""
    num_tokens, width, width_ff = num_sequences * sequence_tokens, model.d_model, model.width_ff
    kept, whole = (
        block_activation_bytes(model, num_sequences, sequence_tokens, precision, kind, machine)
        for kind in (recompute, "none")
    )
    recomputed = max(0, whole - kept) if recompute != "none" else 0
    # Of the residual, of what `down` reads, and of the one or two factors that this is made of.
    gradients = num_tokens * (width + width_ff * (3 if model.is_gated else 2)) * ACTIVATION_BYTES[precision]
    widened = 0
    if machine.widens(precision):
        of_weight = width * width_ff * (FP32_BYTES + ACTIVATION_BYTES[precision])
        widened = num_tokens * (width + width_ff) * FP32_BYTES + of_weight
    return recomputed + gradients + widened


def _norm_bytes(model: Model) -> int:
    """What one norm keeps per token: its input in fp32, its statistics, and for RMSNorm the normalised input."""
    if model.norm == "layer":
        return model.d_model * FP32_BYTES + 2 * FP32_BYTES
    return 2 * model.d_model * FP32_BYTES + FP32_BYTES


def _kept_factors(model: Model) -> int:
    """How many tensors [T, F] the feed-forward keeps: relu's result is what `down` keeps anyway."""
    return 4 if model.is_gated else 1 if model.feed_forward == "relu" else 2


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
    """From forward to backward pass: gradients of hidden states, weight and bias, and what a transform keeps."""
    transient: int
    """On top while the loss is computed: one chunk of logits, their gradients, the cast weight."""


def head_bytes(
    model: Model,
    vocabulary_tokens: int,
    num_sequences: int,
    sequence_tokens: int,
    precision: Precision,
    machine: Machine = GPU,
    *,
    weight_is_fp32: bool = True,
    weight_is_trained: bool = True,
) -> HeadBytes:
    """Memory of the loss in training; the logits of all positions never exist at one time.

    Of the `sequence_tokens` of each sequence, those that are scored count.
    """
    activation, vocabulary = ACTIVATION_BYTES[precision], padded_vocabulary(model, vocabulary_tokens)
    num_tokens, weight = num_sequences * sequence_tokens, vocabulary * model.d_model
    gradient = weight if weight_is_trained else 0
    kept = num_tokens * model.d_model * activation + gradient * FP32_BYTES
    if model.head_transform:
        kept += num_tokens * (2 * model.d_model * activation + _norm_bytes(model)) + vocabulary * FP32_BYTES
    rows = min(num_tokens, head_chunk_rows(vocabulary))
    logits, has_earlier_chunk = rows * vocabulary, num_tokens > rows
    cast_weight = weight * activation if precision == "bf16" and weight_is_fp32 else 0
    if precision == "fp32":  # a chunk's gradients are its logits, overwritten; an earlier chunk's live until the next
        softmax = logits * FP32_BYTES * (3 if has_earlier_chunk else 2)
        products = (logits + gradient) * FP32_BYTES
    else:
        pair = logits * (FP32_BYTES + activation)  # logits and their gradient, or logits as they come
        softmax = 2 * pair if has_earlier_chunk else 2 * logits * FP32_BYTES
        products = pair + gradient * activation
        if machine.widens(precision):
            products = pair + (logits + gradient + rows * model.d_model) * FP32_BYTES
    return HeadBytes(kept, cast_weight + max(softmax, products))
