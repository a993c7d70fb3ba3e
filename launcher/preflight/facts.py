"""What one node is and can do, measured on it in a few seconds, without a network.

Torch is asked in a process of its own (`llm_dist.probe`), so that this one stays small and a broken driver ends only
that. Whatever cannot be measured is a problem in words: nothing is passed over.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from launcher.capacity import available_bytes
from launcher.preflight.gpus import Gpu, NoAnswerError, read_gpus
from launcher.preflight.shared import Meeting, Sight, meet
from llm_dist.fingerprint import code_fingerprint

PROBE = (sys.executable, "-m", "llm_dist.probe", "devices")
PROBE_SECONDS = 120
"""Importing torch from a file system that a thousand nodes read at once takes its time."""


@dataclass(frozen=True)
class Device:
    """What ranks compute on: one GPU, or the CPU where there is none."""

    name: str
    is_gpu: bool
    flops_per_second: float
    """Of the matmul that training does most, in its usual dtype."""


@dataclass(frozen=True)
class NodeFacts:
    """One node."""

    node: str
    """As the scheduler calls it."""
    host: str
    versions: dict[str, str]
    code: str
    """Fingerprint of llm_dist's sources."""
    clock_seconds: float | None
    """Its clock at the moment when the last node had appeared; None where that moment never came."""
    unseen: tuple[str, ...]
    """Nodes whose file did not appear to it."""
    disk_bytes: int | None
    """Free where the run folder lies."""
    temporary_bytes: int
    """Free where temporary files go."""
    memory_bytes: int
    """That processes may still take."""
    gpus: tuple[Gpu, ...] | None
    """As the driver sees them; None where there is no nvidia-smi."""
    devices: tuple[Device, ...]
    """As torch sees them."""
    problems: tuple[str, ...]
    """What failed here."""

    def to_json(self) -> str:
        """For other nodes."""
        return _TABLE.dump_json(self, indent=2).decode() + "\n"

    def as_table(self) -> dict[str, Any]:
        """For scripts."""
        table: dict[str, Any] = _TABLE.dump_python(self, mode="json")
        return table


_TABLE = TypeAdapter(NodeFacts)


def from_json(text: str | bytes) -> NodeFacts:
    """What `to_json` wrote.

    Raises:
        pydantic.ValidationError: it did not write this.
    """
    return _TABLE.validate_json(text)


def measure(meeting: Meeting) -> NodeFacts:
    """Meet the other nodes, then measure this one.

    Raises:
        UserError: this incarnation was checked before.
    """
    problems: list[str] = []
    sight = _meet(meeting, problems)
    gpus = _gpus(problems)
    probed = _probe(problems)
    devices = tuple(Device(**each) for each in probed.get("devices", ()))
    if gpus and "CUDA_VISIBLE_DEVICES" not in os.environ and devices and not any(each.is_gpu for each in devices):
        problems.append(f"torch sees none of {len(gpus)} GPUs: is it built for the CPU only, or for a newer driver?")
    versions = {"python": platform.python_version(), "llm_dist": _installed_version(), **probed.get("versions", {})}
    if gpus:
        versions["driver"] = gpus[0].driver
    return NodeFacts(
        node=meeting.node,
        host=socket.gethostname(),
        versions=versions,
        code=code_fingerprint(),
        clock_seconds=sight.clock_seconds,
        unseen=sight.unseen,
        disk_bytes=_free_bytes(meeting.folder),
        temporary_bytes=shutil.disk_usage(tempfile.gettempdir()).free,
        memory_bytes=available_bytes(),
        gpus=gpus,
        devices=devices,
        problems=tuple(problems),
    )


def _meet(meeting: Meeting, problems: list[str]) -> Sight:
    try:
        return meet(meeting)
    except OSError as error:
        problems.append(f"the run folder cannot be written: {error.strerror}")
        return Sight((), None)


def _gpus(problems: list[str]) -> tuple[Gpu, ...] | None:
    try:
        return read_gpus()
    except NoAnswerError as error:
        problems.append(str(error))
        return None


def _probe(problems: list[str]) -> dict[str, Any]:
    try:
        ended = subprocess.run(PROBE, capture_output=True, text=True, timeout=PROBE_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        problems.append(f"torch measured no matmul in {PROBE_SECONDS} s")
        return {}
    if ended.returncode:
        said = ended.stderr.strip().splitlines() or [f"code {ended.returncode}"]
        problems.append(f"torch measured no matmul: {said[-1]}")
        return {}
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


def _installed_version() -> str:
    try:
        return metadata.version("llm_dist")
    except metadata.PackageNotFoundError:
        return "not installed"


def _free_bytes(folder: Path) -> int | None:
    standing = next((each for each in (folder, *folder.parents) if each.exists()), None)
    return None if standing is None else shutil.disk_usage(standing).free
