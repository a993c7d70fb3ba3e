"""The trainer, or `llm-launch local` with it, slowed down in one phase, so that a signal meets the run there.

SLOW says phase, seconds and, where not all ranks are slow, which: `build:3` or `rendezvous:3:1`. A rank that has come
to the phase leaves a file under SLOW_MARKS. SLOW_SAY is how long a stop is borne before something is said.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

PHASE, SECONDS, *ONLY = os.environ["SLOW"].split(":")
RANK = os.environ.get("RANK", "0")


def slow(*_args: object, **_kwargs: object) -> None:
    (Path(os.environ["SLOW_MARKS"]) / f"{PHASE}_{RANK}").touch()
    if not ONLY or RANK in ONLY:
        time.sleep(float(SECONDS))


def before(owner: object, name: str, is_class: bool = False) -> None:
    """Be slow whenever `owner.name` is called."""
    sound = getattr(owner, name)

    def slowed(*args: object, **kwargs: object) -> object:
        slow()
        return sound(*args, **kwargs)

    setattr(owner, name, slowed)


def plant() -> None:
    from llm_dist import runtime
    from llm_dist.checkpoint import store
    from llm_dist.engine.engine import Engine
    from llm_dist.train import build, loop, start
    from llm_dist.train.session import Session

    places = {
        "rendezvous": (runtime, "start"),
        "data": (build, "open_data"),
        "build": (build, "build"),
        "restore": (start, "restore"),
        "step": (Engine, "train_step"),
        "eval": (Engine, "eval_step"),
        "save": (store, "write_data"),
        "train": (loop, "_micro_batches"),
        "shutdown": (Session, "close"),
    }
    if PHASE in places:
        before(*places[PHASE])


def train() -> None:
    if PHASE == "interpreter":
        slow()
    from llm_dist.train import stop

    stop.SAY_AFTER_SECONDS = float(os.environ.get("SLOW_SAY", stop.SAY_AFTER_SECONDS))
    stop.listen()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        stop.leave_with_parent()
    if PHASE == "imports":
        slow()
    from llm_dist.cli import main

    plant()
    main()


def launch() -> None:
    """`llm-launch`, whose ranks run this file instead of `-m llm_dist`."""
    from dataclasses import replace

    from launcher import cli, submission

    prepare = submission.prepare

    def prepared(wanted: submission.Wanted) -> submission.Job:
        job = prepare(wanted)
        return replace(job, command=[sys.executable, __file__, *job.command[3:]])

    submission.prepare = prepared
    cli.main()


if __name__ == "__main__":
    launch() if sys.argv[1] == "local" else train()
