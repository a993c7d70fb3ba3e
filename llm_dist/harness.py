"""Downstream tasks of lm-evaluation-harness on task files of this machine; nothing is fetched.

`TextModel` computes what the harness asks for and knows nothing of it; `run_tasks` brings the two together.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llm_dist.errors import UserError
from llm_dist.generate import Sampling, continuation
from llm_dist.trained import Precision, Trained

_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
_MOST_GENERATED_TOKENS = 256


class TextModel:
    """How likely texts are to a causal language model, and how it goes on with one. A separator stands before each."""

    def __init__(self, trained: Trained, precision: Precision | None = None) -> None:
        """Raises `UserError` when the run is no causal language model."""
        if not trained.run.heads.language or not trained.run.model.is_causal:
            raise UserError(
                f'{trained.folder}: objective.name="{trained.run.objective.name}" does not go on with a text; '
                "tasks need a causal language model"
            )
        self._tokenizer, self._most = trained.tokenizer, trained.run.text_tokens
        self._model = trained.model(precision)

    def log_likelihood(self, context: str, text: str) -> tuple[float, bool]:
        """Of `text` behind `context`, whose beginning is left out where both are too long; and whether greedy."""
        before, together = self._ids(context), self._ids(context + text)
        # Where a token spans the border, it belongs to the text.
        num_before = next((n for n, (a, b) in enumerate(zip(before, together, strict=False)) if a != b), len(before))
        if num_before >= len(together):
            return 0.0, True
        return self._scored([self._tokenizer.separator_id, *together], num_before + 1)

    def log_likelihood_of(self, text: str) -> float:
        """Of a whole text of any length; each token is scored once, with as much context as fits."""
        ids = [self._tokenizer.separator_id, *self._ids(text)]
        total = 0.0
        for first in range(1, len(ids), self._most):
            end = min(first + self._most, len(ids))
            total += self._scored(ids[max(0, end - self._most - 1) : end], first - max(0, end - self._most - 1))[0]
        return total

    def go_on(self, context: str, until: Sequence[str], max_tokens: int, temperature: float) -> str:
        """What is written behind `context`, up to the first of the texts `until`."""
        max_tokens = min(max_tokens, self._most - 1)
        before = [self._tokenizer.separator_id, *self._ids(context)][-(self._most - max_tokens) :]
        written: list[int] = []
        for id_ in continuation(self._model, before, max_tokens, Sampling(temperature)):
            if id_ in self._tokenizer.end_ids:
                break
            written.append(id_)
            if any(stop in self._tokenizer.decode(written) for stop in until):
                break
        text = self._tokenizer.decode(written)
        return text[: min((place for stop in until if (place := text.find(stop)) >= 0), default=len(text))]

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)

    @torch.inference_mode()
    def _scored(self, ids: list[int], first: int) -> tuple[float, bool]:
        """Log-likelihood of `ids` from the one at `first` on, and whether each is the likeliest."""
        assert 0 < first < len(ids), "something must stand before what is scored"
        first -= max(0, len(ids) - self._most - 1)
        ids = ids[-self._most - 1 :]
        first = max(1, first)
        inputs = torch.tensor([ids[:-1]], device=self._model.embedding.weight.device)
        logits = self._model.language.logits(self._model(inputs)[:, first - 1 :])[0]
        targets = torch.tensor(ids[first:], device=logits.device)
        chosen = logits.log_softmax(-1).gather(1, targets[:, None]).double().sum()
        return float(chosen), bool((logits.argmax(-1) == targets).all())


@dataclass(frozen=True)
class TaskScores:
    """What the harness found."""

    step: int
    tasks: dict[str, dict[str, Any]]
    """By task, then by metric and filter."""


def run_tasks(trained: Trained, place: str, *, limit: int | None = None) -> TaskScores:
    """Evaluate the tasks that `place`, FOLDER:NAME or FOLDER:NAME,NAME, names; their data lie beside the task files.

    Raises:
        UserError: lm-eval is missing, there is no such task, or it cannot be evaluated.
    """
    folder, names = _named(place)
    for variable in _OFFLINE:
        os.environ[variable] = "1"  # read when the harness is imported
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError("--tasks need lm-evaluation-harness; pip install 'llm_dist[harness]'") from None
    with chdir(folder):
        manager = TaskManager(include_path=".", include_defaults=False)
        if unknown := [name for name in names if name not in manager.all_tasks]:
            known = ", ".join(manager.all_tasks) or "none"
            raise UserError(f"--tasks {place}: no task {unknown[0]} there; it has {known}")
        try:
            found = lm_eval.simple_evaluate(
                _adapter(TextModel(trained)),
                tasks=names,
                task_manager=manager,
                limit=limit,
                log_samples=False,
                bootstrap_iters=0,
            )
        except (FileNotFoundError, ConnectionError) as error:
            raise UserError(f"--tasks {place}: {' '.join(str(error).split())}; keep the data beside the task") from None
    return TaskScores(trained.step, found["results"])


def _named(place: str) -> tuple[Path, list[str]]:
    folder, colon, names = place.rpartition(":")
    if not colon or not names or not Path(folder).is_dir():
        raise UserError(f"--tasks {place}: must read FOLDER:NAME, a folder of task files and a task in one of them")
    return Path(folder), names.split(",")


def _adapter(model: TextModel) -> Any:
    """The model as the harness wants it."""
    from lm_eval.api.model import LM

    class Adapter(LM):  # type: ignore[misc]
        """Answers requests one by one."""

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            return [model.log_likelihood(*request.args) for request in requests]

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            return [model.log_likelihood_of(request.args[0]) for request in requests]

        def generate_until(self, requests: list[Any]) -> list[str]:
            return list(self._written(requests))

        def _written(self, requests: list[Any]) -> Iterator[str]:
            for request in requests:
                context, options = request.args
                until = options.get("until") or []
                temperature = float(options.get("temperature") or 0.0) if options.get("do_sample") else 0.0
                most = int(options.get("max_gen_toks") or _MOST_GENERATED_TOKENS)
                yield model.go_on(context, [until] if isinstance(until, str) else until, most, temperature)

    return Adapter()
