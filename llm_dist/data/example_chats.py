"""Examples to learn responses from: a prompt and a response, or a conversation, as a row of a file holds them.

What is wrong with one is one line that names its file, its line and the way out. Knows no tokenizer, no shards and no
torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llm_dist.data.example_fields import LABEL_KEY, PAIR_KEY, TEXT_KEY, Field, FieldsOf, Row, text_of
from llm_dist.data.inputs import InputFile
from llm_dist.errors import UserError
from llm_dist.tokenizer_chat import ROLES, Message

MESSAGES = "messages"
_PROMPTS = ("prompt", "instruction", "question")
_INPUT = "input"
_RESPONSES = ("response", "output", "answer")


def chat_fields(text: str | None, text_pair: str | None, label: str | None) -> FieldsOf:
    """What a row must have: messages, or a prompt, a response and perhaps an input that belongs to the prompt.

    Columns are the user's choice; None: the default.
    """

    def fields_of(names: Sequence[str]) -> list[Field]:
        lower = {name.lower() for name in names}
        prompt = Field(TEXT_KEY, text, _PROMPTS, 0)
        response = Field(LABEL_KEY, label, _RESPONSES, 1)
        if label is None and text_pair is None and not lower.intersection(_RESPONSES):
            if text is not None and text in names:
                return [prompt]
            if text is None and MESSAGES in lower:
                return [Field(TEXT_KEY, None, (MESSAGES,), 0)]
        fields, chosen = [prompt, response], {(text or "").lower(), (label or "").lower()}
        if text_pair is not None or (_INPUT in lower and _INPUT not in chosen):
            fields.append(Field(PAIR_KEY, text_pair, (_INPUT,), 2))
        return fields

    return fields_of


def messages_of(file: InputFile, row: Row) -> list[Message]:
    """The conversation of a row.

    Raises:
        UserError: it is none.
    """
    at = f"{file.shown}: {row.unit} {row.number}"
    return _messages(row.values[0], at) if len(row.values) == 1 else _answered(row.values, at)


def _answered(values: Sequence[Any], at: str) -> list[Message]:
    """A prompt, its input below it where there is one, and the response."""
    prompt = text_of(values[0], at, f"the prompt ({TEXT_KEY})")
    response = text_of(values[1], at, f"the response ({LABEL_KEY})")
    if len(values) == 3 and values[2] not in (None, ""):
        prompt = f"{prompt}\n\n{text_of(values[2], at, f'the input ({PAIR_KEY})')}"
    return [Message("user", prompt), Message("assistant", response)]


def _messages(value: Any, at: str) -> list[Message]:
    if not isinstance(value, list):
        raise UserError(
            f"{at}: the messages ({TEXT_KEY}) are a {type(value).__name__}, not a list of tables with role and content"
        )
    messages = [_message(each, f"{at}: message {number}") for number, each in enumerate(value, start=1)]
    if not any(message.role == "assistant" for message in messages):
        raise UserError(f"{at}: no message of an assistant, so there is nothing to learn; leave the example out")
    if any(message.role == "system" for message in messages[1:]):
        raise UserError(f"{at}: a system message behind another message; put it first, and only one")
    return messages


def _message(value: Any, at: str) -> Message:
    if not isinstance(value, dict) or not {"role", "content"} <= value.keys():
        raise UserError(f"{at}: not a table with role and content; mend it or leave the example out")
    role = value["role"]
    if role not in ROLES:
        raise UserError(f"{at}: role {role!r} is unknown; roles are {', '.join(ROLES)}")
    return Message(role, text_of(value["content"], at, "the content"))
