"""What stands in a row of a labelled file, and which of its columns that is. Knows no format of files and no task."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

from llm_dist.data.documents import num_utf8_bytes
from llm_dist.data.inputs import InputFile
from llm_dist.errors import UserError

TEXT_KEY, PAIR_KEY, LABEL_KEY = "data.text_column", "data.text_pair_column", "data.label_column"

_BOM = b"\xef\xbb\xbf"


class Field(NamedTuple):
    """A value that every row must have."""

    key: str
    """Of the run file, which names its column."""
    column: str | None
    """The user's choice: a name, or a position in a table without header."""
    defaults: tuple[str, ...]
    """Names that it may have where the user chose none."""
    position: int
    """Its column where there are no names and the user chose none; counted from the end if negative."""


FieldsOf = Callable[[Sequence[str]], Sequence[Field]]
"""What a row must have, where that depends on the names of its columns."""


def fields_among(fields: Sequence[Field] | FieldsOf, names: Sequence[str]) -> Sequence[Field]:
    """What a row with columns of these names must have."""
    return fields(names) if callable(fields) else fields


class Row(NamedTuple):
    """The values of one example."""

    unit: str
    """What `number` counts: line or row."""
    number: int
    """Where it begins, from 1."""
    values: list[Any]
    """One per field."""
    is_word_per_line: bool = False
    """Whether each word has a line of its own, the first being `number`."""


def lines_of(file: InputFile, stream: BinaryIO) -> Iterator[tuple[int, str]]:
    """Lines with their ends; only a line feed ends a line."""
    for number, content in enumerate(stream, start=1):
        try:
            yield number, (content.removeprefix(_BOM) if number == 1 else content).decode()
        except UnicodeDecodeError as error:
            raise UserError(
                f"{file.shown}: line {number}: not UTF-8 (byte 0x{content[error.start]:02x} at column "
                f"{error.start + 1}); convert the file to UTF-8"
            ) from None


def chosen_columns(file: InputFile, names: Sequence[str], fields: Sequence[Field], where: str = "") -> list[str]:
    """The column of each field among those with `names`."""
    shown, there = f"{file.shown}{where}", ", ".join(names) or "none"
    chosen: dict[str, Field] = {}
    for field in fields:
        wanted = field.defaults if field.column is None else (field.column,)
        found = next((name for each in wanted for name in names if each in (name, _default_name(field, name))), None)
        if found is None and field.column is not None:
            raise UserError(f"{shown}: {field.key}={field.column}: no such column; the columns are {there}")
        if found is None:
            raise UserError(
                f"{shown}: no column {' or '.join(field.defaults)}; the columns are {there}; name one with {field.key}"
            )
        if found in chosen:
            raise UserError(f"{shown}: {chosen[found].key} and {field.key} both name column {found}; name two columns")
        chosen[found] = field
    return list(chosen)


def _default_name(field: Field, name: str) -> str:
    """Capitals do not matter where the user chose no name."""
    return name.lower() if field.column is None else name


def text_of(value: Any, at: str, what: str) -> str:
    """`value` if it is text; `at` and `what` it is stand in the message.

    Raises:
        UserError: it is none, or empty.
    """
    if value is None or (isinstance(value, str) and (not value or value.isspace())):
        raise UserError(f"{at}: {what} is empty; fill it in or leave the example out")
    if not isinstance(value, str):
        raise UserError(f"{at}: {what} is a {type(value).__name__}, not a string; name another column or mend it")
    try:
        num_utf8_bytes(value)
    except UnicodeEncodeError as error:
        raise UserError(f"{at}: {what} is not valid Unicode ({error.reason}); mend it") from None
    return value
