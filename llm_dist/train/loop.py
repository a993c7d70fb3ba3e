"""The training loop, on one page: data, step, report, evaluate, save, stop.

Every decision here is a function of (run file, step), so that a resumed run takes the same ones.
"""

from __future__ import annotations

from llm_dist import optim
from llm_dist.batch import Batch
from llm_dist.errors import Exit
from llm_dist.plan import num_micro_batches, rows_per_micro_batch
from llm_dist.rows import Rows
from llm_dist.train.session import Session


def train(session: Session) -> Exit:
    """Run from the session's step to `run.steps`; collective: all ranks call this.

    Returns `Exit.DONE`, or `Exit.STOPPED` when any rank was asked to stop: then a checkpoint stands at that step.
    """
    run, account, watch = session.run, session.account, session.watch
    loader = session.parts.loader(account.step)
    try:
        session.begin()
        if _evaluate_if_due(session) is None:  # a stop cut it short at the step this attempt starts from
            return session.leave()
        while account.step < run.run.steps and not session.is_out_of_patience:
            with watch.phase("data"):
                rows = loader.rows(account.step)
                micro_batches = _micro_batches(session, rows)
            with watch.phase("agree"):
                valid_tokens, must_stop = session.agree(sum(batch.num_valid() for batch in micro_batches), rows)
            if must_stop:
                return session.leave()
            lr = optim.learning_rate(run, account.step)
            if account.step + 1 in session.skipped:
                session.finish_step(is_left_out=True)
            else:
                with watch.stepping():
                    batches = watch.marking(batch.to(session.parts.runtime.device) for batch in micro_batches)
                    session.parts.engine.train_step(batches, valid_tokens, lr, account.step, session.accepts)
                if not session.settle():
                    continue  # back at an earlier step
            if _is_due(account.step, run.log.every_steps) or account.step == run.run.steps:
                session.report(lr)
            if _is_due(account.step, run.guard.replicas_every_steps):
                with watch.phase("replicas"):
                    session.check_replicas()
            if (is_best := _evaluate_if_due(session)) is None:
                return session.leave()
            if _is_due(account.step, run.save_every_steps) or (is_best and run.checkpoint.keep_best):
                session.save()
        session.finish()
        return Exit.DONE
    finally:
        loader.close()


def _evaluate_if_due(session: Session) -> bool | None:
    """Whether validation is at its best; False, too, where none is due, and None where a stop cut it short."""
    run, account = session.run, session.account
    is_due = _is_due(account.step, run.eval.every_steps) or account.step == run.run.steps
    return session.evaluate() if is_due and account.step not in (0, account.evaluated_step) else False


def _micro_batches(session: Session, rows: Rows) -> list[Batch]:
    """This rank's rows of a step, cut into equally many micro-batches of equal shape on every rank."""
    run, parts = session.run, session.parts
    dealing = (run.sequences_per_step, parts.runtime.ranks, run.batch.sequences_per_micro_batch)
    count, size = num_micro_batches(*dealing), rows_per_micro_batch(*dealing)
    return [
        parts.objective.make_batch(rows.part(first, size, rows.first_row + first), size)
        for first in range(0, count * size, size)
    ]


def _is_due(step: int, every_steps: int | None) -> bool:
    return every_steps is not None and step % every_steps == 0
