"""Two attempts live at once: whatever the older one does from any point on, the newer one's run is whole."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from llm_dist.checkpoint import layout, lease, store
from llm_dist.checkpoint.lease import Fence, Lease, Superseded
from llm_dist.checkpoint.store import Store
from llm_dist.errors import UserError
from tests.unit.checkpoint.worlds import FACTS, evenly, make_state, save_all, stores

SHAPES = {"param/w": (3, 2)}
OLD, NEW = make_state(SHAPES, 1), make_state(SHAPES, 2)
CHANGES = ("open", "write", "fsync", "rename", "replace", "unlink", "mkdir", "rmdir")


def steps(checkpoints: Path) -> list[int]:
    return [each.step for each in layout.list_complete(checkpoints)]


def one(checkpoints: Path, attempt: int) -> Store:
    made = Store(checkpoints, 0, 1, attempt)
    made.take_over()
    return made


def save(writer: Store, step: int, state: dict[str, Any]) -> None:
    writer.save(step, evenly(state, 1)[0], FACTS)


@contextmanager
def before_change(number: int, action: Callable[[], None]) -> Iterator[list[int]]:
    """Run `action` once, before the `number`-th change to the file system that is made inside; yields the count."""
    count = [0]
    real = {name: getattr(os, name) for name in CHANGES}

    def counted(name: str) -> Callable[..., Any]:
        def wrapped(*args: Any, **words: Any) -> Any:
            count[0] += 1
            if count[0] == number:
                action()
            return real[name](*args, **words)

        return wrapped

    for name in CHANGES:
        setattr(os, name, counted(name))
    try:
        yield count
    finally:
        for name, function in real.items():
            setattr(os, name, function)


def older_and_newer(checkpoints: Path, number: int) -> tuple[bool, bool, list[int]]:
    """Attempt 1 saves step 30 and deletes what is old; attempt 2 does as much, at once, before its `number`-th change.

    Returns whether attempt 1 said that step 30 is saved, whether attempt 2 ran, and what attempt 2 found.
    """
    first, found = one(checkpoints, 1), []
    for step in (10, 20):
        save(first, step, OLD)

    def take_over() -> None:
        second = one(checkpoints, 2)
        found.extend(steps(checkpoints))
        second.sweep()
        for step in (30, 40):
            if step > found[-1]:
                save(second, step, NEW)
                second.retain(keep_last=2)

    is_acknowledged = False
    with before_change(number, take_over) as count:
        try:
            save(first, 30, OLD)
            is_acknowledged = True
            first.retain(keep_last=2)
        except Superseded as error:
            assert error.by == 2
    return is_acknowledged, count[0] >= number, found


def test_whenever_a_newer_attempt_takes_over_nothing_acknowledged_is_lost_and_nothing_of_its_own_is_touched(
    tmp_path: Path,
) -> None:
    outcomes = set()
    for number in range(1, 200):
        checkpoints = tmp_path / str(number)
        is_acknowledged, has_run, found = older_and_newer(checkpoints, number)
        if not has_run:
            break
        assert found in ([10, 20], [10, 20, 30], [20, 30])
        assert not is_acknowledged or 30 in found, "said to be saved, and yet not gone on from"
        assert steps(checkpoints) == [30, 40]
        for step, state in ((30, OLD if 30 in found else NEW), (40, NEW)):
            saved = store.read_parameters(checkpoints / layout.checkpoint_name(step))
            assert saved["w"].equal(state["param/w"])
        outcomes.add((is_acknowledged, tuple(found)))
        third = one(checkpoints, 3)
        third.sweep()
        assert {path.name for path in checkpoints.iterdir()} == {
            *("step_00000030", "step_00000040", "claim_0003.json", "lease_0003.json")
        }
    assert number > 15, "it must have met every point"
    assert (False, (10, 20)) in outcomes and (True, (20, 30)) in outcomes


def test_what_an_older_attempt_publishes_too_late_is_ignored_and_makes_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looked, was frozen for an hour, and then renamed: as a cut node does that comes back."""
    first = one(tmp_path, 1)
    save(first, 10, OLD)
    second = one(tmp_path, 2)
    with monkeypatch.context() as frozen:
        frozen.setattr(Fence, "check", lambda self: None)
        save(first, 20, OLD)
    assert layout.is_complete(tmp_path / "step_00000020")
    assert steps(tmp_path) == [10]

    save(second, 20, NEW)
    assert steps(tmp_path) == [10, 20]
    assert store.read_parameters(tmp_path / "step_00000020")["w"].equal(NEW["param/w"])


def test_a_superseded_attempt_writes_deletes_and_amends_nothing_on_any_rank(tmp_path: Path) -> None:
    save_all(writers := stores(tmp_path, 2), evenly(OLD, 2), step=10)
    one(tmp_path, 2)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}

    with ThreadPoolExecutor(2) as threads:
        saving = [
            threads.submit(each.save, 20, part, FACTS) for each, part in zip(writers, evenly(OLD, 2), strict=True)
        ]
    for each in saving:
        with pytest.raises(Superseded, match="attempt 2 has taken this run over; attempt 1 leaves"):
            each.result()
    with pytest.raises(Superseded):
        writers[0].retain(keep_last=2)
    with pytest.raises(Superseded):
        writers[0].amend(10, {})
    assert steps(tmp_path) == [10]
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_an_older_attempt_cannot_take_over(tmp_path: Path) -> None:
    one(tmp_path, 5)
    with pytest.raises(Superseded, match="attempt 5 has taken"):
        one(tmp_path, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["claim_0005.json", "lease_0005.json"]


def test_a_claim_alone_stops_older_attempts_and_changes_nothing_for_readers(tmp_path: Path) -> None:
    """The newer attempt was killed between the two."""
    first = one(tmp_path, 1)
    save(first, 10, OLD)
    (tmp_path / lease.claim_name(2)).write_bytes(lease.claimant())
    assert steps(tmp_path) == [10]
    with pytest.raises(Superseded):
        save(first, 20, OLD)
    save(one(tmp_path, 3), 20, NEW)
    assert steps(tmp_path) == [10, 20]


def test_a_folder_without_leases_is_read_as_it_is(tmp_path: Path) -> None:
    save(Store(tmp_path, 0, 1, attempt=7), 10, OLD)
    assert steps(tmp_path) == [10]
    one(tmp_path, 1)  # a fork: its checkpoint carries its parent's attempt
    assert steps(tmp_path) == [10]
    assert json.loads((tmp_path / "lease_0001.json").read_text())["stands"] == [[10, 7]]


def test_what_a_lease_admits() -> None:
    current = Lease(3, {10: 1, 20: 2})
    assert current.admits(10, 1) and current.admits(20, 2)
    assert current.admits(30, 3) and current.admits(30, 4)
    assert not current.admits(30, 2) and not current.admits(20, 1)
    assert current.admits(30, None), "a damaged manifest is found, named and set aside by who loads it"


def test_a_damaged_lease_is_named_and_never_passed_over(tmp_path: Path) -> None:
    one(tmp_path, 1)
    (tmp_path / "lease_0001.json").write_text("{")
    with pytest.raises(UserError, match=r"lease_0001\.json is damaged; .* delete it"):
        steps(tmp_path)
