"""What the devices and the network between them can do: matmul rate, all-reduce rate, and whether sums are right.

    python -m llm_dist.probe devices                 each device of this machine, alone
    python -m llm_dist.probe all-reduce --out DIR    as one rank among the others, with the variables torchrun sets

Both print one JSON object as the last line of standard output. The second also writes it to DIR/rank_00000.json, and
ends with code 2 where a sum is wrong, ranks do not answer, or the rate is below `--least` GB/s.
"""

from __future__ import annotations

import argparse
import json
import platform
import socket
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llm_dist import runtime
from llm_dist.errors import UserError, exit_code_of
from llm_dist.model.layers import product

_REPEATS = 5
_PERIOD = 251
"""Of the summed pattern: a prime, so that pieces which arrive at a wrong place do not fit there."""


def matmul_flops_per_second(
    device: torch.device, dtype: torch.dtype, rows: int, width: int, seconds: float = 0.15
) -> float:
    """Rate of [rows, width] @ [width, 4 width] products, the best of repeated runs over about `seconds`."""
    left = torch.randn(rows, width, device=device, dtype=dtype)
    right = torch.randn(width, 4 * width, device=device, dtype=dtype)
    flops = 2.0 * rows * width * 4 * width
    fastest, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < seconds:
        before = time.perf_counter()
        product(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        fastest = min(fastest, time.perf_counter() - before)
    return flops / fastest


def devices() -> dict[str, Any]:
    """Versions, and name and matmul rate of every GPU that is visible, or of the CPU where none is."""
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    measured = [
        {
            "name": torch.cuda.get_device_name(gpu),
            "is_gpu": True,
            "flops_per_second": matmul_flops_per_second(gpu, torch.bfloat16, rows=8192, width=4096),
        }
        for gpu in gpus
    ]
    if not gpus:
        rate = matmul_flops_per_second(torch.device("cpu"), torch.float32, rows=128, width=256, seconds=0.5)
        measured = [{"name": platform.machine(), "is_gpu": False, "flops_per_second": rate}]
    versions = {"torch": str(torch.__version__)}
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    return {"versions": versions, "devices": measured}


@dataclass(frozen=True)
class AllReduce:
    """What one rank found."""

    rank: int
    ranks: int
    host: str
    device: str
    num_bytes: int
    num_wrong: int
    """Elements of the sum that were not what they had to be, exactly."""
    bus_bytes_per_second: float | None
    """What each rank sent, and received, if the ranks form a ring (as nccl-tests count it); None on one rank."""
    links: dict[str, float] = field(default_factory=dict)
    """Bytes per second to the first rank of each neighbouring node, by that rank; empty on other ranks."""


def all_reduce(here: runtime.Runtime, num_bytes: int) -> AllReduce:
    """Sum a known pattern over all ranks, compare, and take the median time; collective: all ranks call this."""
    pattern = torch.arange(num_bytes // 4, device=here.device) % _PERIOD
    right = (
        here.ranks * pattern + here.ranks * (here.ranks - 1) // 2
    ).float()  # below 2**24 up to 5,000 ranks: exact in any order
    num_wrong, seconds = 0, []
    for _ in range(1 + _REPEATS):
        values = (pattern + here.rank).float()
        here.barrier()
        before = time.perf_counter()
        here.sum(values)
        _finish(here.device)
        seconds.append(time.perf_counter() - before)
        num_wrong += int((values != right).sum())
    travelled = 2 * (here.ranks - 1) / here.ranks * right.nbytes
    return AllReduce(
        rank=here.rank,
        ranks=here.ranks,
        host=socket.gethostname(),
        device=str(here.device),
        num_bytes=right.nbytes,
        num_wrong=num_wrong,
        bus_bytes_per_second=travelled / statistics.median(seconds[1:]) if here.ranks > 1 else None,
    )


def links(here: runtime.Runtime, num_bytes: int) -> dict[str, float]:
    """Rates between the first ranks of neighbouring nodes, which stand in a ring; collective: all ranks call this.

    Links without a common end are measured at the same time.
    """
    firsts = _first_ranks(here)
    pairs = list(zip(firsts, [*firsts[1:], *firsts[:1]], strict=True))[: len(firsts) if len(firsts) > 2 else 1]
    groups = [dist.new_group(list(pair)) for pair in pairs] if len(firsts) > 1 else []
    values, found = torch.ones(num_bytes // 4, device=here.device), {}
    for turn in (pairs[0::2], pairs[1::2]) if groups else ():
        here.barrier()
        for pair in turn:
            if here.rank in pair:
                seconds = [_timed(values, groups[pairs.index(pair)], here.device) for _ in range(1 + _REPEATS)][1:]
                found[str(sum(pair) - here.rank)] = values.nbytes / statistics.median(seconds)
    here.barrier()
    return found


def _first_ranks(here: runtime.Runtime) -> list[int]:
    """One of each node."""
    is_first = torch.zeros(here.ranks, dtype=torch.int64)
    is_first[here.rank] = here.local_rank == 0
    return here.sum(is_first).nonzero().flatten().tolist()


def _timed(values: torch.Tensor, group: dist.ProcessGroup, device: torch.device) -> float:
    before = time.perf_counter()
    dist.all_reduce(values, group=group)
    _finish(device)
    return time.perf_counter() - before


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def fault(found: AllReduce, least_bytes_per_second: float) -> str | None:
    """Why ranks that found this should not train, in words."""
    who = f"rank {found.rank} on {found.host}"
    if found.num_wrong:
        return f"{who}: {found.num_wrong} elements of a sum over {found.ranks} ranks are wrong"
    rate = found.bus_bytes_per_second
    if rate is not None and rate < least_bytes_per_second:
        return f"{who}: all-reduce at {rate / 1e9:.3g} GB/s, {least_bytes_per_second / 1e9:.3g} GB/s wanted"
    return None


def _probe_network(out: Path, megabytes: float | None, least: float, seconds: float) -> None:
    try:
        here = runtime.start(timeout=timedelta(seconds=seconds))
        default = 256 if here.device.type == "cuda" else 16
        num_bytes = int((megabytes or default) * 1e6)
        found = replace(all_reduce(here, num_bytes), links=links(here, num_bytes))
    except (RuntimeError, TimeoutError) as error:
        if (lost := _no_answer(error)) is None:
            raise
        raise UserError(f"{socket.gethostname()}: ranks do not answer within {seconds:.0f} s: {lost}") from None
    finally:
        runtime.stop()
    text = json.dumps(asdict(found))
    out.mkdir(parents=True, exist_ok=True)
    (out / f"rank_{found.rank:05d}.json").write_text(text + "\n", encoding="utf-8")
    print(text, flush=True)
    if words := fault(found, least * 1e9):
        raise UserError(words)


def _no_answer(error: Exception) -> str | None:
    if isinstance(error, RuntimeError):
        return runtime.lost_contact(error)
    return str(error)


def main(words: Sequence[str] | None = None) -> int:
    """Entry point of `python -m llm_dist.probe`."""
    parser = argparse.ArgumentParser(prog="python -m llm_dist.probe", description=(__doc__ or "").partition("\n")[0])
    ways = parser.add_subparsers(dest="way", required=True)
    ways.add_parser("devices", help="matmul rate of each device")
    network = ways.add_parser("all-reduce", help="rate and correctness among the ranks")
    network.add_argument("--out", type=Path, required=True, help="folder of the ranks' reports")
    network.add_argument("--megabytes", type=float, help="to sum; 256 on GPUs, else 16, when absent")
    network.add_argument("--least", type=float, default=0.0, help="GB/s that are enough (0)")
    network.add_argument("--seconds", type=float, default=60.0, help="how long to wait for other ranks (60)")
    wanted = parser.parse_args(words)
    if wanted.way == "devices":
        print(json.dumps(devices()), flush=True)
        return 0
    return exit_code_of(lambda: _probe_network(wanted.out, wanted.megabytes, wanted.least, wanted.seconds))


if __name__ == "__main__":
    sys.exit(main())
