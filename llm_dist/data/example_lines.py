"""Rows of files whose lines are cut into columns, .tsv, .csv and CoNLL, or are a text each.

Knows no task, no tokenizer and no shards.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from typing import BinaryIO

from llm_dist.data.example_fields import Field, FieldsOf, Row, chosen_columns, fields_among, lines_of
from llm_dist.data.inputs import InputFile, naming, open_stream
from llm_dist.errors import UserError

_LONGEST_CSV_FIELD = 1 << 24
"""Characters; the limit of Python's csv, 131072, is shorter than some documents."""
_WORD_AND_TAG = re.compile(r"-DOCSTART-.*|\S+(\s\S+)*\s(O|[BIES]-\S+)")


def text_rows(file: InputFile, fields: Sequence[Field], *, is_of_words: bool) -> Iterator[Row]:
    """Each line is a text, or words that blanks divide; it is left to `examples` to refuse empty ones."""
    if len(fields) > 1:
        keys = " and ".join(field.key for field in fields)
        raise UserError(f"{file.shown}: a line holds one text, the model reads pairs ({keys}); name a .tsv or .jsonl")
    with naming(file), open_stream(file) as stream:
        for number, line in lines_of(file, stream):
            text = line.rstrip("\r\n")
            if is_of_words and number == 1 and _WORD_AND_TAG.fullmatch(text):
                raise UserError(
                    f"{file.shown}: line 1: {text!r} looks like a word and its tag, not like a sentence; "
                    "call such a file .conll"
                )
            yield Row("line", number, [text.split() if is_of_words else text])


def delimited_rows(file: InputFile, stream: BinaryIO, wanted: Sequence[Field] | FieldsOf) -> Iterator[Row]:
    """Rows of a .tsv or .csv file, with or without a header."""
    rows = (_csv if file.format == "csv" else _tsv)(file, stream)
    if (first := next(rows, None)) is None:
        return
    width, fields = len(first[1]), fields_among(wanted, [name.strip() for name in first[1]])
    names = _header(first[1], fields)
    if names is None:
        positions = [field.position if field.column is None else int(field.column) for field in fields]
        if len(set(positions)) < len(positions):
            keys = " and ".join(field.key for field in fields)
            raise UserError(
                f"{file.shown}: {keys} mean columns {', '.join(map(str, positions))}; name different columns"
            )
        yield Row("line", first[0], _cells(file, *first, fields, positions))
    else:
        by_name = [_by_name(field, names) for field in fields]
        positions = [names.index(name) for name in chosen_columns(file, names, by_name)]
    for number, cells in rows:
        if len(cells) > width:
            raise UserError(
                f"{file.shown}: line {number}: {len(cells)} columns, the first line has {width}; "
                f"take the {'tab' if file.format == 'tsv' else 'comma'} out of the text, or quote the text in a .csv"
            )
        yield Row("line", number, _cells(file, number, cells, fields, positions))


def _header(first: Sequence[str], fields: Sequence[Field]) -> list[str] | None:
    """Names of the columns if the first line has them."""
    names = [name.strip() for name in first]
    if chosen := [field.column for field in fields if field.column is not None]:
        return None if all(_is_position(column) for column in chosen) else names
    lower = {name.lower() for name in names}
    return names if all(lower.intersection(field.defaults) for field in fields) else None


def _is_position(column: str) -> bool:
    return column.isascii() and column.isdecimal()


def _by_name(field: Field, names: Sequence[str]) -> Field:
    """The field with a name for the position that the user gave in a table with a header."""
    column = field.column
    if column is None or column in names or not _is_position(column) or int(column) >= len(names):
        return field
    return field._replace(column=names[int(column)])


def _cells(
    file: InputFile, number: int, cells: Sequence[str], fields: Sequence[Field], positions: Sequence[int]
) -> list[str]:
    for field, position in zip(fields, positions, strict=True):
        if position >= len(cells):
            raise UserError(
                f"{file.shown}: line {number}: {len(cells)} columns (the first is number 0), none has number "
                f"{position}; mend the line, or name another column with {field.key}"
            )
    return [cells[position] for position in positions]


def _tsv(file: InputFile, stream: BinaryIO) -> Iterator[tuple[int, list[str]]]:
    """Lines cut at tabs; a quote is a character."""
    for number, line in lines_of(file, stream):
        if content := line.removesuffix("\n").removesuffix("\r"):
            yield number, content.split("\t")


def _csv(file: InputFile, stream: BinaryIO) -> Iterator[tuple[int, list[str]]]:
    """Records, which quotes may spread over lines, and the line at which each begins."""
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_CSV_FIELD))
    reader = csv.reader((line for _, line in lines_of(file, stream)), strict=True)
    begins = 1
    try:
        for cells in reader:
            if cells:
                yield begins, cells
            begins = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{file.shown}: line {begins}: not CSV ({error}); a quote inside a quoted text is written twice"
        ) from None


def sentence_rows(file: InputFile, stream: BinaryIO, fields: Sequence[Field]) -> Iterator[Row]:
    """Sentences: lines of a word and its tag, cut at tabs or else at spaces, with blank lines between them."""
    for field in fields:
        if field.column is not None and not _is_position(field.column):
            raise UserError(
                f"{file.shown}: {field.key}={field.column}: such a file has no names of columns; "
                "leave the key out, or give a position, the first being 0"
            )
    positions = [field.position if field.column is None else int(field.column) for field in fields]
    sentence: list[list[str]] = []
    begins = 1
    for number, line in lines_of(file, stream):
        content = line.strip("\r\n\t")
        if not content.strip(" \t") or content.startswith("-DOCSTART-"):
            if sentence:
                yield _sentence(begins, sentence)
            sentence = []
            continue
        columns = content.split("\t") if "\t" in content else content.split(" ")
        begins = begins if sentence else number
        sentence.append(_word(file, number, [column for column in columns if column], fields, positions))
    if sentence:
        yield _sentence(begins, sentence)


def _word(
    file: InputFile, number: int, columns: list[str], fields: Sequence[Field], positions: Sequence[int]
) -> list[str]:
    if len(columns) < len(fields):
        raise UserError(
            f"{file.shown}: line {number}: too few columns, {' '.join(columns)!r} alone; "
            "write the word, a tab and its tag"
        )
    from_start = [position % len(columns) if position < 0 else position for position in positions]
    return _cells(file, number, columns, fields, from_start)


def _sentence(begins: int, words: list[list[str]]) -> Row:
    return Row("line", begins, [list(column) for column in zip(*words, strict=True)], is_word_per_line=True)
