"""Shows the log of a rank, and what it gains, over all attempts: a requeued job goes on in the same file."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from launcher.ranks import log_path
from launcher.watching import Follower
from llm_dist import config
from llm_dist.errors import UserError

_POLL_SECONDS = 0.5
_TAIL_BYTES = 1 << 20


def path_of(run: Path, rank: int | None) -> Path:
    """The log of a rank, or of the newest job's supervisor where `rank` is None.

    Raises:
        UserError: there is none yet.
    """
    config.load(run)
    if rank is not None:
        path = log_path(run / "logs", rank)
        if not path.is_file():
            known = len(list((run / "logs").glob("rank_*.log")))
            words = f"ranks 0 to {known - 1} have one" if known else "no rank has begun"
            raise UserError(f"{path} does not exist: {words}")
        return path
    jobs = sorted((run / "slurm").glob("job_*.log"), key=lambda path: path.stat().st_mtime)
    if not jobs:
        raise UserError(f"{run}: no Slurm job of it has begun")
    return jobs[-1]


def show(path: Path, count: int, is_followed: bool) -> None:
    """Copy the newest lines to standard output and, where it is followed, what it gains, until the user has enough."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _TAIL_BYTES))
        text = file.read(size).decode("utf-8", errors="replace")
    sys.stdout.write("".join(text.splitlines(keepends=True)[-count:] if count else []))
    sys.stdout.flush()
    if is_followed:
        _follow(Follower(path, size, sys.stdout))


def _follow(follower: Follower) -> None:
    try:
        while True:
            follower.show()
            time.sleep(_POLL_SECONDS)
    except KeyboardInterrupt:
        follower.close()
