"""A rank's memory on a CPU: what the plan says of it, to the byte and at its peak; what saving takes beside it."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from launcher import capacity
from llm_dist import config, plan
from llm_dist.checkpoint.layout import Facts
from llm_dist.checkpoint.store import Store
from llm_dist.engine.engine import Engine
from llm_dist.objectives.causal import Causal
from llm_dist.rows import Rows
from llm_dist.runtime import Runtime
from tests.dist import training
from tests.dist.ranks import Ranks
from tests.dist.training import ENGINES, VOCABULARY

pytestmark = pytest.mark.dist
Group = Callable[[int], Ranks]
Record = Callable[[str, object], None]

EVERYTHING_IS_MAPPED = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_MMAP_MAX_": "1000000",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_TOP_PAD_": "0",
}
"""glibc then gives a tensor's memory back when the tensor goes, so that resident memory is what tensors hold."""

SEQUENCE_TOKENS = 256
LARGE = (
    *("model.layers=4", "model.d_model=384", "model.heads=6", "model.kv_heads=6", "model.d_ff=1024"),
    *("model.vocabulary_multiple=4096", f"model.max_sequence_tokens={SEQUENCE_TOKENS}"),
    *(f"data.sequence_tokens={SEQUENCE_TOKENS}", "batch.sequences_per_micro_batch=2"),
)
"""Ten million parameters: their bytes are many times the noise of a process, and a step takes a second."""

UNEVEN = ("model.vocabulary_multiple=1", "model.d_model=40", "model.d_ff=51", "model.qk_norm=true")
"""No number of parameters here can be divided by much."""


def planned(run: config.Config, here: Runtime) -> plan.Memory:
    return plan.memory_of(run, VOCABULARY, here.ranks, capacity.machine_here())


def batches(run: config.Config, here: Runtime) -> tuple[list[training.Batch], int]:
    """Micro-batches of this rank, and the scored positions of all ranks."""
    rows, tokens = plan.make_rows(run, here.ranks), run.data.sequence_tokens
    random, objective = np.random.default_rng(here.rank), Causal(run.objective.z_loss)
    shape = rows.rows_per_micro_batch, tokens
    made = [
        objective.make_batch(Rows(*(random.integers(0, VOCABULARY, shape) for _ in range(2))), shape[0])
        for _ in range(rows.num_micro_batches)
    ]
    return made, rows.sequences_per_step * tokens


def train(engine: Engine, run: config.Config, here: Runtime) -> None:
    for step in range(2):
        engine.train_step(*batches(run, here), 1e-3, step)


def stored(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of each distinct storage."""
    local = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
    return {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in local if each.numel() > 1}


def held_weights(engine: Engine) -> dict[int, int]:
    parameters = list(engine.trainee.parameters())
    partitions = [each.ds_tensor for each in parameters if hasattr(each, "ds_tensor")]
    return stored(partitions or parameters)


def held_between_steps(engine: Engine) -> dict[int, int]:
    """Weights, masters, moments and gradients, by what holds them."""
    updated = list(engine.optimizer.state)
    moments = [value for state in engine.optimizer.state.values() for value in state.values()]
    gradients = [each.grad for each in (*engine.trainee.parameters(), *updated) if each.grad is not None]
    vendor = getattr(getattr(engine, "_deepspeed", None), "optimizer", None)
    flat = getattr(vendor, "grad_partitions_flat_buffer", None)
    return held_weights(engine) | stored([*updated, *moments, *gradients, *([] if flat is None else [flat])])


def state_bytes(here: Runtime, overrides: tuple[str, ...]) -> tuple[int, int, int, int]:
    """Weights and all that stays, held and planned; DDP's buckets are seen by no Python and left out."""
    run = training.run_file(*UNEVEN, *overrides)
    engine = training.engine_of(run, here)
    for step in range(2):
        engine.train_step(*training.micro_batches(run, here, step), 1e-3, step)
    memory = planned(run, here)
    held = sum(held_weights(engine).values()), sum(held_between_steps(engine).values())
    engine.close()
    buckets = memory.gradients if run.engine.name == "plain" and here.ranks > 1 else 0
    return *held, memory.weights, memory.between_steps - buckets


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("ranks", "name"), [(1, "plain"), (2, "plain"), *((2, f"zero{stage}") for stage in range(4)), (2, "fsdp")]
)
def test_state_bytes_are_exact(group_of: Group, ranks: int, name: str, precision: str) -> None:
    overrides = (*ENGINES[name], f"engine.precision={precision}", training.micro_batch(training.ROWS))
    found = group_of(ranks).run(state_bytes, overrides)

    assert found[0][:2] == found[0][2:]
    for weights, everything, *expected in found:
        assert [weights, everything] <= expected


@pytest.fixture(scope="module")
def honest_group() -> Iterator[Group]:
    """Ranks whose resident memory is what they hold."""
    groups: dict[int, Ranks] = {}

    def get(ranks: int) -> Ranks:
        if ranks not in groups:
            with pytest.MonkeyPatch.context() as patch:
                for name, value in EVERYTHING_IS_MAPPED.items():  # read by the allocator before any Python runs
                    patch.setenv(name, value)
                groups[ranks] = Ranks(ranks, EVERYTHING_IS_MAPPED)
        return groups[ranks]

    yield get
    for group in groups.values():
        group.close()


def resident_bytes(line: str) -> int:
    """`VmRSS` now, or `VmHWM` at most."""
    status = dict(each.split(":", 1) for each in Path("/proc/self/status").read_text().splitlines())
    return int(status[line].split()[0]) * 1024


def peak_bytes(here: Runtime, overrides: tuple[str, ...]) -> tuple[int, int]:
    """Resident memory of two steps above what a process has that has trained something small; and as planned."""
    small = training.run_file(*(each for each in overrides if each != TWICE))
    warm = training.engine_of(small, here)
    warm.train_step(*training.micro_batches(small, here, 0), 1e-3, 0)
    warm.close()
    del warm
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident_bytes("VmRSS")
    run = training.run_file(*LARGE, f"batch.tokens_per_step={2 * SEQUENCE_TOKENS * here.ranks}", *overrides)
    engine = training.engine_of(run, here)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    train(engine, run, here)
    most = resident_bytes("VmHWM") - before
    engine.close()
    return most, planned(run, here).peak


BF16 = "engine.precision=bf16"
LITTLE_HEAD = "model.vocabulary_multiple=1"
TWICE = f"batch.tokens_per_step={8 * SEQUENCE_TOKENS}"
CASES = {  # ZeRO-3 last: DeepSpeed lets go of what it reserves only later
    "fp32": (1, ()),
    "bf16": (1, (BF16,)),
    "bf16 selective": (1, (BF16, "engine.recompute=selective")),
    "fp32 full": (1, ("engine.recompute=full",)),
    "ddp bf16 accumulating": (2, (BF16, TWICE)),
    "zero2 bf16": (2, (BF16, *ENGINES["zero2"])),
    "fsdp bf16": (2, (BF16, *ENGINES["fsdp"])),
    "fsdp bf16 full, little head": (2, (BF16, *ENGINES["fsdp"], "engine.recompute=full", LITTLE_HEAD)),
    "zero3 bf16": (2, (BF16, *ENGINES["zero3"])),
}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory is read as Linux shows it")
@pytest.mark.parametrize(("ranks", "overrides"), CASES.values(), ids=CASES)
def test_peak_is_within_15_percent(
    honest_group: Group, record_property: Record, ranks: int, overrides: tuple[str, ...]
) -> None:
    for most, expected in honest_group(ranks).run(peak_bytes, overrides):
        record_property("planned / measured", expected / most)
        assert expected == pytest.approx(most, rel=0.15)


def saving_bytes(here: Runtime, folder: Path, overrides: tuple[str, ...]) -> tuple[int, int, int, int]:
    """Memory taken at the peak of saves: synchronous, asynchronous, two more of these at once; and what a rank writes."""
    run = training.run_file(*LARGE, TWICE, *overrides)
    engine = training.engine_of(run, here)
    store = Store(folder, here.rank, here.ranks, attempt=1)
    facts = Facts({}, {}, optimizer_step=0)

    def peak(*steps: int, asynchronous: bool) -> int:
        here.barrier()
        before = resident_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        for step in steps:
            saved.append(store.save(step, engine.state(), facts, asynchronous).num_bytes)
        store.wait()
        return resident_bytes("VmHWM") - before

    saved: list[int] = []
    peak(1, asynchronous=False)  # whatever is imported and started only once
    peaks = peak(2, asynchronous=False), peak(3, asynchronous=True), peak(4, 5, asynchronous=True)
    engine.close()
    return *peaks, saved[0]


SLACK_BYTES = 2**20
"""For threads and tables, beside the 61 MB that each of two ranks writes."""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory is read as Linux shows it")
@pytest.mark.parametrize("name", ["plain", "zero3", "fsdp"])
def test_saving_takes_nothing_or_its_own_share_once(
    honest_group: Group, record_property: Record, tmp_path: Path, name: str
) -> None:
    for found in honest_group(2).run(saving_bytes, tmp_path, ENGINES[name]):
        synchronous, first, more, share = found
        record_property("bytes", found)
        assert synchronous < SLACK_BYTES
        assert first < share + SLACK_BYTES
        assert more < SLACK_BYTES
