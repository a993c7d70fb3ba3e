"""What a complete checkpoint is: its names, its manifest, and how it is found.

    checkpoints/step_00000100/manifest.json         there if and only if the checkpoint is complete
                              rank_00000.json       which ranges of which tensors this rank wrote, with checksums
                              rank_00000.safetensors
    checkpoints/.writing-step_00000200-attempt_0003-save_0002/     being written; readers never look inside
    checkpoints/step_00000050.damaged/              set aside by training
    checkpoints/lease_0003.json                     what stood when attempt 3 took over (`lease`)

Imports no torch and knows no engine: a login node lists and finds checkpoints with it. How a folder comes and goes
is in `commit`, what the ranks' files hold in `pieces`, and who fills them in `store`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from xxhash import xxh3_64_hexdigest

from llm_dist.checkpoint import lease
from llm_dist.errors import UserError

FORMAT = 1
"""Version of the format; every version ever released stays loadable."""
MANIFEST = "manifest.json"
_COMPLETE_NAME = re.compile(r"step_(\d{8,})")


class DamagedCheckpoint(UserError):
    """A complete checkpoint does not hold what was written; the message names the file and the piece."""

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(f"{path}: {what}; the checkpoint is damaged, choose another step")


class StateMismatch(UserError):
    """The checkpoint holds another state than the one to be filled: other tensors or other shapes."""


class SaveFailed(UserError):
    """A checkpoint could not be written; the earlier ones stand. The `OSError` is its cause."""

    def __init__(self, folder: Path, reason: OSError) -> None:
        try:
            latest_found = latest(folder.parent)
        except OSError as error:
            standing = f"{folder.parent} cannot be listed: {error.strerror}"
        else:
            standing = (
                f"the latest complete checkpoint is {latest_found.folder.name}"
                if latest_found
                else "there is no complete checkpoint yet"
            )
        super().__init__(f"{folder} was not saved: {reason.strerror or reason}; {standing}")


def checkpoint_name(step: int) -> str:
    """Folder name of the complete checkpoint of `step`."""
    return f"step_{step:08d}"


def table_name(rank: int) -> str:
    """File that says which pieces `rank` wrote."""
    return f"rank_{rank:05d}.json"


def data_name(rank: int) -> str:
    """File that holds the pieces `rank` wrote."""
    return f"rank_{rank:05d}.safetensors"


@dataclass(frozen=True)
class Facts:
    """What a checkpoint records beside the state tensors; the trainer's, opaque to this room.

    Attributes:
        fingerprints: what the state was made from: model, data, tokenizer, config, code.
        trajectory: whatever else can change the trajectory, as JSON. `best_step`, where present, is the step of the
            best validation loss so far: `find(best=True)` reads it.
        optimizer_step: updates the optimizer has made (skipped steps make none).
        engine: who held the state, for the reader's eyes.
    """

    fingerprints: Mapping[str, str]
    trajectory: Mapping[str, Any]
    optimizer_step: int
    engine: str = ""


@dataclass(frozen=True)
class RankFiles:
    """Sizes and checksums of the two files of one rank; the pieces' own checksums stand in the table."""

    rank: int
    table_bytes: int
    table_xxh3: str
    data_bytes: int
    header_bytes: int
    header_xxh3: str


@dataclass(frozen=True)
class Manifest:
    """Everything that is known about a complete checkpoint without opening the ranks' files."""

    step: int
    attempt: int
    num_ranks: int
    optimizer_step: int
    engine: str
    fingerprints: dict[str, str]
    trajectory: dict[str, Any]
    state: dict[str, tuple[int, ...]]
    """Shape of each state tensor."""
    files: list[RankFiles]
    created: str
    """Time of writing, ISO 8601, UTC."""
    versions: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT

    def to_bytes(self) -> bytes:
        """Canonical text with its own checksum: what manifest.json holds."""
        plain = json.loads(json.dumps(asdict(self)))  # so that keys sort as they will after reading
        return _sealed(plain)


@dataclass(frozen=True)
class Found:
    """A complete checkpoint on disk."""

    step: int
    folder: Path


def is_complete(folder: Path) -> bool:
    """Whether `folder` (under its final name) is a complete checkpoint."""
    return (folder / MANIFEST).is_file()


def step_of(folder: Path) -> int | None:
    """The step a final name stands for; None for temporary names, damaged ones and everything else."""
    match = _COMPLETE_NAME.fullmatch(folder.name)
    return int(match[1]) if match else None


def list_complete(checkpoints: Path) -> list[Found]:
    """Complete checkpoints of a `checkpoints` folder, oldest first; empty where there is no such folder.

    Without those that an attempt has published after a newer one took over.
    """
    if not checkpoints.is_dir():
        return []
    found = [Found(step, path) for path in checkpoints.iterdir() if (step := step_of(path)) is not None]
    complete = sorted((each for each in found if is_complete(each.folder)), key=lambda each: each.step)
    current = lease.newest(checkpoints)
    return [each for each in complete if current is None or current.admits(each.step, attempt_of(each.folder))]


def attempt_of(folder: Path) -> int | None:
    """The attempt that wrote a complete checkpoint; None where its manifest does not tell, being damaged."""
    try:
        return int(json.loads((folder / MANIFEST).read_bytes())["attempt"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def counts(folder: Path) -> bool:
    """Whether readers take the complete checkpoint at `folder`, as `list_complete` says."""
    return any(each.folder == folder for each in list_complete(folder.parent))


def latest(checkpoints: Path) -> Found | None:
    """The newest complete checkpoint, computed from what is there."""
    return next(reversed(list_complete(checkpoints)), None)


def nearest(found: Iterable[Found], step: int) -> Found | None:
    """The checkpoint nearest to `step`; of two equally near, the later."""
    return min(found, key=lambda each: (abs(each.step - step), -each.step), default=None)


def find(path: Path, step: int | None = None, best: bool = False) -> Found:
    """The checkpoint that `path` means: a checkpoint folder itself, or one of a run folder's (its latest by default).

    Raises:
        UserError: there is none, or not the one asked for.
    """
    if is_complete(path):
        if step is not None or best:
            raise UserError(f"{path} is one checkpoint; name its run folder to choose with --step or --best")
        return Found(read_manifest(path).step, path)
    if step_of(path) is not None and path.is_dir():
        raise UserError(f"{path} is an incomplete checkpoint: it has no {MANIFEST}; name another, or the run folder")
    if not (path / "config.json").is_file():
        raise UserError(f"{path} is neither a run folder (no config.json) nor a checkpoint (no {MANIFEST})")
    if step is not None and best:
        raise UserError(f"--step {step} and --best choose different checkpoints; give one of them")
    return _choose(path, list_complete(path / "checkpoints"), step, best)


def _choose(run: Path, found: list[Found], step: int | None, best: bool) -> Found:
    if not found:
        raise UserError(f"{run} has no complete checkpoint yet; train until checkpoint.every_steps has passed")
    if step is not None:
        for each in found:
            if each.step == step:
                return each
        steps = ", ".join(str(each.step) for each in found)
        raise UserError(f"{run} has no complete checkpoint of step {step}; it has {steps}")
    if not best:
        return found[-1]
    best_step = read_manifest(found[-1].folder).trajectory.get("best_step")
    if best_step is None:
        raise UserError(f"{run} has no best checkpoint: nothing was evaluated; set data.holdout and eval.every_steps")
    chosen = nearest(found, best_step)
    assert chosen is not None
    return chosen


def read_manifest(folder: Path) -> Manifest:
    """Read and verify manifest.json.

    Raises:
        DamagedCheckpoint: it is missing or not what was written.
        UserError: a newer version wrote it. The seal is the same in every version, so that damage never reads as this.
    """
    path = folder / MANIFEST
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise DamagedCheckpoint(path, "is missing") from None
    fields = _unsealed(raw, path)
    if fields["format"] > FORMAT:
        raise UserError(
            f"{path}: format {fields['format']} is of a newer llm_dist, this one reads up to {FORMAT}; upgrade llm_dist"
        )
    fields["state"] = {key: tuple(shape) for key, shape in fields["state"].items()}
    fields["files"] = [RankFiles(**each) for each in fields["files"]]
    return Manifest(**fields)


def check_same_tensors(folder: Path, manifest: Manifest, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse to fill a state of the given `shapes` from a checkpoint of another one.

    Raises:
        StateMismatch: naming the first tensors that differ.
    """
    there = manifest.state
    differ = [f"it has no {key}" for key in sorted(shapes.keys() - there.keys())]
    differ += [f"it has {key}, unknown here" for key in sorted(there.keys() - shapes.keys())]
    differ += [
        f"{key} has shape {list(there[key])} there and {list(shapes[key])} here"
        for key in sorted(shapes.keys() & there.keys())
        if there[key] != tuple(shapes[key])
    ]
    if differ:
        more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
        raise StateMismatch(f"{folder} is of another model: {'; '.join(differ[:3])}{more}; use that model's config")


def check_frame(folder: Path, manifest: Manifest) -> None:
    """Verify everything but the pieces: that each file is there at its size, each table and each header unchanged.

    Raises:
        DamagedCheckpoint: naming the first file that differs.
    """
    for files in manifest.files:
        read_checked(folder / table_name(files.rank), files.table_bytes, files.table_bytes, files.table_xxh3)
        read_checked(folder / data_name(files.rank), files.data_bytes, files.header_bytes, files.header_xxh3)


def read_checked(path: Path, file_bytes: int, count_bytes: int, checksum: str) -> bytes:
    """The first `count_bytes` of a file of `file_bytes`, verified.

    Raises:
        DamagedCheckpoint: the file is missing, has another size or another checksum.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(count_bytes)
        size_bytes = path.stat().st_size
    except FileNotFoundError:
        raise DamagedCheckpoint(path, "is missing") from None
    if size_bytes != file_bytes:
        raise DamagedCheckpoint(path, f"has {size_bytes} bytes, not {file_bytes}")
    if xxh3_64_hexdigest(raw) != checksum:
        raise DamagedCheckpoint(path, "its table of contents does not match its checksum")
    return raw


def _sealed(fields: dict[str, Any]) -> bytes:
    return _canonical({**fields, "checksum": xxh3_64_hexdigest(_canonical(fields))})


def _unsealed(raw: bytes, path: Path) -> dict[str, Any]:
    """Undo `_sealed`; comparing the whole text catches even a change that JSON would read as the same value."""
    try:
        fields = json.loads(raw)
        del fields["checksum"]
        intact = _sealed(fields) == raw
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise DamagedCheckpoint(path, "does not match its checksum")
    assert isinstance(fields, dict)
    return fields


def _canonical(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, indent=1, sort_keys=True).encode() + b"\n"
