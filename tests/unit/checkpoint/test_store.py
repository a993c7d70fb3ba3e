from __future__ import annotations

import errno
import math
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_dist.checkpoint import commit, layout, pieces, store
from llm_dist.checkpoint.layout import DamagedCheckpoint, Found, SaveFailed, StateMismatch
from llm_dist.checkpoint.store import Saved, Store
from llm_dist.engine.partition import Partition

from .worlds import (
    FACTS,
    SHAPES,
    STATE,
    World,
    assert_holds,
    emptied,
    evenly,
    make_state,
    restore,
    save,
    save_all,
    split,
    stores,
)

GOLDEN = Path(__file__).parents[2] / "golden" / "checkpoint_v1"
WORLDS = [(1, 1), (2, 1), (3, 1), (4, 1), (4, 2), (3, 3)]
"""(ranks, replicas)"""


# Any world to any other.


@pytest.mark.parametrize("saved_by", WORLDS)
def test_any_world_reads_what_any_other_wrote(tmp_path: Path, saved_by: tuple[int, int]) -> None:
    found = save(tmp_path, evenly(STATE, *saved_by))
    for read_by in WORLDS:
        world = emptied(evenly(STATE, *read_by))
        manifest = restore(found, world)
        assert_holds(world, STATE)
    assert (manifest.step, manifest.num_ranks, manifest.optimizer_step) == (100, saved_by[0], 100)
    assert manifest.trajectory == FACTS.trajectory and manifest.fingerprints == FACTS.fingerprints
    assert manifest.state == SHAPES


@st.composite
def states_cut_twice(draw: st.DrawFn) -> tuple[dict[str, torch.Tensor], World, World]:
    shapes = draw(
        st.dictionaries(
            st.sampled_from(["param/a", "param/b", "exp_avg/a"]),
            st.lists(st.integers(0, 7), max_size=3).map(tuple),
            min_size=1,
        )
    )
    state = make_state(shapes)

    def world() -> World:
        ranks = draw(st.integers(1, 4))
        cuts = {
            key: sorted(draw(st.lists(st.integers(0, value.numel()), min_size=ranks - 1, max_size=ranks - 1)))
            for key, value in state.items()
        }
        return split(state, cuts, replicas=draw(st.integers(1, 3)))

    return state, world(), world()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(states_cut_twice())
def test_uneven_cuts_to_uneven_cuts(
    tmp_path_factory: pytest.TempPathFactory, case: tuple[dict[str, torch.Tensor], World, World]
) -> None:
    state, saved_by, read_by = case
    folder = tmp_path_factory.mktemp("checkpoints")
    found = save(folder, saved_by)
    world = emptied(read_by)
    restore(found, world)
    assert_holds(world, state)
    data_bytes = sum(each.data_bytes - each.header_bytes for each in layout.read_manifest(found.folder).files)
    assert data_bytes == 4 * sum(value.numel() for value in state.values()), "nothing is written twice"
    shutil.rmtree(folder)


def test_chunks_of_pieces_reach_the_right_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "_CHUNK_ELEMENTS", 4)
    found = save(tmp_path, evenly(STATE, 3))
    world = emptied(evenly(STATE, 4))
    restore(found, world)
    assert_holds(world, STATE)


def test_a_rank_opens_only_the_files_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = make_state({"param/w": (64,)})
    found = save(tmp_path, evenly(state, 4))
    opened: list[int] = []
    read_table = store.read_table
    monkeypatch.setattr(
        store, "read_table", lambda folder, files: opened.append(files.rank) or read_table(folder, files)
    )
    store.read_into(found.folder, emptied(evenly(state, 4))[2], 2, 4)
    assert opened == [2]
    opened.clear()
    store.read_into(found.folder, emptied(evenly(state, 2))[1], 1, 2)
    assert sorted(opened) == [2, 3]


def test_a_partition_of_values_that_are_views_writes_through(tmp_path: Path) -> None:
    found = save(tmp_path, evenly(STATE, 2))
    live = {key: torch.zeros_like(value) for key, value in STATE.items()}
    views = {key: Partition(value.view(-1), 0, tuple(value.shape)) for key, value in live.items()}
    store.read_into(found.folder, views)
    assert all(torch.equal(live[key], STATE[key]) for key in STATE)


def test_parameters_alone_have_their_names_and_shapes(tmp_path: Path) -> None:
    found = save(tmp_path, evenly(STATE, 3))
    parameters = store.read_parameters(found.folder)
    assert parameters.keys() == {"embedding.weight", "norm.weight", "scale"}
    assert all(torch.equal(value, STATE[f"param/{name}"]) for name, value in parameters.items())


def test_values_keep_every_bit(tmp_path: Path) -> None:
    odd = torch.tensor([-0.0, math.nan, math.inf, -math.inf, 1e-45, 3.4e38])
    found = save(tmp_path, evenly({"param/w": odd}, 2))
    assert store.read_parameters(found.folder)["w"].view(torch.int32).equal(odd.view(torch.int32))


# Another model.


def test_other_tensors_and_other_shapes_are_named(tmp_path: Path) -> None:
    found = save(tmp_path, evenly(STATE, 2))
    other = {key: value for key, value in STATE.items() if key != "param/scale"} | {"param/new": torch.ones(1)}
    with pytest.raises(StateMismatch, match="has no param/new; it has param/scale, unknown here"):
        restore(found, evenly(other, 1))
    with pytest.raises(StateMismatch, match=r"param/norm.weight has shape \[6\] there and \[7\] here"):
        restore(found, evenly(STATE | {"param/norm.weight": torch.ones(7)}, 1))


# Damage.


def damages(path: Path) -> Iterator[str]:
    """Damage the file in turn by deletion, truncation, growth and a flipped bit at a few places."""
    raw = path.read_bytes()
    path.unlink()
    yield "delete"
    for size in {0, len(raw) // 2, len(raw) - 1}:
        path.write_bytes(raw[:size])
        yield f"truncate to {size}"
    path.write_bytes(raw + b"\0")
    yield "grow"
    for at in {*range(0, len(raw), max(1, len(raw) // 12)), len(raw) - 1}:
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1 << at % 8]) + raw[at + 1 :])
        yield f"flip a bit of byte {at}"
    path.write_bytes(raw)


@pytest.mark.parametrize("read_by", [1, 2, 4])
def test_every_damage_to_every_file_is_named_and_never_loaded(tmp_path: Path, read_by: int) -> None:
    found = save(tmp_path, evenly(STATE, 4, 2))
    names = sorted(path.name for path in found.folder.iterdir())
    assert len(names) == 2 * 4 + 1
    for name in names:
        for damage in damages(found.folder / name):
            with pytest.raises(DamagedCheckpoint) as caught:
                restore(found, emptied(evenly(STATE, read_by)))
            assert name in str(caught.value), damage
            with pytest.raises(DamagedCheckpoint):
                pieces.verify(found.folder)
    restore(found, emptied(evenly(STATE, read_by)))
    pieces.verify(found.folder)


def test_damaged_parameters_are_not_read(tmp_path: Path) -> None:
    found = save(tmp_path, evenly(STATE, 1))
    path = found.folder / layout.data_name(0)
    raw = path.read_bytes()
    path.write_bytes(raw[:-40] + bytes(40))
    with pytest.raises(DamagedCheckpoint, match=r"rank_00000.safetensors: piece .* does not match"):
        pieces.verify(found.folder)


def test_a_pickle_in_place_of_the_data_is_not_run(tmp_path: Path) -> None:
    found = save(tmp_path, evenly(STATE, 1))
    marker = tmp_path / "ran"

    class Malicious:
        def __reduce__(self) -> tuple[object, ...]:
            return (os.mkdir, (str(marker),))

    for path in list(found.folder.iterdir()):
        raw = path.read_bytes()
        torch.save(Malicious(), path)
        with pytest.raises(DamagedCheckpoint):
            store.read_parameters(found.folder)
        path.write_bytes(raw)
    assert not marker.exists()


# Asynchronous.


def test_an_asynchronous_save_holds_the_values_of_its_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synchronous = save(tmp_path / "sync", evenly(STATE, 2))
    changed = threading.Event()

    def late(folder: Path, rank: int, *rest: object) -> pieces.Table:
        changed.wait(20)
        return pieces.write_data(folder, rank, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(store, "write_data", late)
    world, each_store = evenly(STATE, 2), stores(tmp_path / "async", 2)
    save_all(each_store, world, 100, asynchronous=True)
    for partition in world[0].values():
        partition.values.fill_(-1)
    for partition in world[1].values():
        partition.values.fill_(-2)
    changed.set()
    assert [each.wait() for each in each_store] == [100, 100]
    for name in ("rank_00000.safetensors", "rank_00001.safetensors", "rank_00001.json"):
        written = tmp_path / "async" / "step_00000100" / name
        assert written.read_bytes() == (synchronous.folder / name).read_bytes()


def test_training_goes_on_while_it_is_written_and_the_next_save_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    publish = commit.publish

    def slow(*args: object) -> None:
        release.wait(20)
        publish(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(commit, "publish", slow)
    one, partitions = Store(tmp_path, 0, 1, 1), evenly(STATE, 1)[0]
    saved = one.save(1, partitions, FACTS, asynchronous=True)
    assert saved == Saved(1, saved.stall_seconds, 4 * sum(value.numel() for value in STATE.values()))
    assert one.poll() is None and layout.latest(tmp_path) is None
    threading.Timer(0.1, release.set).start()
    assert one.save(2, partitions, FACTS, asynchronous=True).stall_seconds > 0.05
    assert one.wait() == 2
    assert [each.step for each in layout.list_complete(tmp_path)] == [1, 2]


@pytest.mark.parametrize("is_reserved", [False, True])
def test_a_second_asynchronous_save_waits_and_takes_the_memory_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_reserved: bool
) -> None:
    """One buffer: did the second not wait, the first checkpoint would hold its values."""
    second_begins, addresses = threading.Event(), []

    def late(folder: Path, rank: int, sources: dict[str, pieces.Source], *rest: object) -> pieces.Table:
        second_begins.wait(20)
        addresses.append([source.load().ctypes.data for source in sources.values()])
        return pieces.write_data(folder, rank, sources, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(store, "write_data", late)
    one, partitions = Store(tmp_path, 0, 1, 1), evenly(STATE, 1)[0]
    if is_reserved:
        one.reserve(partitions)
    one.save(1, partitions, FACTS, asynchronous=True)
    later = {key: value + 1 for key, value in STATE.items()}
    wait = one.wait
    monkeypatch.setattr(one, "wait", lambda: second_begins.set() or wait())
    one.save(2, evenly(later, 1)[0], FACTS, asynchronous=True)
    one.wait()

    for step, state in ((1, STATE), (2, later)):
        world = emptied(evenly(STATE, 1))
        restore(Found(step, tmp_path / layout.checkpoint_name(step)), world)
        assert_holds(world, state)
    assert addresses[0] == addresses[1]


def test_old_checkpoints_are_deleted_beside_the_training_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, evenly(STATE, 1), step=1)
    save(tmp_path, evenly(STATE, 1), step=2)
    may_publish, may_delete = threading.Event(), threading.Event()
    publish, delete = commit.publish, commit.delete
    monkeypatch.setattr(commit, "publish", lambda *args: may_publish.wait(20) and publish(*args))
    monkeypatch.setattr(commit, "delete", lambda folder: may_delete.wait(20) and delete(folder))
    one = Store(tmp_path, 0, 1, 1)
    one.save(3, evenly(STATE, 1)[0], FACTS, asynchronous=True)
    one.retain(1)
    assert [each.step for each in layout.list_complete(tmp_path)] == [1, 2]
    may_publish.set()
    commit.poll(lambda: one.poll() == 3, 20, lambda: "step 3, acknowledged before the deletion ends")
    assert [each.step for each in layout.list_complete(tmp_path)] == [1, 2, 3]
    may_delete.set()
    one.wait()
    assert [each.step for each in layout.list_complete(tmp_path)] == [2, 3]


def test_a_deletion_that_fails_beside_the_training_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(folder: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(folder))

    one, partitions = Store(tmp_path, 0, 1, 1), evenly(STATE, 1)[0]
    for step in (1, 2):
        one.save(step, partitions, FACTS)
    monkeypatch.setattr(commit, "delete", broken)
    one.save(3, partitions, FACTS, asynchronous=True)
    one.retain(1)
    with pytest.raises(OSError, match=r"Input/output error: .*step_00000001"):
        one.wait()
    assert one.wait() == 3


def test_a_failed_asynchronous_save_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, partitions = Store(tmp_path, 0, 1, 1), evenly(STATE, 1)[0]
    with monkeypatch.context() as broken:
        broken.setattr(os, "write", no_space)
        one.save(1, partitions, FACTS, asynchronous=True)
        with pytest.raises(SaveFailed, match="No space left on device"):
            one.wait()
    assert one.wait() is None
    assert not one.save(1, partitions, FACTS).was_complete
    assert one.poll() == 1


# Saving again, and failing.


def test_a_step_that_stands_is_not_written_again(tmp_path: Path) -> None:
    found = save(tmp_path, evenly(STATE, 2))
    before = (found.folder / layout.MANIFEST).stat()
    outcomes = save_all(stores(tmp_path, 2, attempt=2), evenly(make_state(SHAPES, 5), 2), 100)
    assert all(isinstance(each, Saved) and each.was_complete and each.num_bytes == 0 for each in outcomes)
    assert (found.folder / layout.MANIFEST).stat() == before
    assert names_in(tmp_path) == ["step_00000100"]


def test_a_half_deleted_leftover_of_the_same_name_gives_way(tmp_path: Path) -> None:
    leftover = tmp_path / "step_00000100"
    leftover.mkdir()
    (leftover / "rank_00007.json").write_text("{}")
    found = save(tmp_path, evenly(STATE, 2))
    assert not (found.folder / "rank_00007.json").exists()
    restore(found, emptied(evenly(STATE, 1)))


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def no_space(*_: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def assert_failed_clean(tmp_path: Path, outcomes: list[Saved | BaseException], reason: str) -> None:
    for each in outcomes:
        assert isinstance(each, SaveFailed) and isinstance(each.__cause__, OSError)
        assert reason in str(each) and "step_00000200" in str(each) and "\n" not in str(each)
        assert str(each).endswith("the latest complete checkpoint is step_00000100")
    assert layout.latest(tmp_path) == Found(100, tmp_path / "step_00000100")
    assert not (tmp_path / "step_00000200").exists()
    assert sum(path.stat().st_size for path in tmp_path.glob(".writing*/*")) < 1000, "the space is free again"


@pytest.mark.parametrize("failing_rank", [0, 1, 2])
def test_when_one_rank_fails_all_ranks_say_so_and_none_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing_rank: int
) -> None:
    each_store, world = stores(tmp_path, 3), evenly(STATE, 3)
    save_all(each_store, world, 100)

    def write_data(folder: Path, rank: int, *rest: object) -> pieces.Table:
        return no_space() if rank == failing_rank else pieces.write_data(folder, rank, *rest)  # type: ignore

    with monkeypatch.context() as broken:
        broken.setattr(store, "write_data", write_data)
        outcomes = save_all(each_store, world, 200)
    assert_failed_clean(tmp_path, outcomes, "No space left on device")
    others = [str(each) for rank, each in enumerate(outcomes) if rank != failing_rank]
    assert all(f"rank {failing_rank}: " in each for each in others)
    outcomes = save_all(each_store, world, 200)  # the same step again, in spite of what the failure left
    assert all(isinstance(each, Saved) for each in outcomes)
    assert names_in(tmp_path) == ["step_00000100", "step_00000200"]


def test_a_rank_that_never_comes_is_named_after_the_limit(tmp_path: Path) -> None:
    save(tmp_path, evenly(STATE, 3))
    each_store, world = stores(tmp_path, 3, attempt=2, limit_seconds=0.3), evenly(STATE, 3)
    outcomes = save_all([each_store[0], each_store[2]], [world[0], world[2]], 200)
    assert_failed_clean(tmp_path, outcomes, "no sign within 0.3 s of")
    assert "the data of rank 1" in str(outcomes[0])


def test_a_late_rank_sees_that_the_others_gave_up(tmp_path: Path) -> None:
    save(tmp_path, evenly(STATE, 2))
    each_store, world = stores(tmp_path, 2, attempt=2, limit_seconds=0.1), evenly(STATE, 2)
    save_all(each_store[:1], world[:1], 200)
    late = Store(tmp_path, 1, 2, attempt=2)
    started = time.monotonic()
    with pytest.raises(SaveFailed, match=r"rank 0: no sign within 0\.1 s"):
        late.save(200, world[1], FACTS)
    assert time.monotonic() - started < 5


def test_a_rank_too_short_of_space_to_say_why_is_still_heard(tmp_path: Path) -> None:
    writing = tmp_path / commit.writing_name(200, attempt=1, save=1)
    writing.mkdir()
    (writing / "rank_00001.failed").touch()
    with pytest.raises(SaveFailed, match="rank 1: gave up, its own log says why; there is no complete checkpoint yet"):
        Store(tmp_path, 0, 2, attempt=1).save(200, evenly(STATE, 2)[0], FACTS)


def test_a_save_can_be_abandoned(tmp_path: Path) -> None:
    save(tmp_path, evenly(STATE, 2))
    rank_0 = Store(tmp_path, 0, 2, attempt=2)
    rank_0.save(200, evenly(STATE, 2)[0], FACTS, asynchronous=True)
    rank_0.abandon()
    with pytest.raises(SaveFailed, match="abandoned; the latest complete checkpoint is step_00000100"):
        rank_0.wait()


def test_a_state_with_a_hole_is_a_defect_and_is_not_published(tmp_path: Path) -> None:
    world = evenly(STATE, 2)
    world[1]["param/norm.weight"] = Partition(torch.ones(2), 4, (6,))
    outcomes = save_all(stores(tmp_path, 2), world, 100)
    assert isinstance(outcomes[0], AssertionError) and isinstance(outcomes[1], SaveFailed)
    assert "param/norm.weight: elements 3 to 4 are held by no rank" in str(outcomes[0])
    assert layout.latest(tmp_path) is None


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_leaves_the_earlier_checkpoint(small_disk: Path) -> None:
    save(small_disk, evenly(STATE, 2))
    outcomes = save_all(stores(small_disk, 2, attempt=2), evenly({"param/w": torch.ones(90_000)}, 2), 200)
    assert_failed_clean(small_disk, outcomes, "No space left on device")
    restore(Found(100, small_disk / "step_00000100"), emptied(evenly(STATE, 1)))
    save(small_disk, evenly(STATE, 2), step=300, attempt=3)


def test_a_read_only_disk_leaves_the_earlier_checkpoint(small_disk: Path) -> None:
    save(small_disk, evenly(STATE, 2))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    outcomes = save_all(stores(small_disk, 2, attempt=2), evenly(STATE, 2), 200)
    assert_failed_clean(small_disk, outcomes, "Read-only file system")


# Golden.


def golden_state() -> dict[str, torch.Tensor]:
    """What the golden checkpoint of format 1 holds; it was written by two ranks, two replicas each, and never again."""
    shapes = {"param/embedding.weight": (5, 3), "param/norm.weight": (3,), "exp_avg/embedding.weight": (5, 3)}
    return {
        key: torch.arange(math.prod(shape), dtype=torch.float32).view(shape) / 8 + len(key)
        for key, shape in shapes.items()
    }


@pytest.mark.parametrize("ranks", [1, 3])
def test_the_golden_checkpoint_of_format_1_loads(ranks: int) -> None:
    world = emptied(evenly(golden_state(), ranks))
    manifest = restore(Found(100, GOLDEN), world)
    assert_holds(world, golden_state())
    assert (manifest.format, manifest.step, manifest.attempt, manifest.num_ranks) == (1, 100, 1, 4)
    assert manifest.trajectory == FACTS.trajectory and manifest.fingerprints == FACTS.fingerprints
