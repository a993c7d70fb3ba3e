"""The probe of the network finds sums that are wrong, and ranks that are alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor

from launcher.ports import choose_port
from llm_dist.probe import AllReduce, all_reduce, fault, links
from llm_dist.runtime import Runtime
from tests.dist.ranks import Ranks

pytestmark = pytest.mark.dist


class Flipping(Runtime):
    """A rank that receives one wrong element, at the end of each sum."""

    def sum(self, values: Tensor) -> Tensor:
        super().sum(values)
        values[-1] += 1
        return values


def sound(here: Runtime) -> AllReduce:
    return all_reduce(here, 1_000_000)


def links_of_four_nodes(here: Runtime) -> dict[str, float]:
    return links(Runtime(here.rank, here.ranks, 0, here.device), 100_000)


def links_of_two_nodes(here: Runtime) -> dict[str, float]:
    return links(Runtime(here.rank, here.ranks, here.rank % 2, here.device), 100_000)


def links_of_one_node(here: Runtime) -> dict[str, float]:
    return links(Runtime(here.rank, here.ranks, here.rank, here.device), 100_000)


def one_flips(here: Runtime) -> AllReduce:
    flipping = Flipping(here.rank, here.ranks, here.local_rank, here.device)
    return all_reduce(flipping if here.rank == 1 else here, 1_000_000)


def test_sums_are_exact_and_timed(group_of: Callable[[int], Ranks]) -> None:
    found = group_of(4).run(sound)
    assert [(each.rank, each.ranks, each.num_wrong) for each in found] == [(rank, 4, 0) for rank in range(4)]
    assert all(each.bus_bytes_per_second and each.bus_bytes_per_second > 1e5 for each in found)
    assert [fault(each, 1e5) for each in found] == [None] * 4


def test_links_join_neighbouring_nodes_in_a_ring(group_of: Callable[[int], Ranks]) -> None:
    found = group_of(4).run(links_of_four_nodes)
    assert [sorted(each) for each in found] == [["1", "3"], ["0", "2"], ["1", "3"], ["0", "2"]]
    assert all(rate > 1e5 for each in found for rate in each.values())
    found = group_of(4).run(links_of_two_nodes)
    assert [sorted(each) for each in found] == [["2"], [], ["0"], []]
    assert group_of(4).run(links_of_one_node) == [{}] * 4


def test_a_wrong_element_is_a_fault_of_the_rank_that_has_it(group_of: Callable[[int], Ranks]) -> None:
    found = group_of(2).run(one_flips)
    assert [each.num_wrong for each in found] == [0, 6], "one in each of six sums"
    assert fault(found[0], 0.0) is None
    assert "6 elements of a sum over 2 ranks are wrong" in str(fault(found[1], 0.0))


def test_too_slow_is_a_fault_and_one_rank_has_no_rate() -> None:
    found = AllReduce(0, 2, "node1", "cpu", 1000, 0, bus_bytes_per_second=2e9)
    assert fault(found, 2e9) is None
    assert fault(found, 2.1e9) == "rank 0 on node1: all-reduce at 2 GB/s, 2.1 GB/s wanted"
    assert fault(replace(found, ranks=1, bus_bytes_per_second=None), 1e12) is None


def probe(out: Path, rank: int, ranks: int, port: int) -> subprocess.Popen[str]:
    place = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"}
    environment = {**os.environ, **{name: str(value) for name, value in place.items()}}
    command = [sys.executable, "-m", "llm_dist.probe", "all-reduce", "--out", str(out), "--seconds", "5"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_each_rank_reports(tmp_path: Path) -> None:
    port = choose_port()
    started = [probe(tmp_path / "out", rank, 2, port) for rank in range(2)]
    said = [each.communicate(timeout=120) for each in started]
    assert [each.returncode for each in started] == [0, 0], said
    for rank, (printed, _) in enumerate(said):
        report = json.loads((tmp_path / "out" / f"rank_{rank:05d}.json").read_text())
        assert report == json.loads(printed.splitlines()[-1])
        assert (report["rank"], report["ranks"], report["num_wrong"]) == (rank, 2, 0)


def test_a_rank_that_is_left_alone_says_so_and_ends(tmp_path: Path) -> None:
    alone = probe(tmp_path / "out", 0, 2, choose_port())
    _, error = alone.communicate(timeout=120)
    assert alone.returncode == 2
    assert "ranks do not answer within 5 s" in error and "Traceback" not in error
