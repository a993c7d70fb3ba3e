"""What a run needs, before it is paid for: rows, memory, traffic, time and cost; arithmetic only.

Nothing here starts a process, reads a file or imports torch. Rows are exact, memory is `plan_memory`'s; traffic is
each engine's theory; time rests on the stated utilisation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from math import ceil, isqrt
from typing import Any

from llm_dist import plan_memory
from llm_dist.config import Config
from llm_dist.errors import UserError
from llm_dist.model import size
from llm_dist.model.hugging_face import hugging_face_class, why_not_exportable
from llm_dist.model.size import GPU, Machine
from llm_dist.plan_memory import Memory

ASSUMED_UTILISATION = 0.40
"""Share of a GPU's dense bf16 peak that the model's own FLOPs are assumed to reach."""
USABLE_MEMORY = 0.90
"""The rest of a GPU's memory goes to the CUDA context, communication buffers and fragmentation."""


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
    machine: Machine = GPU,
    gpu: str | None = None,
    price_per_hour: float | None = None,
) -> Plan:
    """Plan a run.

    Args:
        config: the run file.
        vocabulary_tokens: of the tokenizer, not padded.
        ranks: processes, one per GPU.
        num_tokens: of the training data, where known.
        machine: whose kernels compute.
        gpu: a key of `GPUS`; without it there is no time, cost or verdict.
        price_per_hour: of one GPU, in any currency.

    Raises:
        UserError: no such GPU, or ranks that the engine cannot group.
    """
    model, rows = config.model, make_rows(config, ranks)
    memory = memory_of(config, vocabulary_tokens, ranks, machine)
    tokens = config.run.steps * config.batch.tokens_per_step
    flops = size.flops_per_token(
        model,
        vocabulary_tokens,
        config.data.sequence_tokens,
        config.heads,
        config.scored_tokens / config.data.sequence_tokens,
    )
    again = {"none": 1.0, "selective": 1.0, "full": 4 / 3}[config.engine.recompute]  # a second forward pass
    flops_of_run = flops.full * again * tokens / (1 - rows.waste)
    return Plan(
        num_parameters=size.num_parameters(model, vocabulary_tokens, config.heads).total,
        vocabulary_tokens=vocabulary_tokens,
        hugging_face=hugging_face_class(model, config.heads),
        not_exportable=why_not_exportable(model, config.heads),
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


def memory_of(config: Config, vocabulary_tokens: int, ranks: int, machine: Machine = GPU) -> Memory:
    """Bytes of the fullest rank, by kind, where `machine` computes."""
    total = config.batch.tokens_per_step // config.data.sequence_tokens
    dealing = (total, ranks, config.batch.sequences_per_micro_batch)
    counts = num_micro_batches(*dealing), rows_per_micro_batch(*dealing)
    return plan_memory.memory_of(config, vocabulary_tokens, ranks, counts, shard_ranks(config, ranks), machine)


def traffic_bytes(config: Config, vocabulary_tokens: int, ranks: int) -> int:
    """Bytes a rank sends in a step with ring algorithms: (R-1)/R of the parameters for each gather or scatter.

    An all-reduce is a scatter and a gather. Gradients travel in fp32, gathered weights in the compute dtype. Stages 2
    and 3 and FSDP scatter, and stage 3 and FSDP gather twice, in every micro-batch; the others once in a step, and so
    do the replicas of hybrid sharding.
    """
    engine, group = config.engine, shard_ranks(config, ranks)
    total = size.num_parameters(config.model, vocabulary_tokens).total
    gradients, weights = 4 * total, (2 if engine.precision == "bf16" else 4) * total
    count = make_rows(config, ranks).num_micro_batches
    within = (group - 1) / group
    if engine.name == "fsdp":
        between = 2 * (gradients / group) * (1 - group / ranks)
        return round(within * count * (2 * weights + gradients) + between)
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
