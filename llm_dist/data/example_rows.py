"""Rows of labelled files, one after another, in bounded memory: tables, JSON lines, Parquet, Arrow and CoNLL.

A row holds the values of the fields that were asked for, as they stand there. `examples` says what they must be. Knows
no task, no tokenizer and no shards.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, BinaryIO

from llm_dist.data.example_fields import Field, FieldsOf, Row, chosen_columns, fields_among, lines_of
from llm_dist.data.example_lines import delimited_rows, sentence_rows
from llm_dist.data.inputs import BrokenFileError, InputFile, naming, open_seekable, open_stream
from llm_dist.errors import UserError

CONLL = ("conll", "bio", "iob", "iob2", "txt")
"""Endings of files of one word and its tag per line."""
TABLES = ("tsv", "csv")
RECORDS = ("jsonl", "parquet", "arrow")

_PARQUET_ROWS = 256
_ARROW_FILE = b"ARROW1"
"""How Arrow's file format begins; its stream format does not."""
_NO_LABEL = -1
"""What `datasets` stores where a ClassLabel is not known, as in a test set."""

_Batches = tuple[Any, Callable[[Sequence[str]], Iterator[Any]]]
"""The schema, and what gives the batches of some columns."""


def rows_of(file: InputFile, fields: Sequence[Field] | FieldsOf) -> Iterator[Row]:
    """Rows of one file, blank ones left out.

    Raises:
        UserError: it cannot be read, or a row has not the fields.
    """
    with naming(file):
        if file.format in ("parquet", "arrow"):
            with open_seekable(file) as stream:
                yield from _table(file, stream, fields)
            return
        with open_stream(file) as stream:
            if file.format in TABLES:
                yield from delimited_rows(file, stream, fields)
            elif file.format == "jsonl":
                yield from _json_lines(file, stream, fields)
            else:
                yield from sentence_rows(file, stream, fields_among(fields, ()))


def _json_lines(file: InputFile, stream: BinaryIO, fields: Sequence[Field] | FieldsOf) -> Iterator[Row]:
    for number, line in lines_of(file, stream):
        if line.isspace():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file.shown}: line {number}: not JSON ({error}); mend or delete the line") from None
        if not isinstance(record, dict):
            raise UserError(
                f"{file.shown}: line {number}: a {type(record).__name__}, not a JSON object; mend or delete the line"
            )
        names = list(record)
        chosen = chosen_columns(file, names, fields_among(fields, names), f": line {number}")
        yield Row("line", number, [record[name] for name in chosen])


def _table(file: InputFile, stream: BinaryIO, fields: Sequence[Field] | FieldsOf) -> Iterator[Row]:
    """Rows of Parquet, or of Arrow as `datasets` saves it."""
    import pyarrow

    number = 0
    try:
        schema, batches = _parquet(stream) if file.format == "parquet" else _arrow(stream)
        names = chosen_columns(file, schema.names, fields_among(fields, schema.names))
        class_names = [_class_names(schema.metadata or {}, name) for name in names]
        for batch in batches(names):
            columns = [batch.column(name) for name in names]
            for place in range(batch.num_rows):
                number += 1
                values = [column[place].as_py() for column in columns]
                yield Row("row", number, list(map(_named, values, class_names)))
    except UnicodeDecodeError:
        raise UserError(f"{file.shown}: row {number}: not UTF-8; write the file again from UTF-8 text") from None
    except pyarrow.ArrowException as error:
        why = " ".join(str(error).split())
        raise BrokenFileError(f"{file.shown}: broken .{file.format} file ({why}); fetch it again") from None


def _parquet(stream: BinaryIO) -> _Batches:
    from pyarrow import parquet

    table = parquet.ParquetFile(stream, pre_buffer=False)
    read = partial(table.iter_batches, batch_size=_PARQUET_ROWS, use_threads=False)
    return table.schema_arrow, lambda names: read(columns=names)


def _arrow(stream: BinaryIO) -> _Batches:
    from pyarrow import ipc

    is_file = stream.read(len(_ARROW_FILE)) == _ARROW_FILE
    stream.seek(0)
    if is_file:
        file = ipc.open_file(stream)
        return file.schema, lambda _: (file.get_batch(number) for number in range(file.num_record_batches))
    batches = ipc.open_stream(stream)
    return batches.schema, lambda _: iter(batches)


def _class_names(metadata: Mapping[bytes, bytes], column: str) -> list[str] | None:
    """What the integers of a ClassLabel column of `datasets`, or of a list of them, stand for."""
    try:
        feature: Any = json.loads(metadata[b"huggingface"])["info"]["features"][column]
        feature = feature[0] if isinstance(feature, list) else feature.get("feature", feature)
        return list(map(str, feature["names"])) if feature["_type"] == "ClassLabel" else None
    except (ValueError, LookupError, TypeError, AttributeError):
        return None


def _named(value: Any, names: list[str] | None) -> Any:
    """A value with names instead of the integers of a ClassLabel; None stands for no label."""
    if names is None:
        return value
    if isinstance(value, list):
        return [_named(each, names) for each in value]
    if not isinstance(value, int) or value == _NO_LABEL:
        return None
    return names[value] if 0 <= value < len(names) else value
