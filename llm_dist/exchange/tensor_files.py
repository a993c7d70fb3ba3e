"""The tensors of a Hugging Face folder, read one at a time from safetensors; knows no model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llm_dist.errors import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


class TensorFiles:
    """Names of all tensors, and each tensor when it is asked for."""

    def __init__(self, folder: Path) -> None:
        """Look for the files.

        Raises:
            UserError: there are none, one of them is missing or damaged, or they are pickles.
        """
        self.folder = folder
        self._opened: dict[Path, Any] = {}
        if (folder / SINGLE).is_file():
            self._files = dict.fromkeys(self._names(folder / SINGLE), folder / SINGLE)
        elif (folder / INDEX).is_file():
            self._files = dict(self._sharded())
        elif any((folder / name).is_file() for name in _PICKLES):
            raise UserError(
                f"{folder} has its weights as pytorch_model.bin only, a pickle, which is not opened; load it in "
                "transformers and save it with save_pretrained(folder, safe_serialization=True)"
            )
        else:
            raise UserError(f"{folder} has no weights: neither {SINGLE} nor {INDEX}; fetch the folder again")

    @property
    def names(self) -> frozenset[str]:
        """Of every tensor."""
        return frozenset(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, read from its file's header."""
        with self._complaints(self._files[name]):
            return tuple(self._open(self._files[name]).get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        """A tensor in fp32, on the CPU."""
        with self._complaints(self._files[name]):
            tensor: Tensor = self._open(self._files[name]).get_tensor(name)
        if not tensor.is_floating_point() or tensor.dtype.itemsize < torch.float16.itemsize:
            raise UserError(f"{self.folder}: {name} is {tensor.dtype}; only fp32, bf16 and fp16 weights can be read")
        return tensor.float()

    def _sharded(self) -> Iterator[tuple[str, Path]]:
        try:
            place = json.loads((self.folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
            raise UserError(f"{self.folder}: {INDEX} is damaged; fetch it again") from None
        needed = sorted(set(place.values()))
        missing = [name for name in needed if not (self.folder / Path(name).name).is_file()]
        if missing:
            raise UserError(
                f"{self.folder} lacks {len(missing)} of {len(needed)} weight files that {INDEX} names, first "
                f"{missing[0]}; fetch the folder again"
            )
        held = {name: self._names(self.folder / Path(name).name) for name in needed}
        for tensor, name in place.items():
            if tensor not in held[name]:
                raise UserError(f"{self.folder}: {name} does not hold {tensor}, as {INDEX} says; fetch it again")
            yield tensor, self.folder / Path(name).name

    def _names(self, path: Path) -> frozenset[str]:
        with self._complaints(path):
            return frozenset(self._open(path).keys())

    def _open(self, path: Path) -> Any:
        if path not in self._opened:
            self._opened[path] = safe_open(path, framework="pt")
        return self._opened[path]

    @contextmanager
    def _complaints(self, path: Path) -> Iterator[None]:
        try:
            yield
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is damaged ({error}); fetch it again") from None
