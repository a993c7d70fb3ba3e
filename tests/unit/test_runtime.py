"""One process alone; what several do is in tests/dist."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm_dist import runtime
from llm_dist.errors import UserError
from llm_dist.runtime import Runtime, derived_seed

ALONE = Runtime(0, 1, 0, torch.device("cpu"))

STARTS_ALONE = """
import os
for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
    os.environ.pop(name, None)
import torch.distributed as dist
from llm_dist import runtime
here = runtime.start()
assert (here.rank, here.ranks, here.local_rank, here.is_first) == (0, 1, 0, True), here
assert dist.is_initialized() and dist.get_world_size() == 1
runtime.stop()
runtime.stop()
assert not dist.is_initialized()
"""


def test_alone_every_collective_answers_by_itself() -> None:
    assert ALONE.any(True) is True
    assert ALONE.any(False) is False
    assert ALONE.sum(torch.ones(2)).tolist() == [1.0, 1.0]
    assert ALONE.share({"a": [1, None]}) == {"a": [1, None]}
    assert ALONE.first_error(None) is None
    assert ALONE.first_error(UserError("broken")) == "broken"
    ALONE.barrier()


def test_a_process_without_a_launcher_is_the_only_rank() -> None:
    subprocess.run([sys.executable, "-W", "error", "-c", STARTS_ALONE], check=True, timeout=120)


def test_seeds_are_the_same_everywhere() -> None:
    """Golden: resumed runs rely on it."""
    assert derived_seed("dropout", 7, 3, 0, 1) == 7579209949213884329


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=4), st.lists(st.integers(0, 10**6), min_size=1, max_size=4))
def test_seeds_differ_and_fit_a_generator(one: list[int], other: list[int]) -> None:
    assert 0 <= derived_seed(*one) < 2**63
    assert (derived_seed(*one) == derived_seed(*other)) == (one == other)


def test_a_rank_without_a_gpu_of_its_own_is_a_users_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    with pytest.raises(UserError, match="LOCAL_RANK=2 has no GPU"):
        runtime._device(2)


def test_versions_name_what_the_process_runs_on() -> None:
    found = runtime.versions()

    assert found["torch"] == torch.__version__
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))


GLOO = "[/sources/gloo/transport/tcp/pair.cc:553] "
ADVICE = ". This is typically caused by a remote worker crashing. Check its logs"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError(f"{GLOO}Connection closed by peer [::1]:5{ADVICE}\nmore"), "Connection closed by peer [::1]:5"),
        (RuntimeError(f"{GLOO}Read error [::1]:5: Broken pipe{ADVICE}"), "Read error [::1]:5: Broken pipe"),
        (RuntimeError("Connection reset by peer"), "Connection reset by peer"),
        (torch.distributed.DistStoreError("wait timeout"), "wait timeout"),
        (RuntimeError("[/sources/aten/Linear.cpp:12] shapes differ"), None),
    ],
)
def test_a_lost_neighbour_is_one_short_line(error: RuntimeError, words: str | None) -> None:
    assert runtime.lost_contact(error) == words
