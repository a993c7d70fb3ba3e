"""Slurm, asked and told: the only module that runs its commands.

Plain formats with a delimiter are parsed, never JSON, whose shape differs between versions. A controller that does not
answer is not one that knows nothing: `ControllerSilent` is raised, and no caller takes it for an empty answer.
"""

from __future__ import annotations

import getpass
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llm_dist.errors import UserError

_SECONDS = 60.0
"""Slurm's own clients give up after about ten."""
_OF_A_JOB = ("SLURM_", "SBATCH_", "SRUN_", "PMI_", "PMI2_", "PMIX_")
"""Beginnings of variables in which an outer job describes itself; a job submitted from inside must not inherit them."""
_KEPT = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SBATCH_TIMELIMIT_DEFAULT")
_SILENCE = (
    *("timed out", "Unable to contact slurm controller", "Connection refused", "Connection reset", "Zero Bytes"),
    *("Communication connection failure", "No route to host", "Host is down", "backup controller"),
)
_NO_CLUSTER = "Could not establish a configuration source"
_UNKNOWN_JOB = ("Invalid job id", "Invalid job array")
_SEPARATOR = "|"


class SlurmRefused(UserError):
    """Slurm answered, and the answer is no."""


class ControllerSilent(UserError):
    """No answer; what was asked may have been done or not."""


@dataclass(frozen=True)
class Job:
    """What Slurm says of a job."""

    number: str
    name: str
    state: str
    """One word: PENDING, RUNNING, COMPLETING, COMPLETED, NODE_FAIL, ..."""
    reason: str = ""
    """Why it waits, or how it ended."""
    nodes: str = ""
    """Compact list, `node[1-3]`."""
    partition: str = ""
    time_left: str = ""
    """As Slurm prints it, `1-02:03:04`; empty where it is not known."""
    starts_at: str = ""
    """When it is expected to start; empty where it is not known."""
    comment: str = ""

    @property
    def is_alive(self) -> bool:
        """Whether it holds or will hold nodes; an unknown state counts as alive, so that nothing is started twice."""
        return self.state not in _OVER

    @property
    def is_waiting(self) -> bool:
        """Whether it holds no nodes yet."""
        return self.state in ("PENDING", "CONFIGURING", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD")


_OVER = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL"),
    *("OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT"),
}


@dataclass(frozen=True)
class Partition:
    """A queue and what its nodes have."""

    name: str
    is_default: bool
    is_up: bool
    nodes: int
    max_minutes: float | None
    """Longest time limit of a job; None: no limit."""
    cpus_per_node: int
    """Of the smallest node."""
    gpus_per_node: int
    """Of the largest node."""


def clean_environment(outer: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment without what an outer job says of itself."""
    outer = os.environ if outer is None else outer
    return {name: value for name, value in outer.items() if name in _KEPT or not name.startswith(_OF_A_JOB)}


def ask(*words: str, text: str | None = None, seconds: float = _SECONDS) -> str:
    """Run one of Slurm's commands; its standard output.

    Raises:
        ControllerSilent: no answer.
        SlurmRefused: the answer is no.
        UserError: there is no Slurm here.
    """
    return _run(words, text, seconds).stdout


def _run(words: Sequence[str], text: str | None, seconds: float) -> subprocess.CompletedProcess[str]:
    command = words[0]
    try:
        said = subprocess.run(
            words, input=text, capture_output=True, text=True, timeout=seconds, env=clean_environment(), check=False
        )
    except FileNotFoundError:
        raise UserError(f"{command} is not on this machine's PATH; submit from a login node of the cluster") from None
    except subprocess.TimeoutExpired:
        raise ControllerSilent(f"{command}: Slurm has not answered for {seconds:.0f} s; try again later") from None
    if said.returncode == 0:
        return said
    if _NO_CLUSTER in said.stderr:
        raise UserError(f"{command} finds no cluster from here (no slurm.conf); go to a login node of one")
    complaint = _complaint(said.stderr or said.stdout)
    if any(sign.lower() in said.stderr.lower() for sign in _SILENCE):
        raise ControllerSilent(f"{command}: Slurm's controller does not answer ({complaint}); try again later")
    raise SlurmRefused(f"{command}: {complaint or f'exit code {said.returncode}'}")


def _complaint(text: str) -> str:
    """Slurm's words in one line, without the programs' names in front."""
    lines = (line.rpartition("error: ")[2].rpartition("fatal: ")[2].strip() for line in text.splitlines())
    return "; ".join(dict.fromkeys(line for line in lines if line))


_FORMAT = _SEPARATOR.join(("%i", "%T", "%P", "%L", "%S", "%r", "%N", "%j", "%k"))


def job(number: str) -> Job | None:
    """What Slurm knows of a job, from its queue, else from its accounts; None where both have forgotten it."""
    try:
        lines = ask("squeue", "--noheader", "--states=all", f"--jobs={number}", f"--format={_FORMAT}")
    except SlurmRefused as error:
        if not any(words in str(error) for words in _UNKNOWN_JOB):
            raise
        lines = ""
    found = [_job(line) for line in lines.splitlines() if line]
    return found[0] if found else _accounted(number)


def own_jobs() -> list[Job]:
    """The user's jobs that are in the queue or ended a short while ago."""
    lines = ask("squeue", "--noheader", "--states=all", "--me", f"--format={_FORMAT}")
    return [_job(line) for line in lines.splitlines() if line]


def _job(line: str) -> Job:
    number, state, partition, left, start, reason, nodes, rest = line.split(_SEPARATOR, 7)
    name, _, comment = rest.rpartition(_SEPARATOR)
    return Job(
        number=number,
        name=name,
        state=state,
        reason="" if reason == "None" else reason.strip("()").replace(" ", "_"),  # squeue and scontrol differ in this
        nodes=nodes,
        partition=partition,
        time_left=left if left[:1].isdigit() else "",
        starts_at=start if start[:1].isdigit() else "",
        comment="" if comment == "(null)" else comment,
    )


def _accounted(number: str) -> Job | None:
    """From sacct, where the site keeps accounts."""
    try:
        lines = ask("sacct", "-nXP", f"--jobs={number}", "--format=JobID,State,Partition,NodeList,JobName")
    except UserError:  # no accounts are kept, or they do not answer: nothing more is known
        return None
    for line in reversed(lines.splitlines()):  # the newest incarnation comes last
        found, state, partition, nodes, name = line.split(_SEPARATOR, 4)
        return Job(found, name, state.split()[0], partition=partition, nodes=nodes)
    return None


def submit(script: str, *options: str) -> str:
    """Queue a batch script; the job's number."""
    return ask("sbatch", "--parsable", *options, text=script).strip().split(";")[0]


def would_start(script: str) -> str:
    """Slurm's own verdict on a script that is not submitted: when and where it could start.

    Raises:
        SlurmRefused: it never could.
    """
    try:
        said = _run(["sbatch", "--test-only"], script, _SECONDS)
    except SlurmRefused as error:
        raise SlurmRefused(str(error).replace("allocation failure: ", "")) from None
    return _complaint(said.stderr.replace("sbatch: ", ""))


def requeue(number: str) -> None:
    """End a job and queue it again under its number."""
    ask("scontrol", "requeue", number)


def exclude(number: str, nodes: Sequence[str]) -> None:
    """Keep a job that waits off some nodes."""
    ask("scontrol", "update", f"JobId={number}", f"ExcNodeList={','.join(nodes)}")


def release(number: str) -> None:
    """Let a held job go, at once."""
    ask("scontrol", "release", number)
    ask("scontrol", "update", f"JobId={number}", "StartTime=now+2")  # in the second of its end it would be refused


def cancel(*words: str) -> None:
    """`scancel` with these words."""
    ask("scancel", *words)


def time_left_seconds(number: str) -> float | None:
    """Until Slurm ends the job; None where it has no limit."""
    return seconds_of(ask("squeue", "--noheader", f"--jobs={number}", "--format=%L").strip())


def seconds_of(duration: str) -> float | None:
    """`1-02:03:04`, `02:03:04`, `03:04` in seconds; None for UNLIMITED and the like."""
    days, _, clock = duration.rpartition("-")
    parts = clock.split(":")
    if not all(part.isdigit() for part in (*parts, days or "0")):
        return None
    seconds = 0.0
    for part in parts:
        seconds = seconds * 60 + int(part)
    return seconds + 86_400 * int(days or 0)


def partitions() -> list[Partition]:
    """The cluster's queues."""
    lines = ask("sinfo", "--noheader", f"--format={_SEPARATOR.join(('%P', '%a', '%D', '%l', '%c', '%G'))}").splitlines()
    found: dict[str, Partition] = {}
    for line in lines:  # one for each kind of node
        name, up, nodes, limit, cpus, gres = line.split(_SEPARATOR)
        before = found.get(name.rstrip("*"))
        limit_seconds = seconds_of(limit)
        found[name.rstrip("*")] = Partition(
            name=name.rstrip("*"),
            is_default=name.endswith("*"),
            is_up=up == "up",
            nodes=int(nodes) + (before.nodes if before else 0),
            max_minutes=None if limit_seconds is None else limit_seconds / 60,
            cpus_per_node=min(int(cpus.rstrip("+")), before.cpus_per_node if before else 1 << 30),
            gpus_per_node=max(_gpus(gres), before.gpus_per_node if before else 0),
        )
    return list(found.values())


def _gpus(gres: str) -> int:
    """Of `gpu:h100:8(S:0-1),nic:2`: 8."""
    counts = (each.partition("(")[0].split(":") for each in gres.split(","))
    return sum(int(words[-1]) for words in counts if words[0] == "gpu" and words[-1].isdigit())


def accounts() -> list[str] | None:
    """Accounts the user may charge; None where the site keeps none or does not answer."""
    try:
        lines = ask("sacctmgr", "-nP", "show", "assoc", f"user={getpass.getuser()}", "format=account", seconds=15)
    except UserError:
        return None
    return sorted({line.strip() for line in lines.splitlines() if line.strip()}) or None


def address_of(node: str) -> str | None:
    """Where Slurm itself reaches a node."""
    words = dict(word.split("=", 1) for word in ask("scontrol", "show", "node", node, "-o").split() if "=" in word)
    return words.get("NodeAddr")


def hostnames(compact: str) -> list[str]:
    """`node[1-3]` as single names."""
    return ask("scontrol", "show", "hostnames", compact).split()
