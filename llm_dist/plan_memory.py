"""Bytes a rank holds: exactly between steps, and at the fullest moment of a step; arithmetic only, no torch.

Four moments of a step can be the fullest: the loss (all activations, and logits), the backward pass of the last block
(all activations), that of the first (all gradients), and the update (gradients on their way). What a vendor allocates
beside the state follows its source (DeepSpeed 0.19, torch 2.13); tests hold the sums against resident memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, prod
from typing import NamedTuple

from llm_dist.config import Config
from llm_dist.config_lora import ADAPTER
from llm_dist.model import size
from llm_dist.model.size import ACTIVATION_BYTES, FP32_BYTES, GPU, HeadBytes, Machine

MOMENTS = {"adamw": 2, "sgd": 0}
"""fp32 values an optimizer keeps for each parameter."""
NEVER_DECAYED = ("embedding.", "positions.", "segments.")
"""As in `optim`, which loads torch."""
ZERO_BUCKET_ELEMENTS = 500_000_000
"""Gradients DeepSpeed collects before it reduces them (its default)."""
ZERO_LIVE_ELEMENTS = 1_000_000_000
"""Parameters ZeRO-3 keeps gathered at one time, where the model has so many (DeepSpeed's default)."""


@dataclass(frozen=True)
class Memory:
    """Bytes of the fullest rank by kind; the runtime itself (libraries, CUDA context) is not counted."""

    weights: int
    """What the module holds: fp32, or bf16 under ZeRO."""
    gradients: int
    optimizer: int
    """Moments, and under ZeRO the masters."""
    working: int
    """bf16 casts kept for the backward pass, gathered blocks, gradients being reduced: where they are most."""
    activations: int
    """Kept from the forward pass, and what one block's backward pass adds."""
    head: int
    """Logits, and what their loss keeps."""
    between_steps: int
    """What stays: weights, optimizer, and gradients that are kept allocated; exact."""
    peak: int
    """Most at one time; less than the sum, since the kinds are not at their fullest together."""

    @property
    def state(self) -> int:
        """What a rank must hold to go on: weights and optimizer."""
        return self.weights + self.optimizer


class _Held(NamedTuple):
    """What an engine holds, without activations and head; `in_` counts gradients and buffers at that moment."""

    weights: int
    optimizer: int
    gradients: int
    staying_gradients: int
    in_loss: int
    in_last_block: int
    in_first_block: int
    in_update: int
    after_block: int = 0
    """Of reducing a block's gradients where that waits until the block's backward pass is over."""


class _Sizes(NamedTuple):
    """Elements of the model and how a step is cut: what every engine's arithmetic starts from."""

    config: Config
    shapes: dict[str, size.Shape]
    ranks: int
    group: int
    """Ranks that partition between them."""
    accumulates: bool
    machine: Machine

    @property
    def total(self) -> int:
        return sum(map(prod, self.shapes.values()))

    @property
    def trained(self) -> int:
        """Elements that have gradients and moments."""
        return sum(prod(shape) for name, shape in self.shapes.items() if self.config.trains(name))

    @property
    def trained_in_block(self) -> int:
        return (self.trained - self.trained_outside) // self.config.model.layers

    @property
    def trained_outside(self) -> int:
        outside = (name for name in self.shapes if not name.startswith("blocks.") and self.config.trains(name))
        return sum(prod(self.shapes[name]) for name in outside)

    @property
    def in_blocks(self) -> int:
        return sum(prod(shape) for name, shape in self.shapes.items() if name.startswith("blocks."))

    @property
    def one_block(self) -> int:
        return self.in_blocks // self.config.model.layers

    @property
    def trained_embedding(self) -> int:
        return prod(self.shapes["embedding.weight"]) if self.config.trains("embedding.weight") else 0

    @property
    def weight_bytes(self) -> int:
        """Of an element as the engines that cast before the forward pass hold it."""
        return ACTIVATION_BYTES[self.config.engine.precision]


def memory_of(
    config: Config,
    vocabulary_tokens: int,
    ranks: int,
    dealing: tuple[int, int],
    group: int,
    machine: Machine = GPU,
) -> Memory:
    """Bytes of the fullest rank.

    Args:
        config: the run file.
        vocabulary_tokens: of the tokenizer, not padded.
        ranks: of the run.
        dealing: micro-batches in a step, and rows in each.
        group: ranks over which the engine partitions.
        machine: whose kernels compute.
    """
    num_micro_batches, rows = dealing
    shapes = size.parameter_shapes(config.model, vocabulary_tokens, config.heads, config.lora)
    sizes = _Sizes(config, shapes, ranks, group, num_micro_batches > 1, machine)
    held = _engine(config)(sizes)
    computed = (config.model, rows, config.data.sequence_tokens, config.engine.precision, config.engine.recompute)
    saved = size.saved_activation_bytes(*computed, machine) + _adapter_bytes(config, shapes, rows)
    kept_of_block = size.block_activation_bytes(*computed, machine)
    backward = size.backward_block_bytes(*computed, machine)
    weight_is_fp32 = config.engine.name == "plain"
    head = HeadBytes(0, 0)
    if config.heads.language:
        scored = (rows, config.scored_tokens, config.engine.precision)
        head = size.head_bytes(
            config.model,
            vocabulary_tokens,
            *scored,
            machine,
            weight_is_fp32=weight_is_fp32,
            weight_is_trained=config.trains("embedding.weight" if config.model.tied_head else "head.weight"),
        )
    moments = (
        held.in_loss + saved + head.kept + head.transient,
        held.in_last_block + saved + head.kept + max(backward, held.after_block),
        held.in_first_block + kept_of_block + max(backward, held.after_block),
        held.in_update,
    )
    buffers = max(held.in_loss, held.in_last_block, held.in_first_block, held.in_update)
    state = held.weights + held.optimizer
    return Memory(
        weights=held.weights,
        gradients=held.gradients,
        optimizer=held.optimizer,
        working=max(0, buffers - held.gradients),
        activations=saved + backward,
        head=sum(head),
        between_steps=state + held.staying_gradients,
        peak=state + max(moments),
    )


def _adapter_bytes(config: Config, shapes: dict[str, size.Shape], rows: int) -> int:
    """What low-rank updates keep: what stands between their two products, and their inputs where some are left out."""
    if config.engine.recompute != "none":
        return 0
    downs = [shape for name, shape in shapes.items() if name.endswith(f"{ADAPTER}down")]
    per_token = sum(rank + (inputs if config.lora.dropout else 0) for rank, inputs in downs)
    return rows * config.data.sequence_tokens * per_token * ACTIVATION_BYTES[config.engine.precision]


def _engine(config: Config) -> Callable[[_Sizes], _Held]:
    if config.engine.name == "plain":
        return _plain
    if config.engine.name == "fsdp":
        return _fsdp
    return (_zero_0, _zero_1, _zero_2, _zero_3)[config.engine.zero_stage]


def _plain(sizes: _Sizes) -> _Held:
    """bf16 casts live as long as their block's activations; DDP keeps its buckets, and accumulates beside them."""
    config, total = sizes.config, FP32_BYTES * sizes.total
    of_block = sizes.one_block * ACTIVATION_BYTES["bf16"] if config.engine.precision == "bf16" else 0
    casts = of_block * config.model.layers if config.engine.recompute == "none" else 0
    gradients = FP32_BYTES * sizes.trained
    buckets = gradients if sizes.ranks > 1 else 0
    waiting = gradients if sizes.accumulates else 0
    last = FP32_BYTES * sizes.trained_embedding  # computed whole, then added to what is there
    arrived = max(waiting, 0 if buckets else gradients - last - FP32_BYTES * sizes.trained_in_block)
    return _Held(
        weights=total,
        optimizer=gradients * MOMENTS[config.optim.name],
        gradients=buckets + waiting or gradients,
        staying_gradients=buckets,
        in_loss=buckets + waiting + casts,
        in_last_block=buckets + waiting + max(casts, of_block),
        in_first_block=buckets + arrived + of_block,
        in_update=max(gradients, buckets + waiting + (last if buckets or waiting else 0)),
    )


def _fsdp(sizes: _Sizes) -> _Held:
    """Blocks are gathered one ahead; what lies outside them stays gathered and is reduced after all others."""
    own = {name: ceil(shape[0] / sizes.group) * prod(shape[1:]) for name, shape in sizes.shapes.items()}
    outside, block = sizes.total - sizes.in_blocks, sizes.one_block
    trained_block, trained_outside = sizes.trained_in_block, sizes.trained_outside
    held = FP32_BYTES * sum(own.values())
    gradients = FP32_BYTES * sum(elements for name, elements in own.items() if sizes.config.trains(name))
    waiting = gradients if sizes.accumulates else 0
    reduced = sizes.weight_bytes + FP32_BYTES * (2 if sizes.machine.is_cpu else 1)  # gloo reduces a copy
    gathered = sizes.weight_bytes * (outside + 2 * block)
    overlapping = 0 if sizes.machine.is_cpu else reduced * trained_block  # a GPU computes the next block meanwhile
    return _Held(
        weights=held,
        optimizer=gradients * MOMENTS[sizes.config.optim.name],
        gradients=gradients,
        staying_gradients=0,
        in_loss=waiting + gathered - sizes.weight_bytes * block,
        in_last_block=waiting + gathered + overlapping,
        in_first_block=gradients + gathered + overlapping,
        in_update=waiting + gradients + sizes.weight_bytes * outside + reduced * trained_outside,
        after_block=0 if overlapping else reduced * trained_block,
    )


def _zero_0(sizes: _Sizes) -> _Held:
    """Every rank holds everything; in bf16 beside fp32 masters, with gradients in bf16 until they are reduced."""
    total, is_bf16 = sizes.total, sizes.weight_bytes < FP32_BYTES
    gradients = sizes.weight_bytes * total
    waiting = gradients if sizes.accumulates else 0
    flattened = (sizes.weight_bytes + (FP32_BYTES if is_bf16 else 0)) * min(total, ZERO_BUCKET_ELEMENTS)
    return _Held(
        weights=sizes.weight_bytes * total,
        optimizer=FP32_BYTES * total * (MOMENTS[sizes.config.optim.name] + is_bf16),
        gradients=gradients,
        staying_gradients=0,
        in_loss=waiting,
        in_last_block=waiting,
        in_first_block=gradients,
        in_update=gradients + max(flattened, FP32_BYTES * total if is_bf16 else 0),
    )


def _padded(sizes: _Sizes) -> int:
    """Elements of the flat buffers of stages 1 and 2: each group of the optimizer is filled up for its ranks."""
    alignment = 2 * sizes.ranks
    decayed = sum(
        prod(shape)
        for name, shape in sizes.shapes.items()
        if len(shape) > 1 and not any(part in name for part in NEVER_DECAYED)
    )
    return sum(ceil(elements / alignment) * alignment for elements in (decayed, sizes.total - decayed))


def _partitioned(sizes: _Sizes, padded: int, gradients: int, moments: tuple[int, int, int, int]) -> _Held:
    own = padded // sizes.ranks
    optimizer = FP32_BYTES * own * (MOMENTS[sizes.config.optim.name] + 1)
    return _Held(sizes.weight_bytes * padded, optimizer, gradients, 0, *moments)


def _bucket(sizes: _Sizes) -> int:
    """Elements of a bucket: reserved whole, but on a CPU only what is written becomes memory."""
    return min(sizes.total, ZERO_BUCKET_ELEMENTS) if sizes.machine.is_cpu else ZERO_BUCKET_ELEMENTS


def _zero_1(sizes: _Sizes) -> _Held:
    """Gradients are whole and fp32, and reduced on a copy; in bf16 another class keeps their buffer for good."""
    padded, copied = _padded(sizes), FP32_BYTES * min(sizes.total, ZERO_BUCKET_ELEMENTS)
    if sizes.weight_bytes < FP32_BYTES:
        gradients = FP32_BYTES * padded
        moments = (gradients, gradients, gradients, gradients + copied)
        return _partitioned(sizes, padded, gradients, moments)._replace(staying_gradients=gradients)
    gradients = FP32_BYTES * sizes.total
    waiting = gradients if sizes.accumulates else 0
    unused = FP32_BYTES * _bucket(sizes) - copied
    return _partitioned(sizes, padded, gradients, (waiting, waiting, gradients, gradients + copied + unused))


def _zero_2(sizes: _Sizes) -> _Held:
    """A bucket in the weights' precision fills up, is copied, in bf16 widened, and reduced; this rank's part stays."""
    padded = _padded(sizes)
    gradients = FP32_BYTES * (padded // sizes.ranks)
    waiting, bucket = gradients if sizes.accumulates else 0, sizes.weight_bytes * _bucket(sizes)
    full = min(sizes.total, ZERO_BUCKET_ELEMENTS)
    copied = full * (sizes.weight_bytes + (FP32_BYTES if sizes.weight_bytes < FP32_BYTES else 0))
    # More than one bucket: it is reduced while blocks are still to come.
    early = copied + gradients if sizes.total > ZERO_BUCKET_ELEMENTS else 0
    in_last_block = max(waiting, early) + (0 if sizes.machine.is_cpu and not early else bucket)
    moments = (waiting, in_last_block, max(waiting, early) + bucket, gradients + bucket + copied)
    return _partitioned(sizes, padded, gradients, moments)


def _zero_3(sizes: _Sizes) -> _Held:
    """The bucket and this rank's gradients stay; gathered weights stay while they will be used again soon."""
    own = sum(ceil(prod(shape) / sizes.ranks) for shape in sizes.shapes.values())
    gradients, bucket = FP32_BYTES * own, FP32_BYTES * _bucket(sizes)
    gathered = sizes.weight_bytes * min(sizes.total, ZERO_LIVE_ELEMENTS)
    full = FP32_BYTES * min(sizes.total, ZERO_BUCKET_ELEMENTS)
    copied = full * (2 if sizes.machine.is_cpu else 1)  # gloo reduces a copy
    early = copied if sizes.total > ZERO_BUCKET_ELEMENTS else 0
    in_pass = gradients + bucket + gathered
    return _Held(
        weights=sizes.weight_bytes * own,
        optimizer=FP32_BYTES * own * (MOMENTS[sizes.config.optim.name] + 1),
        gradients=gradients,
        staying_gradients=gradients,
        in_loss=in_pass,
        in_last_block=in_pass + early,
        in_first_block=in_pass + early,
        in_update=gradients + bucket + max(copied, gradients),
    )
