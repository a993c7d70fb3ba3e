"""Straight from raw text: a source that is no shard folder becomes one in the cache, once per content.

The cache's folder is named after the content of the inputs, the tokenizer and how text is split, so a changed file
gives another folder and an unchanged one is found again. For small jobs: the run waits until it is done.
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

from llm_dist import tokenizer
from llm_dist.data.documents import Split
from llm_dist.data.folder import DATASET
from llm_dist.data.inputs import content_of, find_files
from llm_dist.data.output import BusyOutputError
from llm_dist.data.places import is_url
from llm_dist.errors import UserError

_WAIT_SECONDS = 1.0


def shards_of(place: str, tokenizer_folder: str | None, split: Split, cache: Path) -> str:
    """The shard folder that `place` is or, with a tokenizer, the one that is made of the text there.

    Raises:
        UserError: there is no text, or it cannot be read; the cache cannot be written.
    """
    is_shards = any((Path(place) / name).is_file() for name in (DATASET, f"train/{DATASET}"))
    if tokenizer_folder is None or is_url(place) or is_shards:
        return place
    out = _folder_for(place, tokenizer_folder, split, cache)
    while not (out / "train" / DATASET).is_file():
        _make(place, tokenizer_folder, split, out, cache)
    return str(out / "train")


def _folder_for(place: str, tokenizer_folder: str, split: Split, cache: Path) -> Path:
    """Where the shards of the text at `place` are kept: another content has another folder."""
    files, _ = find_files([place])
    if any(file.path is None for file in files):
        raise UserError("standard input cannot be read again; name a file or a folder")
    made_of: dict[str, Any] = {
        "inputs": [content_of(file) for file in files],
        "tokenizer": tokenizer.load(tokenizer_folder).fingerprint,
        "split": split,
    }
    name = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:32]
    try:
        (cache / "shards").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"data.cache={cache}: cannot be written ({error.strerror}); name another folder") from None
    return cache / "shards" / name


def _make(place: str, tokenizer_folder: str, split: Split, out: Path, cache: Path) -> None:
    """Make the shards, or wait a moment where another process is making them."""
    from llm_dist.data.tokenize import tokenize

    try:
        tokenize([place], tokenizer_folder, out, holdout=0, split=split)
    except BusyOutputError:
        time.sleep(_WAIT_SECONDS)
    except PermissionError as error:
        raise UserError(f"data.cache={cache}: cannot be written ({error.strerror}); name another folder") from None
