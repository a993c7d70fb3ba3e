"""Whether this machine can hold the ranks, found out without torch."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

from llm_dist.errors import UserError
from llm_dist.model.size import GPU, Machine
from llm_dist.plan import Plan

BF16_ON_X86, BF16_ON_ARM = {"avx512f", "avx512bw", "avx512vl", "avx512dq"}, {"bf16"}
"""Flags of a CPU on which torch's kernels multiply bf16 (`model.layers.HOST_MULTIPLIES_BF16`)."""
RUNTIME_BYTES = 300 * 2**20
"""What a rank on a CPU holds before it has a model: the interpreter and torch."""


def num_cuda_devices() -> int:
    """Devices a rank may use: those this machine has, or as many of them as CUDA_VISIBLE_DEVICES names."""
    present = sum(path.name.removeprefix("nvidia").isdigit() for path in Path("/dev").glob("nvidia*"))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return present
    named = [name for name in visible.split(",") if name.strip() not in ("", "-1")]
    return min(present, len(named))


def available_bytes() -> int:
    """Memory this process and its children may still take, of the machine or of the container."""
    available = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (group / "memory.max").read_text(), (group / "memory.current").read_text()
        available = min(available, int(limit) - int(used))
    except (OSError, ValueError):  # no such group, or "max": no limit of its own
        return available
    return max(0, available)


def require_capacity(plan: Plan) -> None:
    """Refuse more ranks than this machine holds.

    Raises:
        UserError: too many for its GPUs, or for its memory where there is none.
    """
    ranks, devices = plan.rows.ranks, num_cuda_devices()
    if devices and ranks > devices:
        raise UserError(
            f"--ranks {ranks} is more than the {devices} GPUs here; start at most {devices}, "
            "or set CUDA_VISIBLE_DEVICES= (empty) to train on the CPU"
        )
    if devices:
        return
    wanted, available = ranks * (plan.memory.peak + RUNTIME_BYTES), available_bytes()
    if wanted > available:
        raise UserError(
            f"--ranks {ranks} would need {wanted / 2**30:.1f} GiB and {available / 2**30:.1f} GiB are free here; "
            "start fewer ranks or lower batch.sequences_per_micro_batch"
        )


def machine_here(cpu_information: Path = Path("/proc/cpuinfo")) -> Machine:
    """What ranks started here compute on, as far as it decides what they keep."""
    if num_cuda_devices():
        return GPU
    try:
        words = set(cpu_information.read_text().split())
    except OSError:  # not Linux
        words = set()
    return Machine(is_cpu=True, multiplies_bf16=words >= BF16_ON_X86 or words >= BF16_ON_ARM)
