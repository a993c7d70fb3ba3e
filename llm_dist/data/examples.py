"""Examples of files, one after another, in bounded memory: texts with a class, words with tags, either without; chats.

What is wrong with an example is one line that names its file, its line and the way out. Knows no tokenizer, no shards
and no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from llm_dist.data.example_chats import chat_fields, messages_of
from llm_dist.data.example_fields import LABEL_KEY, PAIR_KEY, TEXT_KEY, Field, Row, text_of
from llm_dist.data.example_lines import text_rows
from llm_dist.data.example_rows import CONLL, RECORDS, TABLES, rows_of
from llm_dist.data.inputs import PACKINGS, STANDARD_INPUT, InputFile, expand
from llm_dist.errors import UserError
from llm_dist.tokenizer_chat import Role

Task = Literal["classify", "tag", "instruct"]

KNOWN: dict[Task, str] = {
    "classify": ".tsv, .csv, .jsonl, .parquet, .arrow or a folder saved by `datasets`",
    "tag": ".conll, .bio, .iob, .iob2, .txt, .jsonl, .parquet, .arrow or a folder saved by `datasets`",
    "instruct": ".tsv, .csv, .jsonl, .parquet, .arrow or a folder saved by `datasets`",
}
KNOWN_UNLABELLED: dict[Task, str] = {
    "classify": f".txt (a text per line), {KNOWN['classify']}",
    "tag": f".txt (a sentence per line), {KNOWN['tag'].replace('.txt, ', '')}",
    "instruct": KNOWN["instruct"],
}

_KIND = {ending: "CoNLL" if ending in CONLL else f".{ending}" for ending in (*CONLL, *TABLES, *RECORDS)}
_OUTSIDE = "O"
_BIO = re.compile(r"O|[BIES]-.+")


class Columns(NamedTuple):
    """Columns as the user names them: by name or, in a table without header, by position from 0; None: the default."""

    text: str | None = None
    text_pair: str | None = None
    """None: there is no second text."""
    label: str | None = None


@dataclass(frozen=True)
class Example:
    """What one document is made of."""

    texts: tuple[str, ...]
    """A text, or a text and its pair, or words, or the messages of a conversation."""
    labels: tuple[str, ...]
    """One, or one per word; none of a conversation, or where they are not known."""
    where: str
    """File, and the line (row in Parquet and Arrow) at which it begins."""
    roles: tuple[Role, ...] = ()
    """Who says each message of a conversation."""


def read_examples(place: str, columns: Columns, task: Task, *, is_labelled: bool = True) -> Iterator[Example]:
    """Examples of a file, or of the files of a folder or glob, in order.

    Without labels, a line of .txt or of standard input (`-`) is a text, or a sentence whose words blanks divide.

    Raises:
        UserError: there is none, or the first that cannot be used.
    """
    files = example_files(place, task, is_labelled=is_labelled)
    found = False
    for file in files:
        for example in _examples_of(file, columns, task, is_labelled):
            found = True
            yield example
    if not found:
        shown = ", ".join(file.shown for file in files[:3]) + (" ..." if len(files) > 3 else "")
        raise UserError(f"{shown}: holds no example; name a file with {_known(task, is_labelled)} content")


def _examples_of(file: InputFile, columns: Columns, task: Task, is_labelled: bool) -> Iterator[Example]:
    if task == "instruct":
        yield from (_chat(file, row) for row in rows_of(file, chat_fields(*columns)))
        return
    fields = _fields(columns, task, file.format, is_labelled)
    is_plain_text = not is_labelled and file.format == "txt"
    for row in text_rows(file, fields, is_of_words=task == "tag") if is_plain_text else rows_of(file, fields):
        yield _pair(file, row, fields) if task == "classify" else _sentence(file, row)


def _known(task: Task, is_labelled: bool) -> str:
    return (KNOWN if is_labelled else KNOWN_UNLABELLED)[task]


def example_files(place: str, task: Task, *, is_labelled: bool = True) -> list[InputFile]:
    """The files at `place`, all of one kind that can hold examples of the task, in a stable order.

    Raises:
        UserError: there is none, or not of one such kind.
    """
    if place == STANDARD_INPUT and not is_labelled:
        return [InputFile(None, STANDARD_INPUT, "txt")]
    if place == STANDARD_INPUT:
        raise UserError("standard input cannot be read again; name a file or a folder")
    path = Path(place)
    pairs = [(path.name, path)] if path.is_file() else [(name, path) for name, path in expand(place) if path]
    files = [file for name, path in pairs if (file := _typed(name, path)) is not None]
    if not files:
        what = "unknown type of file" if path.is_file() else "no file to read"
        raise UserError(f"{place}: {what}; examples to {task} are {_known(task, is_labelled)}, each also .gz or .zst")
    if len(kinds := sorted({_KIND[file.format] for file in files})) > 1:
        raise UserError(f"{place}: holds files of several kinds ({', '.join(kinds)}); name one kind, as in *.jsonl")
    if task == "tag" and files[0].format in TABLES:
        raise UserError(
            f"{files[0].shown}: a table holds no words with tags; write one word, a tab and its tag per line in a "
            ".conll file, or lists in .jsonl, .parquet or .arrow"
        )
    if task != "tag" and files[0].format in CONLL and (is_labelled or files[0].format != "txt"):
        raise UserError(
            f"{files[0].shown}: a .{files[0].format} file holds words with tags, not examples to {task}; those are "
            f"{_known(task, is_labelled)}"
        )
    return files


def _typed(name: str, path: Path) -> InputFile | None:
    """The file as an input; None when its type is unknown or it is hidden below the folder that was named."""
    parts = path.name.lower().split(".")
    packing = parts.pop() if parts[-1] in PACKINGS else None
    is_hidden = any(part.startswith(".") for part in Path(name).parts[1:])
    return None if len(parts) < 2 or parts[-1] not in _KIND or is_hidden else InputFile(path, name, parts[-1], packing)


def _fields(columns: Columns, task: Task, ending: str, is_labelled: bool) -> list[Field]:
    """What every row of such a file must have, the labels last."""
    fields = _labelled_fields(columns, task, ending)
    return fields if is_labelled else fields[:-1]


def _labelled_fields(columns: Columns, task: Task, ending: str) -> list[Field]:
    if task == "tag":
        if columns.text_pair is not None:
            raise UserError(f"{PAIR_KEY}={columns.text_pair}: words with tags have no second text; leave the key out")
        words = Field(TEXT_KEY, columns.text, ("tokens", "words"), 0)
        return [words, Field(LABEL_KEY, columns.label, ("tags", "ner_tags"), -1)]
    more_texts, more_labels = (("words", "tokens"), ("tags",)) if ending in TABLES else ((), ())
    fields = [Field(TEXT_KEY, columns.text, ("text", "sentence", *more_texts), 0)]
    if columns.text_pair is not None:
        fields.append(Field(PAIR_KEY, columns.text_pair, (), 0))
    return [*fields, Field(LABEL_KEY, columns.label, ("label", *more_labels), 1)]


def _chat(file: InputFile, row: Row) -> Example:
    """A conversation."""
    messages = messages_of(file, row)
    where = f"{file.name}: {row.unit} {row.number}"
    return Example(tuple(each.content for each in messages), (), where, tuple(each.role for each in messages))


def _pair(file: InputFile, row: Row, fields: list[Field]) -> Example:
    """A text, perhaps its pair, and their class if it is asked for."""
    at = f"{file.shown}: {row.unit} {row.number}"
    named = list(zip(row.values, fields, strict=True))
    return Example(
        tuple(text_of(text, at, f"the text ({field.key})") for text, field in named if field.key != LABEL_KEY),
        tuple(_label(label, at) for label, field in named if field.key == LABEL_KEY),
        f"{file.name}: {row.unit} {row.number}",
    )


def _sentence(file: InputFile, row: Row) -> Example:
    """Words, and their tags if they are asked for."""
    at = f"{file.shown}: {row.unit} {row.number}"
    for values, key in zip(row.values, (TEXT_KEY, LABEL_KEY), strict=False):
        if not isinstance(values, list):
            raise UserError(f"{at}: {key} names a {type(values).__name__}, not a list of words or of their tags")
    words, *of_tags = row.values
    tags = of_tags[0] if of_tags else []
    if of_tags and len(words) != len(tags):
        raise UserError(f"{at}: {len(words)} words but {len(tags)} tags; write one tag per word")
    if not words:
        raise UserError(f"{at}: no word; delete the {row.unit}")
    of_words = [
        f"{file.shown}: line {row.number + place}" if row.is_word_per_line else f"{at}: word {place + 1}"
        for place in range(len(words))
    ]
    return Example(
        tuple(text_of(word, where, f"the word ({TEXT_KEY})") for word, where in zip(words, of_words, strict=True)),
        tuple(_tag(tag, where, _OUTSIDE in tags) for tag, where in zip(tags, of_words, strict=False)),
        f"{file.name}: {row.unit} {row.number}",
    )


def _label(value: Any, at: str) -> str:
    if value is None or (isinstance(value, str) and (not value or value.isspace())):
        raise UserError(f"{at}: the label ({LABEL_KEY}) is empty; fill it in or leave the example out")
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str | int):
        raise UserError(
            f"{at}: the label ({LABEL_KEY}) is a {type(value).__name__}, neither a string nor an integer; "
            "name another column or mend it"
        )
    return str(value).strip()


def _tag(value: Any, at: str, is_of_entities: bool) -> str:
    """A tag; beside an O, which is no entity, it must be one of an entity."""
    tag = _label(value, at)
    if is_of_entities and not _BIO.fullmatch(tag):
        raise UserError(f"{at}: tag {tag!r} is not BIO; beside O, tags are B-, I-, E- or S- and a name, as in B-person")
    return tag
