"""Write small labelled files, and read them in few words."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow
import pytest
from pyarrow import feather, ipc, parquet

from llm_dist.data.examples import Columns, Example, Task, read_examples
from llm_dist.errors import UserError


def read(path: Path | str, task: Task = "classify", **columns: str) -> list[Example]:
    return list(read_examples(str(path), Columns(**columns), task))


def pairs(path: Path | str, **columns: str) -> list[tuple[str, ...]]:
    return [(*example.texts, *example.labels) for example in read(path, **columns)]


def sentences(path: Path | str, **columns: str) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    return [(example.texts, example.labels) for example in read(path, "tag", **columns)]


def mistake(path: Path | str, task: Task = "classify", **columns: str) -> str:
    return line_of(lambda: read(path, task, **columns))


def line_of(action: Callable[[], object]) -> str:
    """The one line of the `UserError` that it ends with."""
    with pytest.raises(UserError) as caught:
        action()
    (line,) = str(caught.value).splitlines()
    return line


def written(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def json_lines(path: Path, *records: object) -> Path:
    return written(path, "".join(json.dumps(record) + "\n" for record in records))


WRITERS: dict[str, Callable[[pyarrow.Table, Path], None]] = {
    "a.parquet": parquet.write_table,
    "file.arrow": lambda table, path: feather.write_feather(table, path, "uncompressed"),
    "stream.arrow": lambda table, path: ipc.new_stream(path, table.schema).write_table(table),
}


def table(path: Path, columns: dict[str, Sequence[object]], features: object = None) -> Path:
    made = pyarrow.table(columns)
    if features is not None:
        made = made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    WRITERS[path.name](made, path)
    return path
