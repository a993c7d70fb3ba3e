"""Chats to ids: what a model reads of a conversation, and which tokens of it a model that answers learns.

A tokenizer that brings a chat template has its own form (`tokenizer_template`). Others have ChatML: the separator, then
`<|im_start|>ROLE`, a line break, the content, `<|im_end|>` and a line break for each message. Knows no files of
examples, no shards, no models and no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, Protocol, get_args

from llm_dist.errors import UserError
from llm_dist.tokenizer import HUGGING_FACE_FILE, SPECIAL_TOKENS, Tokenizer

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = get_args(Role)
IM_START, IM_END = SPECIAL_TOKENS[6:]


class Message(NamedTuple):
    """What one side says."""

    role: Role
    content: str


class ChatIds(NamedTuple):
    """A conversation as ids."""

    ids: list[int]
    is_scored: list[bool]
    """Of each id: whether it is what an assistant says, or the end of that."""


class Template(Protocol):
    """The form that a tokenizer gives conversations; text of a message never becomes a special token."""

    @property
    def fingerprint(self) -> str | None:
        """Of the form; None for ChatML."""

    @property
    def end_ids(self) -> frozenset[int]:
        """What ends an assistant's message."""

    def encode(self, chats: Sequence[Sequence[Message]]) -> list[ChatIds]:
        """Ids of whole conversations.

        Raises:
            ChatError: the form has no place for one of them.
        """

    def prompt(self, chat: Sequence[Message]) -> list[int]:
        """Ids up to where the assistant's next message begins.

        Raises:
            ChatError: the form has no place for the conversation.
        """


class ChatError(UserError):
    """A conversation that a template does not take."""

    def __init__(self, number: int, mistake: str) -> None:
        super().__init__(mistake)
        self.number = number
        """Of the conversation among those that were given, from 0."""


def template_of(tokenizer: Tokenizer) -> Template:
    """The form in which the tokenizer's model reads conversations.

    Raises:
        UserError: it has none, or one that cannot be read.
    """
    path = tokenizer.folder / HUGGING_FACE_FILE
    keys = json.loads(path.read_text(encoding="utf-8"))
    written = keys.get("chat_template")
    if isinstance(written, list):  # several, by name
        written = next((each["template"] for each in written if each["name"] == "default"), None)
    if isinstance(written, str):
        from llm_dist.tokenizer_template import WrittenTemplate

        return WrittenTemplate(tokenizer, written, _special_names(keys))
    if not {IM_START, IM_END} <= tokenizer.special_ids.keys():
        raise UserError(
            f"{tokenizer.folder}: the tokenizer has neither a chat template nor {IM_START} and {IM_END}, so it has no "
            f'form for prompts and responses; give one as "chat_template" in its {HUGGING_FACE_FILE}'
        )
    return ChatML(tokenizer)


def _special_names(keys: dict[str, object]) -> dict[str, str]:
    """What templates call some tokens: bos_token, eos_token."""
    contents = {
        name: value.get("content") if isinstance(value, dict) else value
        for name, value in keys.items()
        if name.endswith("_token")
    }
    return {name: content for name, content in contents.items() if isinstance(content, str)}


class ChatML:
    """The form of tokenizers that bring none."""

    fingerprint = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._start_id, self._end_id = tokenizer.special_ids[IM_START], tokenizer.special_ids[IM_END]
        self._line_break = tokenizer.encode("\n")
        named = tokenizer.encode_batch([f"{role}\n" for role in ROLES])
        self._openings = {role: [self._start_id, *ids] for role, ids in zip(ROLES, named, strict=True)}

    @property
    def end_ids(self) -> frozenset[int]:
        """`<|im_end|>`."""
        return frozenset({self._end_id})

    def encode(self, chats: Sequence[Sequence[Message]]) -> list[ChatIds]:
        """Ids of whole conversations; a content is always encoded on its own."""
        contents = iter(self._tokenizer.encode_batch([message.content for chat in chats for message in chat]))
        return [self._framed((message.role, next(contents)) for message in chat) for chat in chats]

    def _framed(self, turns: Iterable[tuple[Role, list[int]]]) -> ChatIds:
        ids, is_scored = [self._tokenizer.separator_id], [False]
        for role, content in turns:
            opening = self._openings[role]
            ids += [*opening, *content, self._end_id, *self._line_break]
            is_scored += [False] * len(opening)
            is_scored += [role == "assistant"] * (len(content) + 1)
            is_scored += [False] * len(self._line_break)
        return ChatIds(ids, is_scored)

    def prompt(self, chat: Sequence[Message]) -> list[int]:
        """Ids up to where the assistant's next message begins."""
        return [*self.encode([chat])[0].ids, *self._openings["assistant"]]
