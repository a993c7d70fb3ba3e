"""The code a job runs, kept in its run folder: what is edited later changes no queued and no requeued job.

RUN/code/3f2a.../llm_dist, launcher     the packages, as they were
source.json            commit and uncommitted difference, where they came from a checkout
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PACKAGES = Path(__file__).resolve().parents[2]
"""The folder that holds the packages this process runs."""
_NAMES = ("llm_dist", "launcher")
_CHARACTERS = 16


def freeze(run: Path) -> Path:
    """Copy the packages into the run folder, unless they are there; returns the folder to put on PYTHONPATH."""
    files = dict(_files())
    folder = run / "code" / _fingerprint(files)
    if folder.is_dir():
        return folder
    making = folder.with_name(f".{folder.name}-{os.getpid()}")
    shutil.rmtree(making, ignore_errors=True)
    for name, source in files.items():
        target = making / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    (making / "source.json").write_text(json.dumps(_source(), indent=2) + "\n", encoding="utf-8")
    try:
        making.rename(folder)
    except OSError:
        shutil.rmtree(making, ignore_errors=True)
        if not folder.is_dir():  # else somebody else has just made it
            raise
    return folder


def _files() -> Iterator[tuple[str, Path]]:
    for name in _NAMES:
        for path in sorted((PACKAGES / name).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc":
                yield path.relative_to(PACKAGES).as_posix(), path


def _fingerprint(files: dict[str, Path]) -> str:
    digest = hashlib.sha256()
    for name, path in files.items():
        digest.update(name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:_CHARACTERS]


def _source() -> dict[str, Any]:
    is_checkout = _git("ls-files", "--error-unmatch", _NAMES[1]) is not None
    commit = _git("rev-parse", "HEAD") if is_checkout else None
    return {"commit": commit and commit.strip(), "diff": _git("diff", "HEAD", "--", *_NAMES) if is_checkout else None}


def _git(*words: str) -> str | None:
    try:
        answer = subprocess.run(["git", "-C", str(PACKAGES), *words], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return answer.stdout if answer.returncode == 0 else None
