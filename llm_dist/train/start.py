"""A start of a run, from its name to its exit code: join the ranks, open the folder, build, restore, train."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from threading import Thread
from typing import TypeVar

import torch

from llm_dist import config, runtime
from llm_dist.checkpoint import layout
from llm_dist.checkpoint.lease import Superseded
from llm_dist.checkpoint.store import Store
from llm_dist.data import opening
from llm_dist.errors import Exit, UserError
from llm_dist.metrics import Metrics
from llm_dist.model import size
from llm_dist.probe import matmul_flops_per_second
from llm_dist.runtime import Runtime
from llm_dist.train import build, flight, loop
from llm_dist.train.build import Parts
from llm_dist.train.folder import RunFolder
from llm_dist.train.guard import ReplicasDiffer, SkippedSteps
from llm_dist.train.ledger import Ledger, process_started
from llm_dist.train.progress import Progress, say
from llm_dist.train.restore import restore
from llm_dist.train.session import Session
from llm_dist.train.stop import Standing, StopFlag, StoppedEarly, stop_flag, what_stands
from llm_dist.train.watch import Watch
from llm_dist.train.watchdog import Watchdog, collective_timeout

T = TypeVar("T")


def start(source: str, overrides: Sequence[str] = (), accepted: Sequence[str] = ()) -> Exit:
    """Train or resume the run that `source` (run file or run folder) names, as one rank of those that were launched.

    Raises:
        UserError: on every rank alike, whichever rank met the mistake.
    """
    run = config.load(source, overrides)
    folder = RunFolder(run.run.folder)
    with stop_flag() as stop:
        stop.look = lambda: Standing("starting", what_stands(folder.checkpoints), is_all_saved=True)
        flight.record()
        try:
            here = runtime.start(run.engine.deterministic, collective_timeout(run.watch.hang_seconds))
            code = _train(run, folder, here, stop, accepted)
        except StoppedEarly:
            stands = what_stands(folder.checkpoints)
            say(f"stopped before the first step of this attempt: {stands}; start again to go on", here.is_first)
            code = Exit.STOPPED
        except Superseded as error:
            say(str(error), here.is_first)
            code = Exit.SUPERSEDED
        except ReplicasDiffer as error:
            say(f"{error}; start again to go on from the checkpoint before", here.is_first)
            code = Exit.DEFECT
        except RuntimeError as error:
            if (words := runtime.lost_contact(error)) is None:
                raise
            say(f"lost contact with another rank, whose log says why: {words}")
            code = Exit.LOST_CONTACT
        finally:
            runtime.stop()
        stop.retire(code)
    return code


def _train(run: config.Config, folder: RunFolder, here: Runtime, stop: StopFlag, accepted: Sequence[str]) -> Exit:
    # Rank 0 alone first: it may make shards of raw text or plan bins, which the others then find.
    first = _alone(here, stop, lambda: build.open_data(run))
    data = _on_all(here, first if here.is_first else lambda: build.open_data(run))
    run = opening.settled(run, data.reading)
    prints, tokenizer = data.fingerprints, data.any_shards.tokenizer_folder
    run = config.parse(_on_first(here, lambda: folder.open(run, prints, accepted).model_dump(by_alias=True)))
    record = {"ranks": here.ranks, "engine": run.engine.model_dump(), "accepted": list(accepted)}
    attempt = _on_first(here, lambda: folder.begin_attempt(record, prints, tokenizer))
    watch = Watch()
    stop.look = lambda: _standing(folder, here, watch)
    ledger = Ledger(folder.goodput, attempt, watch, process_started()) if here.is_first else None
    with Watchdog(watch, folder, here, attempt, run.watch.hang_seconds, ledger):
        return _attempt(run, folder, here, attempt, data, stop, watch, ledger)


def _attempt(
    run: config.Config,
    folder: RunFolder,
    here: Runtime,
    attempt: int,
    data: build.DataFolders,
    stop: StopFlag,
    watch: Watch,
    ledger: Ledger | None,
) -> Exit:
    with watch.phase("build"):
        parts = build.build(run, here, data, lambda line: say(line, here.is_first))
    _leave_if_asked(here, stop)
    store = Store(folder.checkpoints, here.rank, here.ranks, attempt)
    _take_over(store, here)
    store.sweep()
    with watch.phase("restore"):
        account = restore(parts, store, here, lambda line: say(line, here.is_first))
        if run.checkpoint.asynchronous:
            store.reserve(parts.engine.state())
    watch.step = account.step
    _leave_if_asked(here, stop)
    session = Session(
        parts=parts,
        account=account,
        store=store,
        metrics=Metrics(run, folder.path, attempt, say) if here.is_first else None,
        progress=_progress(parts, here),
        watch=watch,
        ledger=ledger,
        stop=stop,
        skipped=SkippedSteps(folder.skipped),
        saved_step=account.step or None,
    )
    session.progress.say(_first_words(session, attempt))
    watch.begin()
    try:
        return loop.train(session)
    finally:
        session.close()


def _take_over(store: Store, here: Runtime) -> None:
    """Let no older attempt write any more; collective.

    Raises:
        Superseded: a newer attempt has been faster.
    """

    def take() -> int | None:
        try:
            store.take_over()
        except Superseded as error:
            return error.by
        except OSError as error:
            raise UserError(
                f"{store.folder}: cannot be written: {error.strerror or error}; mend it, then start again"
            ) from None
        return None

    if (by := _on_first(here, take)) is not None:
        raise Superseded(store.attempt, by)


def _leave_if_asked(here: Runtime, stop: StopFlag) -> None:
    """Raise `StoppedEarly` where any rank was asked to stop; collective."""
    if here.any(stop.is_raised):
        raise StoppedEarly


def _standing(folder: RunFolder, here: Runtime, watch: Watch) -> Standing:
    found = layout.latest(folder.checkpoints)
    is_all_saved = watch.step <= (found.step if found else 0)
    doing = f"rank {here.rank}: step {watch.step}, {watch.doing}"
    return Standing(doing, what_stands(folder.checkpoints), is_all_saved)


def _alone(here: Runtime, stop: StopFlag, action: Callable[[], T]) -> Callable[[], T]:
    """Run `action` on rank 0 while the others wait, for however long; gives its result, or raises its mistake.

    Collective. Waiting is a vote a second: a single collective as long as the work would time out.

    Raises:
        StoppedEarly: a rank was asked to stop. The work is left behind; what it has made, the next start finds.
    """
    done: Future[T] | None = Future() if here.is_first else None
    if done is not None:
        Thread(target=_fulfil, args=(done, action), daemon=True).start()
    while True:
        is_busy = done is not None and not done.done()
        num_busy, num_stopping = here.sum(torch.tensor([is_busy, stop.is_raised], dtype=torch.int32)).tolist()
        if num_stopping:
            raise StoppedEarly
        if not num_busy:
            return action if done is None else done.result
        if done is not None:
            wait([done], timeout=1.0)


def _fulfil(done: Future[T], action: Callable[[], T]) -> None:
    try:
        done.set_result(action())
    except BaseException as error:  # noqa: BLE001  raised where the result is asked for
        done.set_exception(error)


def _on_first(here: Runtime, action: Callable[[], T]) -> T:
    """Rank 0's result on every rank, or its mistake; collective."""
    return here.share(_on_all(here, lambda: action() if here.is_first else None))  # type: ignore[no-any-return]


def _on_all(here: Runtime, action: Callable[[], T]) -> T:
    """Run `action` on every rank; a mistake on any rank is raised on all of them, so that none waits. Collective."""
    value: T | None = None
    mistake: UserError | None = None
    try:
        value = action()
    except UserError as error:
        mistake = error
    words = here.first_error(mistake)
    if words is not None:
        raise UserError(words)
    return value  # type: ignore[return-value]


def _progress(parts: Parts, here: Runtime) -> Progress:
    run, vocabulary = parts.run, parts.data.any_shards.vocabulary_tokens
    rows = run.batch.sequences_per_micro_batch * run.data.sequence_tokens
    own = matmul_flops_per_second(here.device, build.COMPUTE_DTYPE[run.engine.precision], rows, run.model.d_model)
    of_all_ranks = float(here.sum(torch.tensor(own, dtype=torch.float64)))
    sequence_tokens = run.data.sequence_tokens
    flops = size.flops_per_token(
        run.model, vocabulary, sequence_tokens, run.heads, scored_share=run.scored_tokens / sequence_tokens
    )
    return Progress(run, flops.full, of_all_ranks, here.is_first)


def _first_words(session: Session, attempt: int) -> str:
    run, step = session.run, session.account.step
    begun = f"resumed at step {step}" if step else "begins"
    words = (
        f"{run.run.folder} attempt {attempt}: {begun} of {run.run.steps} steps, "
        f"{session.parts.runtime.ranks} ranks, engine {run.engine.name}, {run.engine.precision}"
    )
    if run.run.steps > run.schedule_steps:
        words += f"; the schedule ended at step {run.schedule_steps}, the rate stays at its last value"
    return words
