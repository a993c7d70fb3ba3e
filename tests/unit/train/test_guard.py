"""Which numbers cannot be right, which steps are left out for it, and whether ranks hold alike what they should."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm_dist.config import Guard
from llm_dist.engine.partition import Partition
from llm_dist.runtime import Runtime
from llm_dist.train.guard import FEWEST_LOSSES, SkippedSteps, checksum, differing_replica, judge

QUIET = [3.0 + 0.01 * (step % 7) for step in range(60)]
SPIKES = Guard(spike_z=6.0)


@pytest.mark.parametrize(
    ("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (3.0, math.nan), (3.0, math.inf), (-math.inf, 0.0)]
)
def test_what_is_not_finite_is_always_bad(loss: float, norm: float) -> None:
    assert "the gradient norm" in (judge(loss, norm, [], Guard()).fault or "")


def test_a_spike_is_bad_where_it_is_asked_for() -> None:
    assert judge(9.0, 1.0, QUIET, Guard()).fault is None
    fault = judge(9.0, 1.0, QUIET, SPIKES).fault
    assert fault is not None
    assert fault.startswith("the loss 9.0000 lies ")
    assert fault.endswith(" deviations above 3.0300, the median of 60 steps")
    assert judge(3.1, 1.0, QUIET, SPIKES).fault is None


def test_a_low_loss_is_no_spike_and_few_losses_say_nothing() -> None:
    assert judge(0.1, 1.0, QUIET, SPIKES).fault is None
    assert judge(99.0, 1.0, QUIET[: FEWEST_LOSSES - 1], SPIKES).fault is None
    assert judge(99.0, 1.0, QUIET[:FEWEST_LOSSES], SPIKES).fault is not None


def test_one_earlier_spike_hides_no_other() -> None:
    assert judge(9.0, 1.0, [*QUIET, 50.0, 80.0], SPIKES).fault is not None


def test_only_the_window_counts() -> None:
    falling = [10.0] * 200 + QUIET
    guard = Guard(spike_z=6.0, spike_window_steps=len(QUIET))
    assert judge(9.0, 1.0, falling, guard).fault is not None


@given(shift=st.floats(0.5, 50), factor=st.floats(0.01, 100))
def test_the_verdict_depends_on_no_unit(shift: float, factor: float) -> None:
    losses = [shift + 3.0 * factor + 0.01 * factor * (step % 7) for step in range(60)]
    assert judge(losses[-1] + 2.0 * factor + 0.2 * shift, 1.0, losses, SPIKES).fault is not None
    assert judge(max(losses), 1.0, losses, SPIKES).fault is None


def test_equal_losses_make_no_spike_of_the_next() -> None:
    assert judge(3.001, 1.0, [3.0] * 50, SPIKES).fault is None


def test_steps_left_out_are_remembered(tmp_path: Path) -> None:
    path = tmp_path / "skipped.jsonl"
    first = SkippedSteps(path)
    assert 7 not in first
    first.add(7, "why", record={"attempt": 1})
    first.add(9, "why", record=None)
    assert 7 in first and 9 in first
    again = SkippedSteps(path)
    assert 7 in again
    assert 9 not in again, "only rank 0 writes"
    assert (again.within(range(1, 8)), again.within(range(8, 20))) == (1, 0)
    assert json.loads(path.read_text()) == {"step": 7, "why": "why", "attempt": 1}


def test_a_line_that_a_crash_cut_short_was_never_acted_upon(tmp_path: Path) -> None:
    path = tmp_path / "skipped.jsonl"
    SkippedSteps(path).add(7, "why", record={})
    with path.open("a") as file:
        file.write('{"step": 8, "wh')
    skipped = SkippedSteps(path)
    assert 7 in skipped and 8 not in skipped
    skipped.add(9, "why", record={})
    assert 9 in SkippedSteps(path)
    assert 8 not in SkippedSteps(path)


def test_a_step_left_out_is_durable_before_work_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda _: synced.append((tmp_path / "skipped.jsonl").read_text()))
    SkippedSteps(tmp_path / "skipped.jsonl").add(7, "why", record={})
    assert json.loads(synced[0])["step"] == 7


class Gathered(Runtime):
    """A rank among others whose sums are known."""

    others: torch.Tensor

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return values + self.others


def verdict(rows: list[torch.Tensor]) -> str | None:
    """What rank 0 hears when ranks hold `rows` of one replicated tensor."""
    partitions = [Partition(row, 0, tuple(row.shape), rank, len(rows)) for rank, row in enumerate(rows)]
    here = Gathered(0, len(rows), 0, torch.device("cpu"))
    others = torch.zeros(len(rows), 2, 1, dtype=torch.int64)
    for rank, row in enumerate(rows[1:], start=1):
        others[rank, 1, 0] = checksum(row)
    object.__setattr__(here, "others", others)
    return differing_replica({"param/w": partitions[0]}, here)


@given(element=st.integers(0, 99), bit=st.integers(0, 31), rank=st.integers(0, 2))
def test_any_flipped_bit_is_found_and_its_rank_named(element: int, bit: int, rank: int) -> None:
    rows = [torch.arange(100, dtype=torch.float32) for _ in range(3)]
    assert verdict(rows) is None
    rows[rank].view(torch.int32)[element] ^= (1 << bit) if bit < 31 else -(1 << 31)
    assert verdict(rows) == f"rank {rank} holds other values of param/w than the other ranks"


def test_two_ranks_that_differ_are_both_named() -> None:
    rows = [torch.zeros(4), torch.tensor([0.0, 0.0, 1e-30, 0.0])]
    assert verdict(rows) == "ranks 0, 1 hold different values of param/w"


def test_what_is_held_once_needs_no_proof() -> None:
    here = Runtime(0, 2, 0, torch.device("cpu"))
    assert differing_replica({"param/w": Partition(torch.zeros(3), 0, (6,))}, here) is None
