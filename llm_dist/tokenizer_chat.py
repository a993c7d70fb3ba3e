"""Chats to ids: what a model reads of a conversation, and which tokens of it a model that answers learns.

A tokenizer that brings a chat template has its own form (`tokenizer_template`); others have ChatML: the separator, then
`<|im_start|>ROLE`, a line break, the content, `<|im_end|>` and a line break for each message. Knows no files of
examples, no shards, no models and no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, Protocol, get_args

from llm_dist.errors import UserError
from llm_dist.tokenizer import SPECIAL_TOKENS, Tokenizer

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
