from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_dist.checkpoint import commit, layout, store
from llm_dist.checkpoint.layout import Found
from llm_dist.checkpoint.store import Store

from .worlds import FACTS, STATE, evenly, make_state, save

MUTATING = ("open", "write", "fsync", "mkdir", "rename", "replace", "unlink", "rmdir")


def fake(checkpoints: Path, *steps: int) -> None:
    for step in steps:
        folder = checkpoints / layout.checkpoint_name(step)
        folder.mkdir(parents=True)
        (folder / layout.MANIFEST).write_text("{}")
        (folder / layout.data_name(0)).write_text("")


def steps(checkpoints: Path) -> list[int]:
    return [each.step for each in layout.list_complete(checkpoints)]


@pytest.mark.parametrize(
    ("keep_last", "keep_every_steps", "best_step", "kept"),
    [
        (1, None, None, [60]),
        (2, None, None, [50, 60]),
        (9, None, None, [10, 20, 30, 40, 50, 60]),
        (1, 20, None, [20, 40, 60]),
        (1, None, 29, [30, 60]),
        (1, 30, 10, [10, 30, 60]),
    ],
)
def test_retention(
    tmp_path: Path, keep_last: int, keep_every_steps: int | None, best_step: int | None, kept: list[int]
) -> None:
    fake(tmp_path, 10, 20, 30, 40, 50, 60)
    deleted = commit.retain(tmp_path, keep_last, keep_every_steps, best_step)
    assert steps(tmp_path) == kept
    assert sorted(deleted + kept) == [10, 20, 30, 40, 50, 60]


def test_a_crash_while_deleting_leaves_no_half_checkpoint_in_sight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(tmp_path, 10, 20)

    def crash(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", crash)
    with pytest.raises(KeyboardInterrupt):
        commit.retain(tmp_path, 1)
    monkeypatch.undo()
    assert steps(tmp_path) == [20]
    assert (tmp_path / "step_00000010").is_dir()
    assert commit.sweep(tmp_path, attempt=2) == ["step_00000010"]
    assert not (tmp_path / "step_00000010").exists()


def test_sweep_beside_the_training_leaves_alone_what_is_just_being_deleted(tmp_path: Path) -> None:
    (tmp_path / "step_00000010").mkdir()
    assert commit.sweep(tmp_path, attempt=2, save=1) == []
    assert commit.sweep(tmp_path, attempt=2) == ["step_00000010"]


def test_sweep_takes_older_saves_only(tmp_path: Path) -> None:
    fake(tmp_path, 10)
    names = [commit.writing_name(20, attempt, number) for attempt, number in [(1, 9), (3, 1), (3, 2), (4, 1)]]
    for name in names:
        (tmp_path / name).mkdir()
    assert commit.sweep(tmp_path, attempt=3, save=2) == names[:2]
    assert commit.sweep(tmp_path, attempt=3) == []
    assert steps(tmp_path) == [10]
    assert commit.sweep(tmp_path / "nowhere", attempt=3) == []


def test_a_damaged_checkpoint_is_set_aside_under_a_new_name_each_time(tmp_path: Path) -> None:
    names = []
    for _ in range(3):
        fake(tmp_path, 10)
        names.append(commit.set_aside(Found(10, tmp_path / "step_00000010")).name)
    assert names == ["step_00000010.damaged", "step_00000010.damaged-2", "step_00000010.damaged-3"]
    assert steps(tmp_path) == []


def test_everything_is_durable_before_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync, rename = os.fsync, os.rename

    def record_fsync(file: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{file}").readlink()))
        fsync(file)

    def record_rename(source: Path, target: Path) -> None:
        written = {str(path) for path in Path(source).iterdir()} - {str(Path(source) / layout.MANIFEST)}
        assert {name for path in written for name in (path, path + ".part")} & set(synced)
        assert all(path in synced or path + ".part" in synced for path in written)
        assert str(Path(source) / layout.MANIFEST) + ".part" in synced
        assert synced[-1] == str(source), "the names in the folder are made durable last"
        rename(source, target)
        synced.clear()

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "rename", record_rename)
    save(tmp_path, evenly(STATE, 2))
    assert synced == [str(tmp_path)], "then the final name"


def in_child(action: Callable[[], None]) -> int:
    """Exit code of a forked process that runs `action`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:
        try:
            action()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die_at(call: int) -> None:
    """Make the process vanish instead of making its `call`-th change to the file system."""
    count = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == call:
                os._exit(99)
            return function(*args, **kwargs)

        return wrapped

    for name in MUTATING:
        setattr(os, name, counted(getattr(os, name)))


def test_killed_at_any_change_of_the_file_system_the_latest_is_whole_and_the_next_attempt_goes_on(
    tmp_path: Path,
) -> None:
    older, newer = make_state({"param/w": (3, 2)}, 1), make_state({"param/w": (3, 2)}, 2)
    seen: set[tuple[int, ...]] = set()

    def save_and_retain(checkpoints: Path, call: int) -> None:
        die_at(call)
        Store(checkpoints, 0, 1, attempt=2).save(20, evenly(newer, 1)[0], FACTS)
        commit.retain(checkpoints, keep_last=1)

    for call in range(1, 200):
        checkpoints = tmp_path / str(call)
        save(checkpoints, evenly(older, 1), step=10)
        code = in_child(lambda folder=checkpoints, at=call: save_and_retain(folder, at))  # type: ignore[misc]
        assert code in (0, 99)
        seen.add(tuple(steps(checkpoints)))
        for found in layout.list_complete(checkpoints):
            expected = {10: older, 20: newer}[found.step]
            assert store.read_parameters(found.folder)["w"].equal(expected["param/w"])
        again = Store(checkpoints, 0, 1, attempt=3)
        again.sweep()
        again.save(20, evenly(newer, 1)[0], FACTS)
        assert {path.name for path in checkpoints.iterdir()} <= {"step_00000010", "step_00000020"}
        assert layout.find(checkpoints / "step_00000020").step == 20
        if code == 0:
            break
    assert code == 0 and call > 15, "the loop must have met every point"
    assert seen == {(10,), (10, 20), (20,)}
