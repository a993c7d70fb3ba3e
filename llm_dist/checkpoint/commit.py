"""How a checkpoint folder comes into being and goes, so that no crash at any point leaves a broken one in sight.

Ranks speak through the shared file system only: a rank's table says that its data is durable, rank 0 then writes the
manifest and renames the folder, and the other ranks see the final name appear. `rank_XXXXX.failed` says that a rank
gave up. No collectives, so all of it may run beside training. Torch-free.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from llm_dist.checkpoint import layout, lease
from llm_dist.checkpoint.layout import MANIFEST, Found, Manifest, RankFiles, table_name
from llm_dist.checkpoint.lease import Fence, Lease
from llm_dist.checkpoint.pieces import Table, check_cover, parse_table, write_durably

_WRITING_NAME = re.compile(r"\.writing-step_\d{8,}-attempt_(\d+)-save_(\d+)")
_FAILED_NAME = re.compile(r"rank_(\d{5,})\.failed")


def writing_name(step: int, attempt: int, save: int) -> str:
    """Temporary folder name; `save` counts the saves of this attempt, so that a second try meets no leftovers."""
    return f".writing-{layout.checkpoint_name(step)}-attempt_{attempt:04d}-save_{save:04d}"


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def take_over(checkpoints: Path, attempt: int) -> None:
    """Rank 0 at start-up: from now on only this attempt may write, and readers ignore what older ones publish.

    Raises:
        Superseded: a newer attempt has been faster.
    """
    checkpoints.mkdir(parents=True, exist_ok=True)
    Fence(checkpoints, attempt).check()
    write_durably(checkpoints / lease.claim_name(attempt), lease.claimant())
    fsync_folder(checkpoints)
    found = layout.list_complete(checkpoints)  # only now: what is acknowledged from here on is ours
    stands = {each.step: number for each in found if (number := layout.attempt_of(each.folder)) is not None}
    write_durably(checkpoints / lease.lease_name(attempt), lease.to_bytes(Lease(attempt, stands)))
    fsync_folder(checkpoints)
    for path in lease.older(checkpoints, attempt):
        path.unlink(missing_ok=True)


def poll(found: Callable[[], bool], limit_seconds: float, waiting_for: Callable[[], str]) -> None:
    """Return when `found` says so, looking less and less often.

    Raises:
        TimeoutError: not within `limit_seconds`; the message tells what `waiting_for` says.
    """
    end_seconds = time.monotonic() + limit_seconds
    pause_seconds = 0.002
    while not found():
        if time.monotonic() > end_seconds:
            raise TimeoutError(f"no sign within {limit_seconds:g} s of {waiting_for()}")
        time.sleep(pause_seconds)
        pause_seconds = min(pause_seconds * 1.5, 0.25)


def await_tables(writing: Path, num_ranks: int, limit_seconds: float, go_on: Callable[[], None]) -> None:
    """Rank 0: return once the data of every rank is durable.

    Raises:
        OSError: another rank gave up, or said nothing within `limit_seconds`.
    """

    def missing() -> list[int]:
        names = {path.name for path in writing.iterdir()}
        return [rank for rank in range(num_ranks) if table_name(rank) not in names]

    def all_there() -> bool:
        go_on()
        check_peers(writing)
        return not missing()

    poll(all_there, limit_seconds, lambda: f"the data of rank {', '.join(map(str, missing()))}")


def await_publication(
    writing: Path, final: Path, attempt: int, limit_seconds: float, go_on: Callable[[], None]
) -> None:
    """The other ranks: return once rank 0 of this attempt has published.

    Raises:
        OSError: a rank gave up, or nothing was published within `limit_seconds`.
    """

    def published() -> bool:
        go_on()
        if layout.is_complete(final) and layout.attempt_of(final) == attempt:
            return True
        check_peers(writing)
        return False

    poll(published, limit_seconds, lambda: f"the manifest of rank 0 in {final.name}")


def check_peers(writing: Path) -> None:
    """Raise an `OSError` that repeats what a rank said when it gave up, if one did."""
    try:
        names = sorted(path.name for path in writing.iterdir())
    except FileNotFoundError:
        return  # rank 0 has just renamed it, or no rank has begun
    for name in names:
        if match := _FAILED_NAME.fullmatch(name):
            reason = (writing / name).read_text(encoding="utf-8", errors="replace")
            raise OSError(f"rank {int(match[1])}: {reason or 'gave up, its own log says why'}")


def gather_tables(writing: Path, num_ranks: int) -> tuple[dict[str, tuple[int, ...]], list[RankFiles]]:
    """The shape of each state tensor and what the manifest records of each rank, once the ranges are seen to fit."""
    tables: list[Table] = []
    files: list[RankFiles] = []
    for rank in range(num_ranks):
        raw = (writing / table_name(rank)).read_bytes()
        tables.append(parse_table(raw))
        files.append(tables[-1].files(raw))
    return check_cover(tables), files


def publish(writing: Path, final: Path, manifest: Manifest) -> None:
    """Rank 0: write the manifest and give the folder its final name; durable, and ours, when this returns.

    Raises:
        FileExistsError: the step is there already.
        Superseded: a newer attempt has taken over; whatever has got its final name nevertheless, readers ignore.
    """
    fence = Fence(final.parent, manifest.attempt)
    write_durably(writing / MANIFEST, manifest.to_bytes())
    fsync_folder(writing)
    fence.check()
    if layout.counts(final):
        raise FileExistsError(f"{final.name} is there already")
    if final.exists():
        delete(final)  # what a crash has left of a deletion, or an older attempt has published too late
    writing.rename(final)  # onto a full folder this fails
    fsync_folder(final.parent)
    fence.check()


def amend(folder: Path, trajectory: Mapping[str, Any]) -> None:
    """Rank 0: replace the trajectory that a complete checkpoint records; it is complete all the while."""
    manifest = replace(layout.read_manifest(folder), trajectory=dict(trajectory))
    write_durably(folder / MANIFEST, manifest.to_bytes())
    fsync_folder(folder)


def give_up(writing: Path, rank: int, num_ranks: int, reason: str) -> None:
    """Free what this rank's failed save takes and tell the others, as well as a failing file system lets it."""
    if num_ranks == 1:
        shutil.rmtree(writing, ignore_errors=True)
        return
    with suppress(OSError):
        mine = [*writing.glob(f"rank_{rank:05d}.*"), *(writing.glob(MANIFEST + "*") if rank == 0 else ())]
        for path in mine:
            path.unlink()
    # The folder stays for the note, which a rank that comes late must find; `sweep` takes both.
    note = writing / f"rank_{rank:05d}.failed"
    try:
        write_durably(note, reason.encode())
    except OSError:
        with suppress(OSError):
            note.touch()


def delete(folder: Path) -> None:
    """Delete a checkpoint; from the first moment on it is no longer complete."""
    with suppress(FileNotFoundError):  # another attempt deletes it, too
        (folder / MANIFEST).unlink(missing_ok=True)
        fsync_folder(folder)
        shutil.rmtree(folder)


def retain(
    checkpoints: Path, keep_last: int, keep_every_steps: int | None = None, best_step: int | None = None
) -> list[int]:
    """Rank 0, after a save: delete all but the newest `keep_last`, the multiples, and the nearest to `best_step`.

    Returns:
        The steps deleted.
    """
    assert keep_last >= 1
    found = layout.list_complete(checkpoints)
    kept = set(found[-keep_last:])
    if keep_every_steps:
        kept |= {each for each in found if each.step % keep_every_steps == 0}
    if best_step is not None and (near := layout.nearest(found, best_step)):
        kept.add(near)
    doomed = [each for each in found if each not in kept]
    for each in doomed:
        delete(each.folder)
    return [each.step for each in doomed]


def sweep(checkpoints: Path, attempt: int, save: int = 0) -> list[str]:
    """Rank 0: delete what crashes left: temporary folders of earlier saves, and at start-up what no reader takes.

    The latter (half-deleted checkpoints, and those an older attempt has published too late) only then (`save` of 0):
    later, `retain` may just be deleting one, in another thread.

    Returns:
        The names deleted.
    """
    if not checkpoints.is_dir():
        return []
    swept = []
    count = {each.folder for each in layout.list_complete(checkpoints)}
    for path in checkpoints.iterdir():
        match = _WRITING_NAME.fullmatch(path.name)
        stale = match is not None and (int(match[1]), int(match[2])) < (attempt, save)
        if stale or (save == 0 and layout.step_of(path) is not None and path not in count):
            (path / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(path, ignore_errors=True)
            swept.append(path.name)
    return sorted(swept)


def set_aside(found: Found) -> Path:
    """Rank 0: rename a damaged checkpoint so that no reader takes it; returns its new path."""
    aside = found.folder.with_name(found.folder.name + ".damaged")
    count = 1
    while aside.exists():
        count += 1
        aside = found.folder.with_name(f"{found.folder.name}.damaged-{count}")
    found.folder.rename(aside)
    fsync_folder(aside.parent)
    return aside
