"""From what the user typed to a job in the queue: everything that can be refused is refused before it waits there.

A submission is written down before sbatch is called, with a token that the job carries in its comment. So a sbatch that
times out, after which nobody knows whether there is a job, never leads to two: the job is looked for first.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from launcher import planning
from launcher.attempts import heartbeat, is_running, read_table
from launcher.preflight.exclusions import excluded
from launcher.slurm import controller, freeze, script
from launcher.slurm.check import check_shape
from launcher.slurm.controller import ControllerSilent, Job
from launcher.slurm.reasons import in_words
from launcher.slurm.script import Shape, Work
from launcher.slurm.site import Site
from llm_dist import config
from llm_dist.checkpoint.layout import latest
from llm_dist.config_resume import check_owner, check_resume
from llm_dist.errors import UserError
from llm_dist.plan import require_little_waste
from llm_dist.publishing import publish

_LOOK_SECONDS = 2.0
_LOOKS = 3
"""Times that a job is looked for before it is taken for lost: a request may lie in the controller's queue."""


@dataclass(frozen=True)
class Wanted:
    """What the user typed."""

    source: str
    overrides: Sequence[str] = ()
    accepted: Sequence[str] = ()
    nodes: int = 1
    gpus_per_node: int = 0
    ranks_per_node: int | None = None
    """One per GPU, else what the site says, when None."""
    minutes: float = 60.0
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    image: str = ""
    """Container image instead of the site's."""
    spares: int = 0
    chain: int = 1
    """Jobs that follow one another; more than 1 where jobs may not be requeued."""
    has_live_code: bool = False
    """Run the packages where they lie instead of a copy."""
    options: Sequence[str] = ()


@dataclass(frozen=True)
class Submission:
    """One submission of a run, as it is written down."""

    number: int
    token: str
    time: float
    shape: dict[str, Any]
    chain: int
    accepted: list[str]
    code: str
    image: str = ""
    """Container image that was typed over the site's."""
    jobs: list[str] = field(default_factory=list)
    """Numbers of its jobs; empty until Slurm has said one."""


def prepare(wanted: Wanted, site: Site) -> tuple[config.Config, Shape, Site]:
    """Refuse what can be refused; the run, what is asked of the cluster, and the site with what was typed over it.

    Raises:
        UserError: run file, data, waste, cluster or limits do not allow it, or the run is being trained.
    """
    site = _typed_over(site, wanted)
    run = _resolved(wanted)
    shape = check_shape(_shape(wanted, site), site)
    shape = replace(shape, exclude=[each.node for each in excluded(run.run.folder, time.time(), site.exclude_hours)])
    plan = planning.plan_of(run, planning.data_size(run, must_exist=True), shape.ranks)
    require_little_waste(plan.rows, run.plan.max_waste)
    _adopt_lost(run.run.folder)
    _require_idle(run.run.folder)
    return run, shape, site


def render(run: config.Config, shape: Shape, site: Site, wanted: Wanted, code: Path, token: str) -> str:
    """The script of a submission."""
    work = Work(_folder(run), code, Path.cwd(), site.python or sys.executable, wanted.accepted)
    return script.render(shape, work, site, token, is_chained=wanted.chain > 1)


def submit(run: config.Config, shape: Shape, site: Site, wanted: Wanted) -> Submission:
    """Write the run folder, and queue its job or chain of jobs.

    Raises:
        UserError: Slurm refuses, or does not answer.
    """
    folder = _folder(run)
    _write_run(run, folder)
    code = freeze.PACKAGES if wanted.has_live_code else freeze.freeze(folder)
    number = len(all_submissions(folder)) + 1
    token = secrets.token_hex(8)
    text = render(run, shape, site, wanted, code, token)
    accepted = list(wanted.accepted)
    facts = Submission(number, token, time.time(), asdict(shape), wanted.chain, accepted, str(code), wanted.image)
    publish(_path(folder, number, "json"), json.dumps(asdict(facts), indent=1))
    publish(_path(folder, number, "sbatch"), text)
    jobs: list[str] = []
    for _ in range(wanted.chain):
        jobs.append(_queue(text, facts, jobs))
    return _complete(folder, replace(facts, jobs=jobs))


def all_submissions(run: Path) -> list[Submission]:
    """Oldest first."""
    tables = (read_table(path) for path in sorted((run / "slurm" / "submissions").glob("*.json")))
    return [Submission(**table) for table in tables if table is not None]


def live_jobs(run: Path, queue: Sequence[Job] | None = None) -> list[Job]:
    """Jobs of the run's submissions that hold or will hold nodes; the one that runs first.

    `queue` is what `controller.own_jobs` has said; asked for when None.

    Raises:
        ControllerSilent: Slurm does not answer.
    """
    known = {number for each in all_submissions(run) for number in each.jobs}
    tokens = {f"{script.COMMENT}{each.token}" for each in all_submissions(run)}
    if not tokens:
        return []
    asked = controller.own_jobs() if queue is None else queue
    found = [job for job in asked if job.number in known or job.comment in tokens]
    return sorted((job for job in found if job.is_alive), key=lambda job: (job.is_waiting, int(job.number)))


def _typed_over(site: Site, wanted: Wanted) -> Site:
    if not wanted.image:
        return site
    if site.container.kind == "none":
        raise UserError("--container needs a site profile whose [container] says kind = 'pyxis' or 'apptainer'")
    return site.model_copy(update={"container": site.container.model_copy(update={"image": wanted.image})})


def _resolved(wanted: Wanted) -> config.Config:
    """The run file, joined with the run it goes on with."""
    run = config.load(wanted.source, wanted.overrides)
    folder = run.run.folder
    if not (folder / "config.json").is_file():
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"{folder} exists and is not a run folder; choose another run.name or run.dir")
        return run.frozen()
    check_owner(folder / "config.json", wanted.accepted)
    before = config.load(folder)
    if run.optim.total_steps is None:
        update = {"total_steps": before.optim.total_steps}
        run = run.model_copy(update={"optim": run.optim.model_copy(update=update)})
    found = latest(folder / "checkpoints")
    check_resume(before, run, wanted.accepted, found.step if found else 0)
    return run.frozen()


def _shape(wanted: Wanted, site: Site) -> Shape:
    ranks = wanted.ranks_per_node or wanted.gpus_per_node or site.ranks_per_node
    return Shape(
        nodes=wanted.nodes,
        ranks_per_node=ranks,
        gpus_per_node=wanted.gpus_per_node,
        cpus_per_node=(site.cpus_per_rank or 0) * ranks,
        minutes=wanted.minutes,
        partition=wanted.partition or site.partition,
        account=wanted.account or site.account,
        qos=wanted.qos or site.qos,
        constraint=wanted.constraint or site.constraint,
        spares=wanted.spares,
        options=tuple(wanted.options),
    )


def _require_idle(folder: Path) -> None:
    """One job trains a run."""
    for job in live_jobs(folder):
        raise UserError(
            f"{folder} has job {job.number} already, which {in_words(job)}; llm-launch stop {folder} ends it"
        )
    if is_running(folder):
        host = (heartbeat(folder) or {}).get("host")
        raise UserError(f"{folder} is being trained on {host}; stop that first")


def _write_run(run: config.Config, folder: Path) -> None:
    try:
        (folder / "slurm" / "submissions").mkdir(parents=True, exist_ok=True)
        publish(folder / "config.json", run.to_json())
    except OSError as error:
        raise UserError(f"{folder}: cannot write the run folder: {error.strerror}; choose another run.dir") from None


def _folder(run: config.Config) -> Path:
    return Path(os.path.abspath(run.run.folder))  # noqa: PTH100  a link to a faster disk is to stay one


def _adopt_lost(folder: Path) -> None:
    """Learn the jobs of the last submission, if nobody knows whether Slurm has heard of it."""
    for last in all_submissions(folder)[-1:]:
        if not last.jobs and (found := _look_for(last)):
            _complete(folder, replace(last, jobs=found))


def _queue(text: str, facts: Submission, known: Sequence[str]) -> str:
    """Queue one job; where sbatch gets no answer, look whether it is there before it is sent again."""
    while True:
        try:
            return controller.submit(text)
        except ControllerSilent as error:
            print(f"llm-launch: {error}; looking whether the job is queued", file=sys.stderr)
            if found := [number for number in _look_for(facts) if number not in known]:
                return found[0]
            print("llm-launch: it is not; submitting again", file=sys.stderr)


def _look_for(facts: Submission) -> list[str]:
    """Numbers of the jobs that carry the submission's token.

    Raises:
        ControllerSilent: Slurm does not answer; what to do then.
    """
    comment = f"{script.COMMENT}{facts.token}"
    for look in range(_LOOKS):
        time.sleep(_LOOK_SECONDS if look else 0.0)
        try:
            found = [job.number for job in controller.own_jobs() if job.comment == comment]
        except ControllerSilent as error:
            raise ControllerSilent(
                f"{error}. Whether the job is queued is not known; the same command again looks for it, and submits "
                "only if it is not there"
            ) from None
        if found:
            return sorted(found, key=int)
    return []


def _complete(folder: Path, facts: Submission) -> Submission:
    publish(_path(folder, facts.number, "json"), json.dumps(asdict(facts), indent=1))
    return facts


def _path(folder: Path, number: int, kind: str) -> Path:
    return folder / "slurm" / "submissions" / f"{number:04d}.{kind}"
