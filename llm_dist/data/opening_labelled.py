"""From the [data] section of a run file to the labelled examples that it names: shards with labels. Knows no torch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import cast

import numpy as np

from llm_dist.config import Config
from llm_dist.data.examples import Columns, Task, read_examples
from llm_dist.data.folder import DATASET
from llm_dist.data.index import ShardSet, open_shards
from llm_dist.data.labelled import labelled_shards
from llm_dist.errors import UserError


def open_labelled(run: Config, key: str, place: str, names: Sequence[str] | None) -> ShardSet:
    """The examples at `place`, which `key` names; their labels must be among `names`, where those are given.

    Raises:
        UserError: they cannot be read, or are longer than a sequence, and why.
    """
    try:
        shards = open_shards(_folder(run, place, names))
        _check_labels(shards, names)
        _check_lengths(run, shards)
        if run.objective.name == "instruct":
            _check_responses(run, place, shards)
    except UserError as error:
        raise UserError(f"{key}={place}: {error}") from None
    return shards


def class_weights(run: Config, shards: ShardSet) -> list[float] | None:
    """Factors of the labels' losses, as `objective.class_weights` says; None: they are all 1.

    Raises:
        UserError: not as many factors as labels.
    """
    wanted, names = run.objective.class_weights, run.data.labels
    if wanted == "none" or not run.heads.classes:
        return None
    if isinstance(wanted, list):
        if len(wanted) != len(names):
            raise UserError(
                f"objective.class_weights has {len(wanted)} factors for {len(names)} labels ({', '.join(names)}); "
                "give one for each, in that order"
            )
        return wanted
    assert shards.labels is not None
    counts = shards.labels.counts()
    return [sum(counts) / (len(counts) * count) if count else 0.0 for count in counts]


def _folder(run: Config, place: str, names: Sequence[str] | None) -> Path:
    """The finished shards that `place` is, or those that are made of the examples there."""
    if (Path(place) / DATASET).is_file():
        return Path(place)
    tokenizer = tokenizer_of(run)
    if tokenizer is None:
        raise UserError("labelled examples need a tokenizer; name its folder in data.tokenizer")
    cache = Path(run.data.cache).expanduser()
    return labelled_shards(place, _columns(run), _task(run), tokenizer, cache, names)


def _columns(run: Config) -> Columns:
    return Columns(run.data.text_column, run.data.text_pair_column, run.data.label_column)


def _task(run: Config) -> Task:
    return cast(Task, run.objective.name)


def tokenizer_of(run: Config) -> str | None:
    """What makes tokens of a run's raw or labelled text: `data.tokenizer`, else that of the run that it starts from."""
    if run.data.tokenizer is not None or run.init.source is None:
        return run.data.tokenizer
    source = Path(run.init.source)  # a run folder, or a checkpoint inside one
    folders = (source / "tokenizer", source.parent.parent / "tokenizer")
    return next((str(folder) for folder in folders if folder.is_dir()), None)


def _check_labels(shards: ShardSet, names: Sequence[str] | None) -> None:
    if shards.labels is None:
        raise UserError("holds no labels; name a labelled file, or shards that were made of one")
    if names is None or tuple(names) == shards.labels.names:
        return
    known, found = ", ".join(names), ", ".join(shards.labels.names)
    if unknown := set(shards.labels.names) - set(names):
        raise UserError(f"label {min(unknown)!r} is unknown; the model knows {known}")
    raise UserError(
        f"its labels are {found}, the model's are {known}: ids differ; make the shards with these data.labels"
    )


def _check_lengths(run: Config, shards: ShardSet) -> None:
    longest, room = shards.dataset["made_from"].get("longest_tokens", 0), run.text_tokens
    if longest > room and run.data.too_long == "refuse":
        raise UserError(
            f"the longest example has {longest} tokens, more than data.sequence_tokens={room}; raise that, or set "
            'data.too_long="cut" to read only the beginning of such examples'
        )


def _check_responses(run: Config, place: str, shards: ShardSet) -> None:
    """Every example must have something to learn, also where it was cut."""
    labels, starts = shards.labels, shards.document_starts(0, shards.num_tokens)
    assert labels is not None and labels.per == "token"
    ends = np.append(starts[1:], shards.num_tokens)
    for number, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        read = labels.of_tokens(start, min(end - start, run.text_tokens))
        if not (read[1:] >= 0).any():
            where = f"example {number + 1}"
            if not (Path(place) / DATASET).is_file():
                where = next(islice(read_examples(place, _columns(run), _task(run)), number, None)).where
            raise UserError(
                f"{where}: no token of a response lies in the first data.sequence_tokens={run.text_tokens} tokens; "
                "raise that, or leave the example out"
            )
