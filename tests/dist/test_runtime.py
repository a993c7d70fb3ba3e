"""What ranks agree on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from llm_dist.errors import UserError
from llm_dist.runtime import Runtime
from tests.dist.ranks import Ranks

pytestmark = pytest.mark.dist


def agreed(here: Runtime) -> dict[str, object]:
    here.barrier()
    failing = UserError(f"rank {here.rank} broke") if here.rank in (1, 3) else None
    return {
        "rank": (here.rank, here.ranks, here.is_first),
        "one says yes": here.any(here.rank == 2),
        "nobody says yes": here.any(False),
        "sum": here.sum(torch.tensor([1.0, float(here.rank)])).tolist(),
        "of rank 0": here.share({"says": [here.rank, None, "\u2581"]}),
        "of rank 3": here.share(here.rank * "long ", source=3),
        "nothing": here.share(None),
        "first error": here.first_error(failing),
        "no error": here.first_error(None),
    }


def test_all_ranks_hear_the_same(group_of: Callable[[int], Ranks]) -> None:
    answers = group_of(4).run(agreed)

    assert [answer.pop("rank") for answer in answers] == [(rank, 4, rank == 0) for rank in range(4)]
    assert answers == 4 * [
        {
            "one says yes": True,
            "nobody says yes": False,
            "sum": [4.0, 6.0],
            "of rank 0": {"says": [0, None, "\u2581"]},
            "of rank 3": "long long long ",
            "nothing": None,
            "first error": "rank 1 broke",
            "no error": None,
        }
    ]
