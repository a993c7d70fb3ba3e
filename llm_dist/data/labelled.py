"""Labelled examples as token shards with labels beside them, made in the cache once per content.

A document per example, in the order of the files. `labels.npy` holds the id of each document's class, of each token's
tag, or 0 at each token of a response. Knows no objective, no order and no torch.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llm_dist.data.example_ids import RESPONSE, Document, documents, names_of
from llm_dist.data.examples import Columns, Task, example_files, read_examples
from llm_dist.data.folder import DATASET, DTYPES
from llm_dist.data.inputs import content_of, naming
from llm_dist.data.labels import LABEL_DTYPE, LABELS, Per, sha256_of, write_header
from llm_dist.data.output import UNFINISHED, BusyOutputError, Output, sync_file, sync_folder
from llm_dist.data.shards import ShardWriter, dtype_name
from llm_dist.errors import UserError
from llm_dist.tokenizer import FILES, Tokenizer, load
from llm_dist.tokenizer_template import template_of

VERSION = 1
"""Of the rule that makes ids and labels of an example: another one makes other shards."""

_PER: dict[Task, Per] = {"classify": "document", "tag": "token", "instruct": "token"}
_WAIT_SECONDS = 0.2


class _Job(NamedTuple):
    place: str
    columns: Columns
    task: Task
    tokenizer: Tokenizer
    names: Sequence[str] | None
    made_from: Mapping[str, Any]


def labelled_shards(
    place: str, columns: Columns, task: Task, tokenizer_folder: str | Path, cache: Path, names: Sequence[str] | None
) -> Path:
    """The shard folder, in `cache`, of the labelled examples at `place`; made if it is not there yet.

    Args:
        place: a file, folder or glob.
        columns: where texts and labels stand.
        task: "classify", a label per document; "tag", a label per word; "instruct", a label where responses stand.
        tokenizer_folder: what makes ids of the texts.
        cache: several processes may share it.
        names: of the labels, in order of their ids; None: those that occur, sorted, `O` first.

    Raises:
        UserError: an example that cannot be used, a label that is not among `names`; the cache cannot be written.
    """
    tokenizer = load(tokenizer_folder)
    names = [RESPONSE] if task == "instruct" else names
    made_from = {
        "inputs": _contents(place, task),
        "tokenizer": tokenizer.fingerprint,
        "columns": columns._asdict(),
        "task": task,
        "names": None if names is None else _distinct(names),
        "version": VERSION,
        **({"template": template_of(tokenizer).fingerprint} if task == "instruct" else {}),
    }
    out = cache / "labelled" / hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:32]
    job = _Job(place, columns, task, tokenizer, names, made_from)
    while not (out / "train" / DATASET).is_file():
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            _make(job, out)
        except BusyOutputError:
            time.sleep(_WAIT_SECONDS)
        except (PermissionError, FileExistsError, NotADirectoryError) as error:
            raise UserError(f"data.cache={cache}: cannot be written ({error.strerror}); name another folder") from None
    return out / "train"


def _contents(place: str, task: Task) -> list[dict[str, Any]]:
    contents = []
    for file in example_files(place, task):
        with naming(file):
            contents.append(content_of(file))
    return contents


def _distinct(names: Sequence[str]) -> list[str]:
    if twice := [name for place, name in enumerate(names) if name in names[:place]]:
        raise UserError(f"label {twice[0]!r} is named twice; name each label once")
    return list(names)


def _make(job: _Job, out: Path) -> None:
    """Make and publish the shards, unless another process has done so meanwhile."""
    with Output(out) as output:
        if not output.is_empty():
            return
        names = names_of(read_examples(job.place, job.columns, job.task)) if job.names is None else list(job.names)
        _write(job, names, output.work / "train")
        if _contents(job.place, job.task) != job.made_from["inputs"]:
            raise UserError(f"{job.place}: changed while it was read; start again when it is whole")
        output.publish()


def _write(job: _Job, names: list[str], folder: Path) -> None:
    """The shards and, before they are complete, the labels beside them."""
    vocabulary = job.tokenizer.vocabulary_tokens
    longest_tokens = 0
    with ShardWriter(folder, vocabulary, job.tokenizer.fingerprint) as writer:
        with (folder / (LABELS + UNFINISHED)).open("w+b") as file:
            num_labels = 0
            write_header(file, num_labels)
            examples = read_examples(job.place, job.columns, job.task)
            for batch in documents(examples, job.task, job.tokenizer, names):
                longest_tokens = max(longest_tokens, _add(writer, batch, DTYPES[dtype_name(vocabulary)]))
                labels = np.array([label for document in batch for label in document.labels], LABEL_DTYPE)
                file.write(labels.data)
                num_labels += len(labels)
            write_header(file, num_labels)
            sync_file(file)
            sha256 = sha256_of(file)
        (folder / (LABELS + UNFINISHED)).rename(folder / LABELS)
        sync_folder(folder)
        writer.close(
            [job.tokenizer.folder / name for name in FILES],
            {**job.made_from, "longest_tokens": longest_tokens},
            {"per": _PER[job.task], "names": names, "sha256": sha256},
        )


def _add(writer: ShardWriter, batch: Sequence[Document], dtype: np.dtype[Any]) -> int:
    """Append documents; return the length of the longest."""
    ids = np.array([id_ for document in batch for id_ in document.ids], dtype)
    num_tokens = np.array([len(document.ids) for document in batch])
    writer.add_many(ids, num_tokens, np.array([document.num_bytes for document in batch]))
    return int(num_tokens.max())
