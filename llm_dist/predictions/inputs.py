"""What labels are predicted for: examples of files, or of shards that were made of some, as ids."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llm_dist.config import Config
from llm_dist.data.example_ids import batches, encoded
from llm_dist.data.examples import Columns, Example, Task, read_examples
from llm_dist.data.folder import DATASET
from llm_dist.data.index import ShardSet, open_shards
from llm_dist.data.opening import held_out
from llm_dist.errors import UserError
from llm_dist.rows import NOT_LABELLED
from llm_dist.tokenizer import CLS, SEP, Tokenizer
from llm_dist.trained import Trained

_SHARD_EXAMPLES = 256


class Input(NamedTuple):
    """One example as the model reads it."""

    example: Example
    ids: list[int]
    """[tokens], at most as many as a sequence has."""
    labels: list[int]
    """One, or one per id: `NOT_LABELLED` where no word begins. Without labels, 0 says where one belongs."""


def task_of(run: Config) -> Task:
    """What the labels of a run are of.

    Raises:
        UserError: it learnt none.
    """
    if run.objective.name not in ("classify", "tag"):
        raise UserError(
            f'this run learnt objective.name="{run.objective.name}", no labels; '
            'labels are predicted by runs of "classify" and "tag"'
        )
    return run.objective.name


def read_inputs(trained: Trained, place: str, *, is_labelled: bool, is_cut: bool = False) -> Iterator[list[Input]]:
    """The examples at `place`, in their order, some at once.

    Args:
        trained: of whose labels they must be.
        place: a file, folder or glob of examples; with labels also a shard folder, without them also `-`.
        is_labelled: whether labels are read.
        is_cut: read only the beginning of what is too long, as `data.too_long="cut"` does.

    Raises:
        UserError: the first example that cannot be used, and why.
    """
    run, task = trained.run, task_of(trained.run)
    if is_labelled and (Path(place) / DATASET).is_file():
        yield from _of_shards(trained, open_shards(place), task)
        return
    columns = Columns(run.data.text_column, run.data.text_pair_column, run.data.label_column)
    names = run.data.labels if is_labelled else None
    for batch in batches(read_examples(place, columns, task, is_labelled=is_labelled)):
        documents = encoded(batch, task, trained.tokenizer, names)
        yield [
            _fitting(run, Input(example, ids, labels), is_cut)
            for example, (ids, labels, _) in zip(batch, documents, strict=True)
        ]


def _fitting(run: Config, given: Input, is_cut: bool) -> Input:
    room = run.text_tokens
    if len(given.ids) <= room:
        return given
    if not is_cut and run.data.too_long == "refuse":
        raise UserError(
            f"{given.example.where}: {len(given.ids)} tokens, more than the model reads, data.sequence_tokens={room}; "
            "shorten it, or read only the beginning of such examples with --cut"
        )
    labels = given.labels if len(given.labels) == 1 else given.labels[:room]
    return Input(given.example, given.ids[:room], labels)


def _of_shards(trained: Trained, shards: ShardSet, task: Task) -> Iterator[list[Input]]:
    """Examples whose texts are decoded; labels are found by their names, whatever their order."""
    if shards.labels is None:
        raise UserError(f"{shards.folder}: holds no labels; name a labelled file, or shards that were made of one")
    if shards.tokenizer_fingerprint != trained.tokenizer.fingerprint:
        raise UserError(f"{shards.folder} was made with another tokenizer than this model; name the labelled file")
    known = trained.run.data.labels
    if unknown := set(shards.labels.names) - set(known):
        raise UserError(f"{shards.folder}: label {min(unknown)!r} is unknown; the model knows {', '.join(known)}")
    to_known = np.array([known.index(name) for name in shards.labels.names])
    windows = held_out(trained.run, shards)
    for first in range(0, windows.num_windows, _SHARD_EXAMPLES):
        numbers = range(first, min(first + _SHARD_EXAMPLES, windows.num_windows))
        rows = windows.rows(numbers)
        assert rows.targets is not None and rows.num_scored is not None
        found = []
        for row, number in enumerate(numbers):
            count = int(rows.num_scored[row])
            ids, targets = rows.inputs[row, :count].tolist(), np.atleast_1d(rows.targets[row])[:count]
            labels = np.where(targets == NOT_LABELLED, NOT_LABELLED, to_known[targets.clip(0)]).tolist()
            texts = (_words if task == "tag" else _texts)(ids, labels, trained.tokenizer)
            named = tuple(known[label] for label in labels if label != NOT_LABELLED)
            found.append(Input(Example(texts, named, f"{shards.folder}: document {number + 1}"), ids, labels))
        yield found


def _texts(ids: list[int], labels: list[int], tokenizer: Tokenizer) -> tuple[str, ...]:
    ends = [place for place, id_ in enumerate(ids) if id_ == tokenizer.special_ids[SEP]] or [len(ids)]
    bounds = [ids.index(tokenizer.special_ids[CLS]), *ends]
    return tuple(tokenizer.decode(ids[first + 1 : end]) for first, end in pairwise(bounds))


def _words(ids: list[int], labels: list[int], tokenizer: Tokenizer) -> tuple[str, ...]:
    begins = [place for place, label in enumerate(labels) if label != NOT_LABELLED]
    return tuple(tokenizer.decode(ids[first:end]).strip() for first, end in pairwise([*begins, len(ids)]))
