"""Examples to ids: `[cls] text [sep]`, `[cls] text [sep] pair [sep]` or `[cls] words [sep]`, each with labels.

A word's tag stands at its first piece. Conversations have the form that the tokenizer gives them, and the label
"response" at what an assistant says. Knows no files and no shards.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from llm_dist.data.documents import num_utf8_bytes
from llm_dist.data.examples import Example, Task
from llm_dist.errors import UserError
from llm_dist.rows import NOT_LABELLED
from llm_dist.tokenizer import CLS, SEP, UNKNOWN, Tokenizer
from llm_dist.tokenizer_chat import ChatError, Message, Template
from llm_dist.tokenizer_template import template_of

RESPONSE = "response"
"""The one label of conversations."""

_BATCH_EXAMPLES, _BATCH_CHARACTERS = 1024, 1 << 18
"""Encoded at once; the runtime needs more than 100 bytes of memory per character."""
_MOST_SHOWN = 40


class Document(NamedTuple):
    """One example as ids."""

    ids: list[int]
    labels: list[int]
    """One or, of tagged words and of conversations, one per id."""
    num_bytes: int
    """UTF-8 bytes of its texts; words count with spaces between them."""


def names_of(examples: Iterable[Example]) -> list[str]:
    """The labels that occur, sorted, integers by value, and `O`, which is no entity, first."""
    names = {label for example in examples for label in example.labels}
    by_value = all(name.removeprefix("-").isdecimal() for name in names)
    return sorted(names, key=lambda name: (name != "O", int(name) if by_value else 0, name))


def documents(
    examples: Iterable[Example], task: Task, tokenizer: Tokenizer, names: Sequence[str]
) -> Iterator[list[Document]]:
    """Documents of the examples, batch by batch, in order.

    Raises:
        UserError: a label that is not among `names`.
    """
    if task == "instruct":
        template = template_of(tokenizer)
        yield from (_chats(batch, template, names.index(RESPONSE)) for batch in batches(examples))
        return
    for batch in batches(examples):
        yield encoded(batch, task, tokenizer, names)


def encoded(batch: Sequence[Example], task: Task, tokenizer: Tokenizer, names: Sequence[str] | None) -> list[Document]:
    """Documents of some examples; without `names` each label is 0, which only says where one belongs.

    Raises:
        UserError: a label that is not among `names`.
    """
    encode = _classified if task == "classify" else _tagged
    if names is None:
        labels = [[0] * (1 if task == "classify" else len(example.texts)) for example in batch]
    else:
        label_ids = {name: id_ for id_, name in enumerate(names)}
        labels = [_label_ids(example, label_ids) for example in batch]
    return encode(batch, labels, tokenizer)


def batches(examples: Iterable[Example]) -> Iterator[list[Example]]:
    """As many examples as are encoded at once."""
    batch: list[Example] = []
    num_characters = 0
    for example in examples:
        batch.append(example)
        num_characters += sum(map(len, example.texts))
        if len(batch) == _BATCH_EXAMPLES or num_characters >= _BATCH_CHARACTERS:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


def _label_ids(example: Example, ids: Mapping[str, int]) -> list[int]:
    try:
        return [ids[label] for label in example.labels]
    except KeyError as error:
        known = ", ".join(list(ids)[:_MOST_SHOWN]) + (" ..." if len(ids) > _MOST_SHOWN else "")
        raise UserError(f"{example.where}: label {error.args[0]!r} is unknown; the model knows {known}") from None


def _classified(batch: Sequence[Example], labels: Sequence[list[int]], tokenizer: Tokenizer) -> list[Document]:
    encoded = iter(tokenizer.encode_batch([text for example in batch for text in example.texts]))
    cls, sep = tokenizer.special_ids[CLS], tokenizer.special_ids[SEP]
    made = []
    for example, own in zip(batch, labels, strict=True):
        ids = [cls]
        for _ in example.texts:
            ids += [*next(encoded), sep]
        made.append(Document(ids, own, sum(map(num_utf8_bytes, example.texts))))
    return made


def _tagged(batch: Sequence[Example], labels: Sequence[list[int]], tokenizer: Tokenizer) -> list[Document]:
    spelled = [_spelled(example.texts, tokenizer.kind) for example in batch]
    words = list(dict.fromkeys(word for each in spelled for word in each))
    ids_of = dict(zip(words, tokenizer.encode_batch(words), strict=True))
    cls, sep, unknown = (tokenizer.special_ids[token] for token in (CLS, SEP, UNKNOWN))
    made = []
    for example, each, own in zip(batch, spelled, labels, strict=True):
        ids, tags = [cls], [NOT_LABELLED]
        for word, tag in zip(each, own, strict=True):
            # A word that the tokenizer drops would take its tag along.
            pieces = ids_of[word] or [unknown]
            ids += pieces
            tags += [tag, *[NOT_LABELLED] * (len(pieces) - 1)]
        made.append(Document([*ids, sep], [*tags, NOT_LABELLED], num_utf8_bytes(" ".join(example.texts))))
    return made


def _chats(batch: Sequence[Example], template: Template, response_id: int) -> list[Document]:
    chats = [list(map(Message, example.roles, example.texts)) for example in batch]
    try:
        encoded = template.encode(chats)
    except ChatError as error:
        raise UserError(f"{batch[error.number].where}: {error}") from None
    return [
        Document(
            chat.ids,
            [response_id if scored else NOT_LABELLED for scored in chat.is_scored],
            sum(map(num_utf8_bytes, example.texts)),
        )
        for chat, example in zip(encoded, batch, strict=True)
    ]


def _spelled(words: Sequence[str], kind: str) -> list[str]:
    """Words as they stand in running text, where every kind but wordpiece joins a space to the word behind it."""
    return list(words) if kind == "wordpiece" else [words[0], *(f" {word}" for word in words[1:])]
