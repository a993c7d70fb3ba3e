"""Probabilities of the labels of examples: batched, in one process, padded as training does it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from llm_dist.batch import NOT_SCORED
from llm_dist.data.examples import Example, Task
from llm_dist.objectives import select as objectives
from llm_dist.objectives.labelled import Labelled
from llm_dist.predictions.inputs import Input, task_of
from llm_dist.rows import NOT_LABELLED, Rows
from llm_dist.trained import Precision, Trained


@dataclass(frozen=True)
class Prediction:
    """What a model says of one example."""

    example: Example
    true: npt.NDArray[np.int64]
    """[n] ids of the true labels; 0 where they are not known. n is 1, or the words that fit into a sequence."""
    log_probabilities: npt.NDArray[np.float32]
    """[n, labels]."""

    @property
    def predicted(self) -> npt.NDArray[np.int64]:
        """[n] ids of the likeliest labels."""
        likeliest: npt.NDArray[np.int64] = self.log_probabilities.argmax(axis=1)
        return likeliest

    @property
    def probabilities(self) -> npt.NDArray[np.float64]:
        """[n, labels]."""
        return np.exp(self.log_probabilities.astype(np.float64))

    @property
    def nats(self) -> float:
        """Negative log-likelihood of the true labels, summed."""
        return -float(self.log_probabilities[np.arange(len(self.true)), self.true].sum(dtype=np.float64))

    @property
    def is_right(self) -> bool:
        """Whether every label is."""
        return bool((self.predicted == self.true).all())


class Predictor:
    """A trained model that says how likely each label is."""

    def __init__(self, trained: Trained, precision: Precision | None = None, sequences_per_batch: int = 32) -> None:
        """Raises `UserError` when the model knows no labels."""
        self._task, self._num_tokens = task_of(trained.run), trained.run.text_tokens
        self._sequences_per_batch = sequences_per_batch
        objective = objectives.build(trained.run, trained.tokenizer.folder)
        assert isinstance(objective, Labelled)
        self._objective, self._model = objective, trained.model(precision)
        self._device = self._model.embedding.weight.device

    def predictions(self, inputs: Iterable[Sequence[Input]]) -> Iterator[Prediction]:
        """In the order of the examples; those that come together are computed by length, for little padding."""
        for together in inputs:
            found: dict[int, Prediction] = {}
            by_length = sorted(range(len(together)), key=lambda number: len(together[number].ids))
            for first in range(0, len(by_length), self._sequences_per_batch):
                numbers = by_length[first : first + self._sequences_per_batch]
                chosen = [together[number] for number in numbers]
                found.update(zip(numbers, self._computed(chosen), strict=True))
            yield from (found[number] for number in range(len(together)))

    @torch.inference_mode()
    def _computed(self, inputs: Sequence[Input]) -> Iterator[Prediction]:
        assert self._model.class_head is not None
        batch = self._objective.make_batch(_rows(inputs, self._task, self._num_tokens), len(inputs)).to(self._device)
        logits = self._model.class_head.logits(self._objective.hidden(self._model, batch))
        probabilities, labels = logits.log_softmax(-1).cpu().numpy(), batch.labels.cpu().numpy()
        for given, row, own in zip(inputs, probabilities, labels, strict=True):
            is_scored = own != NOT_SCORED
            yield Prediction(given.example, own[is_scored], row[is_scored])


def _rows(inputs: Sequence[Input], task: Task, num_tokens: int) -> Rows:
    """Rows of the data's width, as validation reads them."""
    ids = np.zeros((len(inputs), num_tokens), np.int64)
    targets = np.full(ids.shape, NOT_LABELLED, np.int64)
    for row, given in enumerate(inputs):
        ids[row, : len(given.ids)] = given.ids
        targets[row, : len(given.labels)] = given.labels
    lengths = np.array([len(given.ids) for given in inputs])
    return Rows(ids, ids, lengths, targets=targets[:, 0] if task == "classify" else targets)
