"""One attempt at a run: what the loop asks for between steps, each thing once, on all ranks together."""

from __future__ import annotations

import math
import resource
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from llm_dist import config
from llm_dist.checkpoint import commit
from llm_dist.checkpoint.layout import Facts
from llm_dist.checkpoint.store import Store
from llm_dist.engine.engine import StepResult
from llm_dist.errors import Exit, UserError
from llm_dist.evaluate import Evaluation, evaluate
from llm_dist.metrics import Metrics
from llm_dist.rows import Rows
from llm_dist.runtime import code_fingerprint
from llm_dist.train.account import Account
from llm_dist.train.build import Parts
from llm_dist.train.progress import Progress
from llm_dist.train.stop import StopFlag
from llm_dist.train.watch import Watch


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
    stop: StopFlag
    saved_step: int | None = None
    """Step of the checkpoint this attempt saved (or is writing) or started from."""
    acknowledged_step: int | None = None
    """Step last said to be saved."""
    result: StepResult | None = None
    """What the last step of this attempt reported."""
    valid_tokens: int = 0
    """Scored tokens of that step, over all ranks."""
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

    def agree(self, own_valid_tokens: int, rows: Rows) -> tuple[int, bool]:
        """The step's valid tokens over all ranks, and whether any rank was asked to stop; collective."""
        own = torch.tensor([own_valid_tokens, int(self.stop.is_raised), *self._tokens_by_source(rows)])
        valid_tokens, num_stopping, *self.source_tokens = self.parts.runtime.sum(own).tolist()
        return valid_tokens, num_stopping > 0

    def _tokens_by_source(self, rows: Rows) -> list[int]:
        num_sources = len(self.parts.data.reading.sources)
        sources = rows.sources if rows.sources is not None else np.zeros(rows.num_rows, np.int64)
        tokens: list[int] = np.bincount(sources, rows.scored_tokens(), num_sources).astype(np.int64).tolist()
        return tokens

    def finish_step(self, result: StepResult, valid_tokens: int) -> None:
        """Count a finished step."""
        self.result, self.valid_tokens = result, valid_tokens
        self.account.step += 1
        self.account.tokens += valid_tokens
        for source, tokens in zip(self.parts.data.reading.sources, self.source_tokens, strict=True):
            read = self.account.source_tokens
            read[source.name] = read.get(source.name, 0) + tokens
        self.watch.step = self.account.step
        self.progress.count(valid_tokens)
        self.acknowledge()

    def report(self, lr: float) -> None:
        """Write the numbers of the step just finished; collective.

        Raises:
            UserError: they are not finite.
        """
        loss, grad_norm = self._finite_numbers()
        numbers = self.progress.numbers(self.watch.take())
        if self.metrics is not None:
            record = {"loss_nats": loss, "lr": lr, "grad_norm": grad_norm, "tokens": self.account.tokens}
            record |= self._sources()
            self.metrics.write(self.account.step, {**record, **numbers, "memory_bytes": _peak_memory_bytes()})
        self.progress.show(self.account.step, loss)

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

    def _finite_numbers(self) -> tuple[float, float]:
        """Loss and gradient norm of the step just finished; collective."""
        assert self.result is not None
        loss = float(self.parts.runtime.sum(self.result.nats.cpu())) / max(1, self.valid_tokens)
        grad_norm = float(self.result.grad_norm)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise UserError(
                f"step {self.account.step}: the loss is {loss:.4g}, the gradient norm {grad_norm:.4g}; nothing was "
                f"saved after step {self.saved_step or 0}; lower optim.lr or raise optim.warmup_steps (with --accept), "
                "then start again"
            )
        return loss, grad_norm

    def evaluate(self) -> bool:
        """Score every held-out folder; whether the first one is at its best. Collective."""
        with self.watch.phase("eval"):
            results = {name: self._evaluate_one(name) for name in self.parts.data.holdouts}
        if not results:
            return False
        if self.metrics is not None:
            self.metrics.write(self.account.step, {"eval": {name: asdict(result) for name, result in results.items()}})
        for name, result in results.items():
            self.progress.say(
                f"step {self.account.step}: {name} loss {result.loss_nats:.4f} nats, perplexity "
                f"{result.perplexity:.2f}, {result.bits_per_byte:.4f} bits per byte"
            )
        return self.account.saw_evaluation(next(iter(results.values())).loss_nats)

    def _evaluate_one(self, name: str) -> Evaluation:
        run, parts = self.run, self.parts
        return evaluate(
            parts.engine.eval_step,
            parts.objective,
            parts.data.holdouts[name],
            parts.runtime,
            sequence_tokens=run.data.sequence_tokens,
            document_mask=run.data.document_mask,
            sequences_per_batch=run.batch.sequences_per_micro_batch,
            max_sequences=run.eval.max_sequences,
        )

    def save(self, is_last: bool = False) -> None:
        """Save the state at the current step, unless that is done; the last save is synchronous. Collective.

        Raises:
            UserError: the step's numbers are not finite, and a checkpoint of it would be worth nothing.
            SaveFailed: it, or the one before it, could not be written.
        """
        with self.watch.phase("save"):
            if self.saved_step != self.account.step:
                if self.result is not None:  # else it is asked to stop before its first step
                    self._finite_numbers()
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
            commit.retain(self.store.folder, keep.keep_last, keep.keep_every_steps, best_step)

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
        if self.metrics is not None:
            self.metrics.close()
        self.parts.close()
        self.watch.close()


def _peak_memory_bytes() -> int:
    """Most memory this rank has held: of the GPU where there is one, else resident in this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
