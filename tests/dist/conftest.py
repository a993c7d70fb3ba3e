from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.dist.ranks import Ranks


@pytest.fixture(scope="session")
def group_of() -> Iterator[Callable[[int], Ranks]]:
    """Groups of ranks by size, started when first asked for."""
    groups: dict[int, Ranks] = {}

    def get(ranks: int) -> Ranks:
        if ranks not in groups:
            groups[ranks] = Ranks(ranks)
        return groups[ranks]

    yield get
    for group in groups.values():
        group.close()
