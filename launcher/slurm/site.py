"""What differs between clusters, in one file of its own: `slurm/site.toml`. Run files name no machine.

Looked for where `--site` or LLM_DIST_SITE says, else `slurm/site.toml` here, else `~/.config/llm_dist/site.toml`; where
none is there, the defaults hold.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llm_dist.errors import UserError

VARIABLE = "LLM_DIST_SITE"


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Container(_Section):
    """In what the ranks run. Slurm's own commands are always called outside of it."""

    kind: Literal["none", "pyxis", "apptainer"] = "none"
    """pyxis: srun's own options; apptainer: in front of the command."""
    image: str = ""
    """Squash file, SIF file or registry name, as the kind takes it."""
    mounts: tuple[str, ...] = ()
    """`SOURCE:TARGET`; the run folder, the code and the working folder are mounted anyway."""
    python: str = "python3"
    """Interpreter inside."""


class Site(_Section):
    """A cluster, as far as jobs depend on it."""

    partition: str = ""
    """Where jobs go without --partition; empty: the cluster's default."""
    account: str = ""
    """Who pays without --account."""
    qos: str = ""
    """Quality of service without --qos."""
    constraint: str = ""
    """Features of nodes without --constraint."""
    ranks_per_node: int = Field(1, ge=1)
    """Ranks of a node where jobs ask for no GPUs."""
    cpus_per_rank: int | None = Field(None, ge=1)
    """Cores asked for per rank; absent: what the nodes of the partition have, divided."""
    exclusive: bool = True
    """Whether jobs take whole nodes."""
    options: tuple[str, ...] = ()
    """More options of sbatch, for example `--mem=0`."""
    setup: tuple[str, ...] = ()
    """Lines of shell before the ranks start, for example `module load cuda/12.6`."""
    python: str = ""
    """Interpreter on the nodes; empty: the one that submits, which then has to lie on a shared file system."""
    environment: dict[str, str] = {}
    """Variables of the ranks, for example `NCCL_SOCKET_IFNAME = "hsn"`; no secrets, they stand in the script."""
    interface: str = ""
    """Network interface on which ranks meet, for example `ib0`; empty: the one that the node's name leads to."""
    signal_seconds: int = Field(180, ge=60)
    """How long before the time limit a job is told to save; Slurm may be a minute early or late."""
    requeue: bool = True
    """Whether jobs may be requeued; where not, use --chain."""
    max_failures: int = Field(3, ge=1)
    """Failures in a row without a newer checkpoint after which a job stops for good."""
    check: bool = True
    """Whether the nodes are measured before the ranks start."""
    exclude_hours: float = Field(24.0, ge=0)
    """How long a node that failed its check is kept out of later jobs of this run."""
    container: Container = Container()


def load(path: Path | None = None) -> Site:
    """The site's profile.

    Raises:
        UserError: the file asked for is missing, or says what no profile can say.
    """
    chosen = path or _first()
    if chosen is None:
        return Site()
    try:
        return Site.model_validate(tomllib.loads(chosen.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"--site {chosen}: no such file") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{chosen}: {error}") from None
    except ValidationError as error:
        raise UserError("\n".join(f"{chosen}: {_mistake(each)}" for each in error.errors())) from None


def _first() -> Path | None:
    if named := os.environ.get(VARIABLE):
        return Path(named)
    usual = (Path("slurm/site.toml"), Path.home() / ".config" / "llm_dist" / "site.toml")
    return next((each for each in usual if each.is_file()), None)


def _mistake(error: object) -> str:
    assert isinstance(error, dict)
    key = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        return f"unknown key {key}; known are {', '.join(Site.model_fields)}"
    return f"{key}={error['input']!r}: {error['msg']}"
