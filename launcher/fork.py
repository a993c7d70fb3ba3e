"""A new run that begins where another one was: its state, data position and tokenizer, with another future.

The parent is only read. The fork's checkpoint is hard-linked where the file system allows it: files of a complete
checkpoint are never written again, and deleting them in one run leaves them in the other. The folder appears under its
name when everything in it is durable.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llm_dist import config
from llm_dist.checkpoint import commit, layout, pieces
from llm_dist.checkpoint.layout import MANIFEST, Found, Manifest
from llm_dist.config_resume import check_resume
from llm_dist.errors import UserError

_PLACE = ("run.name", "run.dir")
_FORGOTTEN = {
    "best_loss_nats": None,
    "best_step": None,
    "evaluations_without_improvement": 0,
    "evaluated_step": None,
}
"""What an account knows of a held-out folder that the fork has no longer."""


@dataclass(frozen=True)
class Forked:
    """What was made."""

    run: str
    parent: str
    step: int
    """Where it begins."""
    steps: int
    """Where it ends."""
    changed: list[str]
    """Keys that have another value than in the parent."""


def fork(parent: Path, out: Path, step: int | None, overrides: Sequence[str]) -> Forked:
    """Make the run folder `out`, which goes on from `step` (the latest by default) of the run folder `parent`.

    Raises:
        UserError: there is no such checkpoint, it is damaged, `out` exists, or an override would change the past.
    """
    before = config.load(parent)
    found = layout.find(parent, step)
    now = _wanted(parent, out, overrides)
    rules = config.fields()
    may_change = [key for key, rule in rules.items() if rule == "from_now"]
    check_resume(before, now, may_change, found.step, "a fork has the parent's; start anew, perhaps with init.from")
    if os.path.lexists(out):
        raise UserError(f"--out {out} exists; a fork is a new run folder, name another")
    making = out.with_name(f".forking-{out.name}")
    shutil.rmtree(making, ignore_errors=True)
    try:
        _fill(making, parent, found, now, is_judged_anew=_first(now) != _first(before))
        making.rename(out)
        commit.fsync_folder(out.parent)
    except OSError as error:
        raise UserError(f"{out} was not made: {error.strerror or error}; {parent} is as it was") from None
    finally:
        shutil.rmtree(making, ignore_errors=True)
    changed = [key for key in rules if key not in _PLACE and _value(before, key) != _value(now, key)]
    return Forked(str(out), str(parent), found.step, now.run.steps, changed)


def _wanted(parent: Path, out: Path, overrides: Sequence[str]) -> config.Config:
    for text in overrides:
        if (key := text.partition("=")[0].strip()) in _PLACE:
            raise UserError(f"{key} follows from --out {out}; leave it away")
    if not out.name:
        raise UserError(f"--out {out} has no name; give the folder of the new run, for example runs/annealed")
    place = {"name": out.name, "dir": str(out.parent)}
    run = config.load(parent, overrides)
    return run.model_copy(update={"run": run.run.model_copy(update=place)})


def _fill(making: Path, parent: Path, found: Found, now: config.Config, is_judged_anew: bool) -> None:
    """Everything that a run folder at this step holds, durable."""
    manifest = pieces.verify(found.folder)
    checkpoint = making / "checkpoints" / found.folder.name
    checkpoint.mkdir(parents=True)
    (making / "attempts").mkdir()
    for files in manifest.files:
        for name in (layout.table_name(files.rank), layout.data_name(files.rank)):
            _link(found.folder / name, checkpoint / name)
    trajectory = {**manifest.trajectory, **(_FORGOTTEN if is_judged_anew else {})}
    pieces.write_durably(checkpoint / MANIFEST, replace(manifest, trajectory=trajectory).to_bytes())
    if (parent / "tokenizer").is_dir():
        shutil.copytree(parent / "tokenizer", making / "tokenizer")
    if skipped := _skipped_until(parent / "skipped.jsonl", found.step):
        pieces.write_durably(making / "skipped.jsonl", skipped)
    source = json.dumps(_source(parent, found, manifest), indent=2) + "\n"
    pieces.write_durably(making / "source.json", source.encode())
    pieces.write_durably(making / "config.json", now.to_json().encode())
    for folder in (checkpoint, checkpoint.parent, making):
        commit.fsync_folder(folder)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)
        with target.open("rb") as file:
            os.fsync(file.fileno())


def _skipped_until(path: Path, step: int) -> bytes:
    """The records of the steps that were left out so far; those after `step` are the parent's own."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    return "".join(f"{line}\n" for line in kept).encode()


def _source(parent: Path, found: Found, manifest: Manifest) -> dict[str, Any]:
    """What the fork is made from: as the parent says, but only of the data that had been read by then."""
    path = parent / "source.json"
    source = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    of_data = {
        name: value for name, value in manifest.fingerprints.items() if name == "tokenizer" or name.startswith("data.")
    }
    checksum = json.loads((found.folder / MANIFEST).read_text(encoding="utf-8"))["checksum"]
    origin = {"run": str(parent.resolve()), "step": found.step, "fingerprint": checksum}
    return {**source, "fingerprints": of_data, "forked_from": origin}


def _first(run: config.Config) -> str | None:
    """The held-out folder that says which checkpoint is best."""
    return next(iter(run.data.holdouts), None)


def _value(run: config.Config, key: str) -> Any:
    section, _, name = key.partition(".")
    return run.model_dump(by_alias=True)[section][name]
