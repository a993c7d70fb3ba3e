"""One attempt at a run: what the loop asks for between steps, each thing once, on all ranks together."""

from __future__ import annotations

import resource
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm_dist import config
from llm_dist.checkpoint.layout import Facts
from llm_dist.checkpoint.store import Store
from llm_dist.data.opening import held_out
from llm_dist.data.trace import trace
from llm_dist.errors import Exit, UserError
from llm_dist.evaluate import Evaluation, EvaluationStopped, evaluate
from llm_dist.fingerprint import code_fingerprint
from llm_dist.metrics import Metrics
from llm_dist.rows import Rows
from llm_dist.train.account import Account
from llm_dist.train.build import Parts
from llm_dist.train.guard import Numbers, ReplicasDiffer, SkippedSteps, differing_replica, judge
from llm_dist.train.ledger import Ledger
from llm_dist.train.progress import Progress
from llm_dist.train.restore import restore
from llm_dist.train.stop import StopFlag
from llm_dist.train.watch import Watch

_DOCUMENTS_NAMED = 5


@dataclass
class Session:
    """The parts of a run, its account, and where it reports and saves."""

    parts: Parts
    account: Account
    store: Store
    metrics: Metrics | None
    """Rank 0 only."""
    progress: Progress
    watch: Watch
    ledger: Ledger | None
    """Rank 0 only."""
    stop: StopFlag
    skipped: SkippedSteps
    saved_step: int | None = None
    """Step of the checkpoint this attempt saved (or is writing) or started from."""
    acknowledged_step: int | None = None
    """Step last said to be saved."""
    numbers: Numbers | None = None
    """What the step judged last came to; None before the first, and where a step was left out."""
    valid_tokens: int = 0
    """Scored tokens of the step agreed on last, over all ranks."""
    source_tokens: list[int] = field(default_factory=list)
    """Tokens of text that the step agreed on last reads of each source, over all ranks."""

    @property
    def run(self) -> config.Config:
        """The run file."""
        return self.parts.run

    @property
    def is_out_of_patience(self) -> bool:
        """Whether validation has not improved for `eval.patience` evaluations."""
        patience = self.run.eval.patience
        return patience is not None and self.account.evaluations_without_improvement >= patience

    def begin(self) -> None:
        """Have a checkpoint to go back to, where the run file may ask for it; collective."""
        if self.run.guard.policy == "rewind_and_skip" and self.account.step == 0:
            self.save()

    def agree(self, own_valid_tokens: int, rows: Rows) -> tuple[int, bool]:
        """The step's valid tokens over all ranks, and whether any rank was asked to stop; collective."""
        own = torch.tensor([own_valid_tokens, int(self.stop.is_raised), *self._tokens_by_source(rows)])
        self.valid_tokens, num_stopping, *self.source_tokens = self.parts.runtime.sum(own).tolist()
        return self.valid_tokens, num_stopping > 0

    def _tokens_by_source(self, rows: Rows) -> list[int]:
        num_sources = len(self.parts.data.reading.sources)
        sources = rows.sources if rows.sources is not None else np.zeros(rows.num_rows, np.int64)
        tokens: list[int] = np.bincount(sources, rows.scored_tokens(), num_sources).astype(np.int64).tolist()
        return tokens

    def accepts(self, nats: Tensor, grad_norm: Tensor) -> bool:
        """Whether the step agreed on last may be applied, given this rank's nats and the norm; collective."""
        loss = float(self.parts.runtime.sum(nats.cpu())) / max(1, self.valid_tokens)
        self.numbers = judge(loss, float(grad_norm), self.account.losses, self.run.guard)
        return self.numbers.fault is None

    def settle(self) -> bool:
        """Finish the step whose numbers are known; False where the run went back to a checkpoint instead. Collective.

        Raises:
            UserError: they cannot be right, and the run file says to stop, or too many steps are left out.
        """
        assert self.numbers is not None
        if self.numbers.fault is None:
            if self.run.guard.spike_z is not None:
                window = self.run.guard.spike_window_steps
                self.account.losses = [*self.account.losses, self.numbers.loss_nats][-window:]
            self.finish_step()
            return True
        self._leave_out(self.account.step + 1, self.numbers.fault)
        if self.run.guard.policy == "skip":
            self.finish_step(is_left_out=True)
            return True
        self._rewind()
        return False

    def _leave_out(self, step: int, fault: str) -> None:
        """Record that step `step`, which is not finished yet, is to have no update."""
        guard, here = self.run.guard, self.parts.runtime
        documents = here.share(self._documents(step) if here.is_first else None)
        if guard.policy == "stop":
            raise UserError(
                f"step {step}: {fault}; nothing was saved after step {self.saved_step or 0}; it read {documents}; "
                "lower optim.lr or raise optim.warmup_steps, or set guard.policy (with --accept), then start again"
            )
        if here.is_first:
            self.store.fence.check()
        record = {"attempt": self.store.attempt, "documents": documents} if here.is_first else None
        self.skipped.add(step, fault, record=record)
        here.barrier()  # nobody goes on before it is durable
        if self.skipped.within(range(step + 1 - guard.spike_window_steps, step + 1)) > guard.max_skips:
            raise UserError(
                f"step {step}: {fault}; more than guard.max_skips={guard.max_skips} of the last "
                f"{guard.spike_window_steps} steps are left out; lower optim.lr (with --accept), then start again"
            )
        self.progress.say(f"step {step} is left out: {fault}; it read {documents}")

    def _documents(self, step: int) -> str:
        """The first documents that a step read, in words."""
        found = trace(self.parts.data.reading, step, max_characters=0).documents
        names = dict.fromkeys(f"{each.file or each.shard} document {each.number or '?'}" for each in found)
        first = ", ".join(list(names)[:_DOCUMENTS_NAMED])
        rest = f" and {len(names) - _DOCUMENTS_NAMED} more" if len(names) > _DOCUMENTS_NAMED else ""
        return f"{first}{rest} (llm-dist data trace {self.run.run.folder} --step {step})"

    def _rewind(self) -> None:
        """Go back to the latest checkpoint, from where the step is met again and left out; collective."""
        with self.watch.phase("restore"):
            self.store.wait()
            before = self.account.step
            self.account.become(restore(self.parts, self.store, self.parts.runtime, self.progress.say))
            self.watch.step = self.account.step
        self.saved_step = self.account.step
        self.numbers = None
        self.progress.say(f"back at step {self.account.step}: {before - self.account.step} steps are computed again")

    def finish_step(self, *, is_left_out: bool = False) -> None:
        """Count a finished step."""
        if is_left_out:
            self.numbers = None
        self.account.step += 1
        self.account.tokens += sum(self.source_tokens)
        for source, tokens in zip(self.parts.data.reading.sources, self.source_tokens, strict=True):
            read = self.account.source_tokens
            read[source.name] = read.get(source.name, 0) + tokens
        self.watch.step = self.account.step
        self.progress.count(sum(self.source_tokens))
        self.acknowledge()

    def report(self, lr: float) -> None:
        """Write the numbers of the step just finished."""
        with self.watch.phase("report"):
            self._report(lr, self.watch.take())

    def _report(self, lr: float, seconds: dict[str, float]) -> None:
        numbers = self.progress.numbers(seconds)
        record: dict[str, Any] = {"left_out": 1}
        if self.numbers is not None:
            record = {"loss_nats": self.numbers.loss_nats, "grad_norm": self.numbers.grad_norm}
        record |= {"lr": lr, "tokens": self.account.tokens, **self._sources()}
        if "save" in seconds:
            record["save_stall_seconds"] = seconds["save"]
        if self.ledger is not None:
            record["goodput"] = self.ledger.fractions()
        if self.metrics is not None:
            self.metrics.write(self.account.step, {**record, **numbers, "memory_bytes": _peak_memory_bytes()})
        self.progress.show(self.account.step, self.numbers.loss_nats if self.numbers else None)

    def check_replicas(self) -> None:
        """Prove that ranks hold alike what they should; collective.

        Raises:
            ReplicasDiffer: they do not; the checkpoint before is what is left to trust.
        """
        if (what := differing_replica(self.parts.engine.state(), self.parts.runtime)) is not None:
            raise ReplicasDiffer(
                f"step {self.account.step}: {what}: a flipped bit, or a defect; nothing of it was saved"
            )

    def _sources(self) -> dict[str, Any]:
        """Tokens and epochs read of each source, where there are several."""
        if len(self.parts.data.reading.sources) == 1:
            return {}
        epochs = self.parts.data.reading.epochs(self.account.step)
        return {
            "sources": {
                name: {"tokens": tokens, "epochs": round(epochs[name], 6)}
                for name, tokens in self.account.source_tokens.items()
            }
        }

    def evaluate(self) -> bool | None:
        """Score every held-out folder; whether the first is at its best, None where a stop cut it short. Collective."""
        with self.watch.phase("eval"):
            try:
                results = {name: self._evaluate_one(name) for name in self.parts.data.holdouts}
            except EvaluationStopped:
                return None
        if not results:
            return False
        if self.metrics is not None:
            self.metrics.write(self.account.step, {"eval": {name: asdict(result) for name, result in results.items()}})
        for name, result in results.items():
            self.progress.say(f"step {self.account.step}: {name} {result.words()}")
        is_best = self.account.saw_evaluation(next(iter(results.values())).by(self.run.eval.best))
        if self.saved_step == self.account.step and self.parts.runtime.is_first:  # saved when a stop had cut this short
            self.store.amend(self.account.step, self.account.to_dict())
            self._retain()
        return is_best

    def _evaluate_one(self, name: str) -> Evaluation:
        run, parts = self.run, self.parts
        return evaluate(
            self.watch.marked(parts.engine.eval_step),
            parts.objective,
            held_out(run, parts.data.holdouts[name], run.eval.max_sequences),
            parts.runtime,
            sequences_per_batch=run.batch.sequences_per_micro_batch,
            must_stop=lambda: parts.runtime.any(self.stop.is_raised),
        )

    def save(self, is_last: bool = False) -> None:
        """Save the state at the current step, unless that is done; the last save is synchronous. Collective.

        Raises:
            ReplicasDiffer: ranks hold different values of what they should hold alike.
            SaveFailed: it, or the one before it, could not be written.
        """
        with self.watch.phase("save"):
            if self.saved_step != self.account.step:
                self.check_replicas()
                is_asynchronous = self.run.checkpoint.asynchronous and not is_last
                self.store.save(self.account.step, self.parts.engine.state(), self._facts(), is_asynchronous)
                self.saved_step = self.account.step
            if is_last:
                self.store.wait()
            self.acknowledge()
            self._retain()

    def acknowledge(self) -> None:
        """Say which step is saved as soon as its checkpoint is durable: from then on no kill can undo it."""
        durable = self.store.poll() if self.parts.runtime.is_first else None
        if durable is not None and durable != self.acknowledged_step:
            self.acknowledged_step = durable
            self.progress.say(f"saved step {durable}")

    def _facts(self) -> Facts:
        engine = self.run.engine
        return Facts(
            fingerprints={**self.parts.data.fingerprints, **config.fingerprints(self.run), "code": code_fingerprint()},
            trajectory=self.account.to_dict(),
            optimizer_step=self.parts.engine.optimizer_steps,
            engine=f"{engine.name}{engine.zero_stage if engine.name == 'zero' else ''} {engine.precision}",
        )

    def _retain(self) -> None:
        """Delete what need not stay; what is still being written is not counted yet."""
        if self.parts.runtime.is_first:
            keep = self.run.checkpoint
            best_step = self.account.best_step if keep.keep_best else None
            self.store.retain(keep.keep_last, keep.keep_every_steps, best_step)

    def leave(self) -> Exit:
        """Save and stop, because a rank was asked to; collective."""
        self.save(is_last=True)
        self.progress.say(f"stopped at step {self.account.step}: saved; start again to go on")
        return Exit.STOPPED

    def finish(self) -> None:
        """Save the end of the run, where the loop has not done so; collective."""
        self.save(is_last=True)
        why = "finished" if not self.is_out_of_patience else "finished early: validation stopped improving"
        self.progress.say(f"{why} at step {self.account.step} of {self.run.run.steps}")

    def close(self) -> None:
        """Let go of files and of what the engine's vendor holds."""
        with self.watch.phase("close"):
            if self.metrics is not None:
                self.metrics.close()
            self.parts.close()


def _peak_memory_bytes() -> int:
    """Most memory this rank has held: of the GPU where there is one, else resident in this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
