"""What the driver says about the GPUs of this node."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import dataclass

FIELDS = (
    "index",
    "name",
    "driver_version",
    "memory.total",
    "ecc.errors.uncorrected.volatile.total",
    "retired_pages.pending",
)
_COMMAND = ("nvidia-smi", f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits")
_SECONDS = 20
"""The driver of a lost GPU may never answer."""
_NO_SUCH_COUNTER = {"[N/A]", "N/A", "[Not Supported]"}


@dataclass(frozen=True)
class Gpu:
    """One GPU."""

    index: int
    name: str
    driver: str
    memory_bytes: int | None
    ecc_errors: int | None
    """Uncorrected, since the driver was loaded; None where the GPU counts none."""
    must_be_reset: bool
    """Pages of its memory wait for a reset to be taken out of use."""
    unreadable: tuple[str, ...] = ()
    """Fields that the driver could not read, with what it said; a GPU in such a state is ill."""


class NoAnswerError(Exception):
    """The driver is there, but does not say what GPUs it has; the message is what it said."""


def read_gpus() -> tuple[Gpu, ...] | None:
    """The GPUs of this node; None where there is no nvidia-smi.

    Raises:
        NoAnswerError: nvidia-smi failed, hung, or printed what cannot be understood.
    """
    try:
        answer = subprocess.run(_COMMAND, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except FileNotFoundError:
        return None
    except subprocess.TimeoutExpired:
        raise NoAnswerError(f"nvidia-smi gave no answer in {_SECONDS} s") from None
    if answer.returncode:
        said = (answer.stdout + answer.stderr).strip().splitlines() or ["nothing"]
        raise NoAnswerError(f"nvidia-smi ended with {answer.returncode}: {said[0]}")
    return parse(answer.stdout)


def parse(text: str) -> tuple[Gpu, ...]:
    """One GPU per line of `nvidia-smi --query-gpu=FIELDS --format=csv,noheader,nounits`.

    Raises:
        NoAnswerError: a line is none of these.
    """
    return tuple(_gpu(line) for line in text.splitlines() if line.strip())


def _gpu(line: str) -> Gpu:
    values = dict(zip(FIELDS, (value.strip() for value in line.split(",")), strict=False))
    if len(line.split(",")) != len(FIELDS) or not values["index"].isdigit():
        raise NoAnswerError(f"nvidia-smi printed {line.strip()!r}, which describes no GPU")
    unreadable: list[str] = []

    def counted(field: str, read: Callable[[str], int]) -> int | None:
        value = values[field]
        if value in _NO_SUCH_COUNTER:
            return None
        try:
            return read(value)
        except (ValueError, KeyError):
            unreadable.append(f"{field} {value}")
            return None

    memory_mib = counted("memory.total", int)
    ecc_errors = counted("ecc.errors.uncorrected.volatile.total", int)
    pending = counted("retired_pages.pending", {"No": 0, "Yes": 1}.__getitem__)
    return Gpu(
        index=int(values["index"]),
        name=values["name"],
        driver=values["driver_version"],
        memory_bytes=None if memory_mib is None else memory_mib * 2**20,
        ecc_errors=ecc_errors,
        must_be_reset=bool(pending),
        unreadable=tuple(unreadable),
    )
