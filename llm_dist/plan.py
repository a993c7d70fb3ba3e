"""What a run needs, before it is paid for: rows, memory, traffic, time and cost; arithmetic only.

Nothing here starts a process, reads a file or imports torch. Rows and state bytes are exact; what the backward pass
keeps comes from `llm_dist.model.size`; traffic is each engine's theory; time rests on the stated utilisation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from math import ceil, isqrt, prod
from typing import Any

from llm_dist.config import Config
from llm_dist.errors import UserError
from llm_dist.model import size
from llm_dist.model.hugging_face import hugging_face_class, why_not_exportable

ASSUMED_UTILISATION = 0.40
"""Share of a GPU's dense bf16 peak that the model's own FLOPs are assumed to reach."""
USABLE_MEMORY = 0.90
"""The rest of a GPU's memory goes to the CUDA context, communication buffers and fragmentation."""
MOMENTS = {"adamw": 2, "sgd": 0}
"""fp32 values an optimizer keeps for each parameter."""
ZERO_BUCKET_ELEMENTS = 500_000_000
"""Gradients DeepSpeed collects before it reduces them (its default)."""
ZERO_LIVE_ELEMENTS = 1_000_000_000
"""Parameters ZeRO-3 keeps gathered at one time, where the model has so many (DeepSpeed's default)."""


@dataclass(frozen=True)
class Gpu:
    """A device as its data sheet gives it."""

    memory_bytes: int
    bf16_flops: float
    """Dense, per second."""


GPUS = {
    "H100": Gpu(80 * 10**9, 989e12),
    "H200": Gpu(141 * 10**9, 989e12),
    "B200": Gpu(180 * 10**9, 2250e12),
    "A100-80": Gpu(80 * 10**9, 312e12),
    "A100-40": Gpu(40 * 10**9, 312e12),
    "L40S": Gpu(48 * 10**9, 362e12),
    "4090": Gpu(24 * 10**9, 165e12),
}


@dataclass(frozen=True)
class Rows:
    """How the sequences of a step are dealt to ranks and micro-batches."""

    sequences_per_step: int
    ranks: int
    sequences_per_micro_batch: int
    """At most, as the run file says."""
    num_micro_batches: int
    rows_per_micro_batch: int
    """What a rank really computes at once: its rows dealt evenly to the micro-batches."""
    waste: float
    """Share of the computed rows that are absent: padded, weighing nothing."""
    nearest: tuple[str, ...]
    """Settings without waste nearest to these; empty where nothing is wasted."""


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank by kind; the runtime itself (libraries, CUDA context) is not counted."""

    weights: int
    """What the module holds: fp32, or bf16 under ZeRO."""
    gradients: int
    optimizer: int
    """Moments, and under ZeRO the masters."""
    working: int
    """bf16 casts kept for the backward pass, gathered blocks, buckets being reduced."""
    activations: int
    head: int
    """Logits, and what their loss keeps."""
    peak: int
    """Most at one time; less than the sum where gradients come as activations go."""

    @property
    def state(self) -> int:
        """What stays between steps."""
        return self.weights + self.optimizer


@dataclass(frozen=True)
class Pace:
    """Time and cost on a named GPU."""

    gpu: str
    memory_bytes: int
    fits: bool
    utilisation: float
    """Assumed, of the dense bf16 peak."""
    seconds_per_step: float
    days: float
    gpu_hours: float
    cost: float | None


@dataclass(frozen=True)
class Plan:
    """All that is known of a run before it starts."""

    num_parameters: int
    vocabulary_tokens: int
    hugging_face: str | None
    """Class the model exports to; None where it cannot be exported."""
    not_exportable: str | None
    """Which key stands in the way, and why."""
    flops_per_token: float
    """6 N + 12 layers D T, the usual convention."""
    flops_per_token_causal: float
    """Attention counted below the diagonal only."""
    rows: Rows
    memory: Memory
    traffic_bytes_per_step: int
    """Sent by a rank in a step, in theory."""
    tokens: int
    """Read by the whole run."""
    epochs: float | None
    pace: Pace | None
    warnings: tuple[str, ...]

    def as_table(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "memory": {**asdict(self.memory), "state": self.memory.state}}


def make_plan(
    config: Config,
    vocabulary_tokens: int,
    ranks: int,
    num_tokens: int | None = None,
    *,
    gpu: str | None = None,
    price_per_hour: float | None = None,
) -> Plan:
    """Plan a run.

    Args:
        config: the run file.
        vocabulary_tokens: of the tokenizer, not padded.
        ranks: processes, one per GPU.
        num_tokens: of the training data, where known.
        gpu: a key of `GPUS`; without it there is no time, cost or verdict.
        price_per_hour: of one GPU, in any currency.

    Raises:
        UserError: no such GPU, or ranks that the engine cannot group.
    """
    model, rows = config.model, make_rows(config, ranks)
    memory = memory_of(config, vocabulary_tokens, ranks)
    tokens = config.run.steps * config.batch.tokens_per_step
    flops = size.flops_per_token(model, vocabulary_tokens, config.data.sequence_tokens)
    again = {"none": 1.0, "selective": 1.0, "full": 4 / 3}[config.engine.recompute]  # a second forward pass
    flops_of_run = flops.full * again * tokens / (1 - rows.waste)
    return Plan(
        num_parameters=size.num_parameters(model, vocabulary_tokens).total,
        vocabulary_tokens=vocabulary_tokens,
        hugging_face=hugging_face_class(model),
        not_exportable=why_not_exportable(model),
        flops_per_token=flops.full,
        flops_per_token_causal=flops.causal,
        rows=rows,
        memory=memory,
        traffic_bytes_per_step=traffic_bytes(config, vocabulary_tokens, ranks),
        tokens=tokens,
        epochs=tokens / num_tokens if num_tokens else None,
        pace=_pace(config, ranks, flops_of_run, memory, (gpu, price_per_hour)) if gpu else None,
        warnings=tuple(_warnings(config, rows, tokens, num_tokens, gpu is not None)),
    )


def require_little_waste(rows: Rows, max_waste: float) -> None:
    """Refuse, at submission, a dealing that computes too much for nothing.

    Raises:
        UserError: naming the nearest settings that waste nothing.
    """
    if rows.waste > max_waste:
        raise UserError(
            f"{rows.waste:.0%} of the computed rows would be absent (plan.max_waste={max_waste}): "
            f"{rows.sequences_per_step} sequences per step on {rows.ranks} ranks in micro-batches of "
            f"{rows.sequences_per_micro_batch}; nearest without waste: {' or '.join(rows.nearest)}"
        )


def rows_per_rank(sequences_per_step: int, ranks: int, rank: int) -> int:
    """How many of a step's rows a rank computes; they differ by at most one between ranks."""
    return sequences_per_step * (rank + 1) // ranks - sequences_per_step * rank // ranks


def num_micro_batches(sequences_per_step: int, ranks: int, sequences_per_micro_batch: int) -> int:
    """Micro-batches in a step, the same on every rank: engines meet in collectives, however few rows a rank has."""
    return ceil(ceil(sequences_per_step / ranks) / sequences_per_micro_batch)


def rows_per_micro_batch(sequences_per_step: int, ranks: int, sequences_per_micro_batch: int) -> int:
    """Rows of every micro-batch on every rank: the fullest rank's, dealt evenly, so that few are absent."""
    count = num_micro_batches(sequences_per_step, ranks, sequences_per_micro_batch)
    return ceil(ceil(sequences_per_step / ranks) / count)


def waste(sequences_per_step: int, ranks: int, sequences_per_micro_batch: int) -> float:
    """Share of computed rows that are absent."""
    count = num_micro_batches(sequences_per_step, ranks, sequences_per_micro_batch)
    rows = rows_per_micro_batch(sequences_per_step, ranks, sequences_per_micro_batch)
    return 1 - sequences_per_step / (ranks * count * rows)


def make_rows(config: Config, ranks: int) -> Rows:
    """Deal a step's rows; where that wastes some, find the nearest settings that do not."""
    total = config.batch.tokens_per_step // config.data.sequence_tokens
    micro_batch = config.batch.sequences_per_micro_batch
    wasted = waste(total, ranks, micro_batch)
    return Rows(
        sequences_per_step=total,
        ranks=ranks,
        sequences_per_micro_batch=micro_batch,
        num_micro_batches=num_micro_batches(total, ranks, micro_batch),
        rows_per_micro_batch=rows_per_micro_batch(total, ranks, micro_batch),
        waste=wasted,
        nearest=tuple(_without_waste(config, total, ranks)) if wasted else (),
    )


def _without_waste(config: Config, total: int, ranks: int) -> Iterator[str]:
    micro_batch = config.batch.sequences_per_micro_batch
    if total % ranks == 0:
        divisors = _divisors(total // ranks)
        yield f"batch.sequences_per_micro_batch={_nearest(divisors, micro_batch)}"
    yield f"{_nearest((many for many in _divisors(total) if not waste(total, many, micro_batch)), ranks)} ranks"
    fullest = ceil(total / ranks)
    around = (ranks * rows for rows in range(max(1, fullest - micro_batch), fullest + micro_batch + 1))
    near = _nearest((rows for rows in around if not waste(rows, ranks, micro_batch)), total)
    yield f"batch.tokens_per_step={near * config.data.sequence_tokens}"


def _divisors(number: int) -> set[int]:
    small = [divisor for divisor in range(1, isqrt(number) + 1) if number % divisor == 0]
    return {*small, *(number // divisor for divisor in small)}


def _nearest(candidates: Iterable[int], wanted: int) -> int:
    """Of two equally near, the smaller."""
    return min(candidates, key=lambda candidate: (abs(candidate - wanted), candidate))


def shard_ranks(config: Config, ranks: int) -> int:
    """Over how many ranks the engine partitions what it partitions.

    Raises:
        UserError: the groups of hybrid sharding do not fill the ranks.
    """
    engine = config.engine
    if engine.name == "plain" or (engine.name == "zero" and engine.zero_stage == 0):
        return 1
    group = engine.shard_ranks if engine.name == "fsdp" and engine.shard_ranks else ranks
    if ranks % group:
        raise UserError(
            f"engine.shard_ranks={group} does not divide the {ranks} ranks; choose a divisor or leave it out"
        )
    return group


def memory_of(config: Config, vocabulary_tokens: int, ranks: int) -> Memory:
    """Bytes of the fullest rank, by kind."""
    engine, model = config.engine, config.model
    rows, sequence, precision = (
        make_rows(config, ranks).rows_per_micro_batch,
        config.data.sequence_tokens,
        engine.precision,
    )
    activations = size.saved_activation_bytes(model, rows, sequence, precision, engine.recompute)
    # In the backward pass a block has gradients of about what it kept; one that is recomputed keeps it again before.
    blocks_at_once = 1 if engine.recompute == "none" else 2
    activations += blocks_at_once * size.block_activation_bytes(model, rows, sequence, precision)
    head = sum(size.head_bytes(model, vocabulary_tokens, rows, sequence, precision))
    state = {"plain": _plain_bytes, "zero": _zero_bytes, "fsdp": _fsdp_bytes}[engine.name]
    weights, gradients, optimizer, working = state(config, vocabulary_tokens, ranks)
    keeps_gradients = engine.name == "zero" or (engine.name == "plain" and ranks > 1)  # DDP's and DeepSpeed's buckets
    waiting = gradients if keeps_gradients or make_rows(config, ranks).num_micro_batches > 1 else 0
    peak = weights + optimizer + working + max(gradients, waiting + activations + head)
    return Memory(weights, gradients, optimizer, working, activations, head, peak)


_StateBytes = tuple[int, int, int, int]
"""weights, gradients, optimizer, working."""


def _plain_bytes(config: Config, vocabulary_tokens: int, ranks: int) -> _StateBytes:
    total = size.num_parameters(config.model, vocabulary_tokens).total
    casts = size.weight_copy_bytes(config.model, vocabulary_tokens, config.engine.precision)
    if config.engine.recompute != "none":
        casts //= config.model.layers
    return 4 * total, 4 * total, 4 * total * MOMENTS[config.optim.name], casts


def _zero_bytes(config: Config, vocabulary_tokens: int, ranks: int) -> _StateBytes:
    stage, is_bf16 = config.engine.zero_stage, config.engine.precision == "bf16"
    shapes = size.parameter_shapes(config.model, vocabulary_tokens)
    total = sum(map(prod, shapes.values()))
    own = sum(ceil(prod(shape) / ranks) for shape in shapes.values()) if stage == 3 else ceil(total / ranks)
    weight_bytes = 2 if is_bf16 else 4
    weights = weight_bytes * (own if stage == 3 else total)
    gradients = 4 * (own if stage >= 2 else total)
    has_masters = is_bf16 or stage > 0
    optimizer = 4 * (MOMENTS[config.optim.name] + has_masters) * (own if stage > 0 else total)
    bucket = 4 * min(total, ZERO_BUCKET_ELEMENTS) if stage > 0 else 0
    gathered = weight_bytes * min(total, ZERO_LIVE_ELEMENTS) if stage == 3 else 0
    return weights, gradients, optimizer, bucket + gathered


def _fsdp_bytes(config: Config, vocabulary_tokens: int, ranks: int) -> _StateBytes:
    shapes, group = size.parameter_shapes(config.model, vocabulary_tokens), shard_ranks(config, ranks)
    own = sum(ceil(shape[0] / group) * prod(shape[1:]) for shape in shapes.values())
    in_blocks = sum(prod(shape) for name, shape in shapes.items() if name.startswith("blocks."))
    outside = sum(map(prod, shapes.values())) - in_blocks
    one_block = in_blocks // config.model.layers
    weight_bytes = 2 if config.engine.precision == "bf16" else 4
    gathered = weight_bytes * (2 * one_block + outside)
    reduced = (weight_bytes + 4) * one_block
    whole_gradients = 4 * (in_blocks + outside) if make_rows(config, ranks).num_micro_batches > 1 else 0
    return 4 * own, 4 * own + whole_gradients, 4 * own * MOMENTS[config.optim.name], gathered + reduced


def traffic_bytes(config: Config, vocabulary_tokens: int, ranks: int) -> int:
    """Bytes a rank sends in a step with ring algorithms: (R-1)/R of the parameters for each gather or scatter.

    An all-reduce is a scatter and a gather. Gradients travel in fp32, gathered weights in the compute dtype. Stages 2
    and 3 scatter, and stage 3 and FSDP gather twice, in every micro-batch; the others once in a step.
    """
    engine, group = config.engine, shard_ranks(config, ranks)
    total = size.num_parameters(config.model, vocabulary_tokens).total
    gradients, weights = 4 * total, (2 if engine.precision == "bf16" else 4) * total
    count = make_rows(config, ranks).num_micro_batches
    within = (group - 1) / group
    if engine.name == "fsdp":
        between = 2 * (gradients / group) * (1 - group / ranks)
        return round(within * (2 * count * weights + gradients) + between)
    stage = engine.zero_stage if engine.name == "zero" else 0
    if stage == 0:
        return round(2 * gradients * (ranks - 1) / ranks)
    scattered = gradients * (count if stage >= 2 else 1)
    return round(within * (scattered + weights * (2 * count if stage == 3 else 1)))


def _pace(config: Config, ranks: int, flops: float, memory: Memory, priced: tuple[str, float | None]) -> Pace:
    """`flops` of the whole run; `priced` is a GPU and what an hour of it costs."""
    (name, price_per_hour), device = priced, _gpu(priced[0])
    seconds = flops / (ranks * device.bf16_flops * ASSUMED_UTILISATION)
    gpu_hours = seconds * ranks / 3600
    return Pace(
        gpu=name,
        memory_bytes=device.memory_bytes,
        fits=memory.peak <= device.memory_bytes * USABLE_MEMORY,
        utilisation=ASSUMED_UTILISATION,
        seconds_per_step=seconds / config.run.steps,
        days=seconds / 86_400,
        gpu_hours=gpu_hours,
        cost=None if price_per_hour is None else gpu_hours * price_per_hour,
    )


def _gpu(name: str) -> Gpu:
    if name not in GPUS:
        raise UserError(f"--gpu {name} is not known; choose one of {', '.join(GPUS)}")
    return GPUS[name]


def _warnings(config: Config, rows: Rows, tokens: int, num_tokens: int | None, has_gpu: bool) -> Iterator[str]:
    if rows.ranks > rows.sequences_per_step:
        idle = rows.ranks - rows.sequences_per_step
        yield f"{idle} of {rows.ranks} ranks have no row: a step has {rows.sequences_per_step} sequences"
    if rows.waste > config.plan.max_waste:
        yield (
            f"{rows.waste:.0%} of the computed rows are absent; at submission plan.max_waste={config.plan.max_waste} "
            f"refuses that; nearest without waste: {' or '.join(rows.nearest)}"
        )
    if config.engine.precision == "fp32" and has_gpu:
        yield "time and cost are those of bf16; engine.precision=fp32 takes several times as long"
    if num_tokens and tokens > 4 * num_tokens:
        yield f"the data is read {tokens / num_tokens:.1f} times; beyond about 4 epochs repeated text teaches little"
    if num_tokens and num_tokens <= config.data.sequence_tokens:
        yield f"the data has {num_tokens} tokens, no more than one sequence of {config.data.sequence_tokens}"
