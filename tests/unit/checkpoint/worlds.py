"""Worlds of several ranks in one process: what each rank holds of a state, and all of them saving or restoring."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from llm_dist.checkpoint.layout import Facts, Found, Manifest
from llm_dist.checkpoint.store import Saved, Store
from llm_dist.engine.partition import Partition

FACTS = Facts(
    fingerprints={"model": "m0", "data": "d0"},
    trajectory={"tokens": 4096, "best_loss": 3.25, "best_step": 100},
    optimizer_step=100,
    engine="plain",
)
World = list[dict[str, Partition]]
"""What each rank holds."""


def make_state(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}


SHAPES: dict[str, tuple[int, ...]] = {
    "param/embedding.weight": (11, 6),
    "param/norm.weight": (6,),
    "param/scale": (),
    "exp_avg/embedding.weight": (11, 6),
    "exp_avg/empty": (0, 4),
}
STATE = make_state(SHAPES)


def split(state: Mapping[str, Tensor], cuts: Mapping[str, Sequence[int]], replicas: int = 1) -> World:
    """Ranks that hold what lies between the cuts of each tensor; `replicas` groups of ranks hold the same."""
    groups = max((len(each) for each in cuts.values()), default=0) + 1
    return [
        {
            key: Partition(value.reshape(-1)[a:b].clone(), a, tuple(value.shape), replica, replicas)
            for key, value in state.items()
            for a, b in [_bounds(cuts[key], value.numel(), group)]
        }
        for replica in range(replicas)
        for group in range(groups)
    ]


def evenly(state: Mapping[str, Tensor], ranks: int, replicas: int = 1) -> World:
    """`ranks` ranks in `replicas` groups, each group cutting every tensor into nearly equal parts."""
    parts = ranks // replicas
    cuts = {key: [value.numel() * i // parts for i in range(1, parts)] for key, value in state.items()}
    return split(state, cuts, replicas)


def _bounds(cuts: Sequence[int], end: int, group: int) -> tuple[int, int]:
    edges = [0, *cuts, end]
    return (edges[group], edges[group + 1]) if group + 1 < len(edges) else (end, end)


def emptied(world: World) -> World:
    """The same partitions with values that nothing wrote."""
    return [
        {
            key: Partition(torch.full_like(each.values, math.nan), each.start, each.shape)
            for key, each in partitions.items()
        }
        for partitions in world
    ]


def stores(checkpoints: Path, ranks: int, attempt: int = 1, limit_seconds: float = 20.0) -> list[Store]:
    return [Store(checkpoints, rank, ranks, attempt, limit_seconds) for rank in range(ranks)]


def save_all(
    each_store: Sequence[Store], world: World, step: int, asynchronous: bool = False
) -> list[Saved | BaseException]:
    """What each rank's save returned or raised."""

    def one(rank: int) -> Saved | BaseException:
        try:
            return each_store[rank].save(step, world[rank], FACTS, asynchronous)
        except BaseException as error:  # noqa: BLE001  the tests look at it
            return error

    with ThreadPoolExecutor(len(world)) as pool:
        return list(pool.map(one, range(len(world))))


def save(checkpoints: Path, world: World, step: int = 100, attempt: int = 1) -> Found:
    """Save with all ranks; every one must succeed."""
    for outcome in save_all(stores(checkpoints, len(world), attempt), world, step):
        if isinstance(outcome, BaseException):
            raise outcome
        assert outcome.step == step and not outcome.was_complete
    return Found(step, checkpoints / f"step_{step:08d}")


def restore(found: Found, world: World) -> Manifest:
    """Fill each rank's partitions in turn."""
    for rank, partitions in enumerate(world):
        manifest = Store(found.folder.parent, rank, len(world), attempt=9).restore(found, partitions)
    return manifest


def assert_holds(world: World, state: Mapping[str, Tensor]) -> None:
    for partitions in world:
        assert partitions.keys() == state.keys()
        for key, each in partitions.items():
            expected = state[key].reshape(-1)[each.start : each.start + each.values.numel()]
            assert torch.equal(each.values, expected), key
