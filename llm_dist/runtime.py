"""This process among the others: rank, device, process group, and the few collectives the trainer needs.

The only room that reads RANK, WORLD_SIZE and LOCAL_RANK. The same code runs on CPU (gloo) and GPU (NCCL): tensors on
the host always travel over gloo, so that agreeing on something never waits for the GPU.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import time
import uuid
import warnings
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore, PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from llm_dist.errors import UserError

COLLECTIVE_TIMEOUT = timedelta(minutes=10)
_PLACE_IN_SOURCES = re.compile(r"^\[\S+:\d+\] ")


@dataclass(frozen=True)
class Runtime:
    """Who this process is."""

    rank: int
    ranks: int
    local_rank: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this rank reports for all."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether any rank says yes; collective: all ranks call this."""
        if self.ranks == 1:
            return flag
        votes = torch.tensor([flag], dtype=torch.int32)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        return bool(votes.item())

    def sum(self, values: Tensor) -> Tensor:
        """Add `values` over all ranks, in place, and return it; collective: all ranks call this."""
        if self.ranks > 1:
            dist.all_reduce(values)
        return values

    def share(self, value: Any, source: int = 0) -> Any:
        """Give every rank the JSON-able `value` of rank `source`; collective: all ranks call this."""
        if self.ranks == 1:
            return value
        text = json.dumps(value).encode() if self.rank == source else b""
        length = torch.tensor([len(text)])
        dist.broadcast(length, src=source)
        letters = torch.frombuffer(bytearray(text or bytes(int(length))), dtype=torch.uint8)
        dist.broadcast(letters, src=source)
        return json.loads(letters.numpy().tobytes())

    def barrier(self) -> None:
        """Wait for every rank; collective: all ranks call this."""
        self.any(False)

    def first_error(self, error: Exception | None) -> str | None:
        """Let all ranks know that one of them failed; the lowest such rank's words, or None.

        Collective: all ranks call this, so that no rank waits for one that has raised.
        """
        failing = torch.full((), self.ranks, dtype=torch.int64)
        if error is not None:
            failing.fill_(self.rank)
        if self.ranks > 1:
            dist.all_reduce(failing, op=dist.ReduceOp.MIN)
        source = int(failing)
        if source == self.ranks:
            return None
        words: str = self.share(str(error), source)
        return words


def lost_contact(error: RuntimeError) -> str | None:
    """What a collective said when another rank was gone, in one short line; None for any other error.

    gloo raises plain RuntimeErrors whose text begins with a path of its sources; NCCL and the store have own classes.
    """
    line = str(error).partition("\n")[0]
    is_gloo = "gloo/transport" in line or line.startswith(("Connection closed by peer", "Connection reset by peer"))
    if not is_gloo and not isinstance(error, dist.DistError):
        return None
    return _PLACE_IN_SOURCES.sub("", line).partition(". This is typically caused by")[0]


def start(deterministic: bool = False, timeout: timedelta = COLLECTIVE_TIMEOUT) -> Runtime:
    """Join the process group that the launcher described in the environment; alone when it described none.

    Collectives give up after the `timeout`.

    Raises:
        UserError: the environment describes half of a launch, or a rank without a GPU.
    """
    # Vendors still call names that torch 2.13 is renaming; a user can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))  # DeepSpeed insists on it, also on one rank
    device = _device(local_rank)
    torch.use_deterministic_algorithms(deterministic and device.type == "cuda")
    if "OMP_NUM_THREADS" not in os.environ and device.type == "cpu":
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_ranks))
    _check_launch(ranks)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if ranks == 1:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    else:
        store = _meeting_place(rank, ranks, timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=timeout)
    return Runtime(rank, ranks, local_rank, device)


def _meeting_place(rank: int, ranks: int, timeout: timedelta) -> Store:
    """The store in which the ranks find each other.

    torchrun keeps one store over its restarts, and in it the addresses of ranks that are dead: torch 2.13 then fails
    to connect about every second time. So the ranks of each start agree on a name of their own, and write under it.
    """
    store: Store = next(rendezvous("env://", rank, ranks, timeout=timeout))[0]
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return store
    own = uuid.uuid4().hex
    if rank == 0:
        _answer(store, own, ranks, time.monotonic() + timeout.total_seconds())
        return PrefixStore(own, store)
    store.set(f"here/{rank}", own)
    name = store.get(f"answer/{own}").decode()  # an earlier start's rank 0 cannot have answered this
    store.add(f"{name}/joined", 1)
    return PrefixStore(name, store)


def _answer(store: Store, name: str, ranks: int, until: float) -> None:
    """Rank 0: tell `name` to every rank that asks, dead ones included, until all living ones have joined."""
    answered: set[bytes] = set()
    while store.add(f"{name}/joined", 0) < ranks - 1:
        for key in (f"here/{rank}" for rank in range(1, ranks)):
            if store.check([key]) and (asked := store.get(key)) not in answered:
                store.set(f"answer/{asked.decode()}", name)
                answered.add(asked)
        if time.monotonic() > until:
            raise TimeoutError("not all ranks have come to the meeting place; their logs say why")
        time.sleep(0.02)


def _check_launch(ranks: int) -> None:
    has_meeting_place = {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    if ranks > 1 and not has_meeting_place:
        raise UserError(
            f"WORLD_SIZE={ranks} is set, but not MASTER_ADDR and MASTER_PORT, where the ranks meet; "
            "start with llm-launch or torchrun, or unset WORLD_SIZE"
        )
    if has_meeting_place and "WORLD_SIZE" not in os.environ and "ACCELERATE_USE_CPU" in os.environ:
        raise UserError(
            "accelerate was asked for several processes and started one, as it does with --cpu; "
            "give it --multi_gpu instead of --cpu (on CPUs too), or start with llm-launch or torchrun"
        )


def stop() -> None:
    """Leave the process group; nothing to do when there is none."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"rank with LOCAL_RANK={local_rank} has no GPU: the host has {torch.cuda.device_count()}; start fewer ranks"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def derived_seed(*parts: int | str) -> int:
    """A 63-bit seed that is a pure function of its parts; equal in every process and version."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def versions() -> dict[str, str]:
    """What this process runs on, for source.json and checkpoints."""
    found = {"torch": torch.__version__, "python": platform.python_version()}
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
    return found
