"""The folder that a tokenize job fills: made in a hidden folder, published by renames, never mixed with another job's.

Complete if and only if `train` is there: `holdout` is renamed into place before it. What a killed job left is
discarded by the next one. Knows nothing of text, tokenizers or how shards are made.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from llm_dist.data.folder import read_dataset
from llm_dist.data.shards import sync_folder
from llm_dist.errors import UserError

_WORK = ".making"


class Output:
    """The output folder while one job holds it; use in a `with` block.

    Raises:
        UserError: `folder` is a file, or another process is filling it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.work = folder / _WORK
        """Everything unfinished; gone when the block ends."""

    def __enter__(self) -> Self:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"{self.folder}: a file stands in the way; choose another --out") from None
        self._descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._descriptor)
            raise UserError(f"{self.folder}: another process is filling it; wait, or choose another --out") from None
        except OSError:
            # Network file systems may know no lock on folders; there two jobs at once are the user's to avoid.
            self.is_locked = False
        else:
            self.is_locked = True
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.work)
        os.close(self._descriptor)

    def dataset(self, part: str) -> dict[str, Any] | None:
        """dataset.json of `train` or `holdout`; None when the part is not there.

        Raises:
            UserError: something else stands under that name.
        """
        folder = self.folder / part
        return read_dataset(folder) if folder.exists() else None

    def is_made_from(self, made_from: Mapping[str, Any]) -> bool:
        """Whether the output is finished and made from this; what a kill between the renames left is discarded.

        Raises:
            UserError: the folder holds shards made from something else.
        """
        parts = {part: self.dataset(part) for part in ("holdout", "train")}
        for part, dataset in parts.items():
            found = {} if dataset is None else dataset.get("made_from", {})
            differing = [key for key, value in made_from.items() if dataset is not None and found.get(key) != value]
            if differing:
                raise UserError(
                    f"{self.folder / part}: holds shards made from something else "
                    f"({', '.join(differing)} {'differs' if len(differing) == 1 else 'differ'}); "
                    "choose another --out, or delete that one"
                )
        if parts["train"] is None and parts["holdout"] is not None:
            shutil.rmtree(self.folder / "holdout")
        return parts["train"] is not None

    def publish(self) -> None:
        """Rename the finished parts into place, `train` last."""
        for part in ("holdout", "train"):
            if (self.work / part).exists():
                sync_folder(self.work / part)
                (self.work / part).rename(self.folder / part)
                sync_folder(self.folder)
