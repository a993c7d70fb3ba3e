"""The form of a tokenizer's conversations: its chat template, rendered as `transformers` renders it, to the same ids.

What an assistant says is found by rendering the conversation up to it and through it: the one must begin the other.
The clock is not given to templates, so that equal conversations have equal ids on every day. Knows no files of
examples, no shards, no models and no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from llm_dist.errors import UserError
from llm_dist.tokenizer import DEFINITION_FILE, HUGGING_FACE_FILE, Tokenizer
from llm_dist.tokenizer_chat import IM_END, IM_START, ChatError, ChatIds, ChatML, Message, Template

if TYPE_CHECKING:
    from jinja2 import Template as Compiled
    from jinja2 import nodes
    from jinja2.parser import Parser
    from tokenizers import Encoding

_PRIVATE = range(0xE000, 0xF900)
"""Characters that no text needs: they stand for special tokens that a text spells, while a template is rendered."""
_MOST_SHOWN = 200

Range = tuple[int, int]


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


class _Rendered(NamedTuple):
    """A conversation as text."""

    text: str
    answers: list[Range]
    """Where assistants speak."""
    spelled: list[Range]
    """Where a message spells a special token, which stays text."""


class WrittenTemplate:
    """A template in the language of Jinja."""

    def __init__(self, tokenizer: Tokenizer, written: str, special_names: Mapping[str, str]) -> None:
        """`special_names` are tokens by what the template calls them.

        Raises:
            UserError: it is no template.
        """
        from tokenizers import Tokenizer as Runtime

        self.fingerprint = hashlib.sha256(json.dumps([written, dict(special_names)]).encode()).hexdigest()
        self._tokenizer, self._special_names = tokenizer, special_names
        self._compiled = _compiled(written, tokenizer)
        # Unlike the tokenizer's own, this one reads special tokens out of what the template writes.
        self._runtime = Runtime.from_file(str(tokenizer.folder / DEFINITION_FILE))
        self._runtime.no_truncation()
        self._runtime.no_padding()
        added = self._runtime.get_added_tokens_decoder().items()
        self._special = {token.content: id_ for id_, token in added if token.special}

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """The special token that ends an assistant's message; none where the template writes none."""
        (ids, is_scored), *_ = self.encode([[Message("user", "a"), Message("assistant", "b")]])
        last = [id_ for id_, scored in zip(ids, is_scored, strict=True) if scored][-1]
        return frozenset({last} & set(self._special.values()))

    def encode(self, chats: Sequence[Sequence[Message]]) -> list[ChatIds]:
        """Ids of whole conversations."""
        return self._ids([self._rendered(number, chat) for number, chat in enumerate(chats)])

    def prompt(self, chat: Sequence[Message]) -> list[int]:
        """Ids up to where the assistant's next message begins."""
        hidden, replaced = self._hiding(chat)
        text = self._render(0, replaced, opens_answer=True)
        return self._ids([_restored(text, [], hidden)])[0].ids

    def _rendered(self, number: int, chat: Sequence[Message]) -> _Rendered:
        hidden, replaced = self._hiding(chat)
        text = self._render(number, replaced)
        answers = []
        for place, message in enumerate(replaced):
            if message.role == "assistant":
                before = self._render(number, replaced[:place], opens_answer=True)
                behind = self._render(number, replaced[: place + 1])
                if not (behind.startswith(before) and text.startswith(behind)):
                    raise ChatError(
                        number,
                        "the tokenizer's chat_template writes earlier messages anew when later ones follow, so it does "
                        f"not tell the responses from the rest; give a plainer one in its {HUGGING_FACE_FILE}",
                    )
                answers.append((len(before), self._end(behind, len(before))))
        return _restored(text, answers, hidden)

    def _end(self, text: str, start: int) -> int:
        """Where what begins at `start` ends: behind its last special token, if there is one."""
        ends = [text.rfind(token, start) + len(token) for token in self._special if token in text[start:]]
        return max(ends, default=len(text))

    def _hiding(self, chat: Sequence[Message]) -> tuple[dict[str, str], list[Message]]:
        """The conversation with a character for every special token that it spells, and what each stands for."""
        contents = [message.content for message in chat]
        spelled = [token for token in self._special if any(token in content for content in contents)]
        free = (chr(code) for code in _PRIVATE if not any(chr(code) in content for content in contents))
        hidden = dict(zip(free, sorted(spelled, key=len, reverse=True), strict=False))
        for mark, token in hidden.items():
            contents = [content.replace(token, mark) for content in contents]
        return hidden, [Message(message.role, content) for message, content in zip(chat, contents, strict=True)]

    def _render(self, number: int, chat: Sequence[Message], *, opens_answer: bool = False) -> str:
        try:
            return self._compiled.render(
                messages=[message._asdict() for message in chat],
                tools=None,
                documents=None,
                add_generation_prompt=opens_answer,
                **self._special_names,
            )
        except Exception as error:  # noqa: BLE001  a template is a program of others
            why = " ".join(str(error).split())[:_MOST_SHOWN]
            raise ChatError(number, f"the tokenizer's chat_template does not take this conversation: {why}") from None

    def _ids(self, rendered: Sequence[_Rendered]) -> list[ChatIds]:
        encodings = self._runtime.encode_batch([each.text for each in rendered], add_special_tokens=False)
        return [self._with_text_as_text(each, own) for each, own in zip(rendered, encodings, strict=True)]

    def _with_text_as_text(self, rendered: _Rendered, encoding: Encoding) -> ChatIds:
        ids: list[int] = []
        is_scored: list[bool] = []
        special = set(self._special.values())
        for id_, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            is_text = id_ in special and any(first <= start and end <= last for first, last in rendered.spelled)
            own = self._tokenizer.encode(rendered.text[start:end]) if is_text else [id_]
            ids += own
            is_scored += [any(first <= start < last for first, last in rendered.answers)] * len(own)
        return ChatIds(ids, is_scored)


def _restored(text: str, answers: Sequence[Range], hidden: Mapping[str, str]) -> _Rendered:
    """The text with the tokens that it spells instead of the characters that stood for them."""
    if not hidden:
        return _Rendered(text, list(answers), [])
    places = [0]
    for character in text:
        places.append(places[-1] + len(hidden.get(character, character)))
    spelled = [(places[at], places[at + 1]) for at, character in enumerate(text) if character in hidden]
    whole = "".join(hidden.get(character, character) for character in text)
    return _Rendered(whole, [(places[first], places[last]) for first, last in answers], spelled)


def _compiled(written: str, tokenizer: Tokenizer) -> Compiled:
    """The template, in a sandbox: it may have come from anywhere."""
    from jinja2 import TemplateSyntaxError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """Lets `{% generation %}`, which marks what an assistant says, stand around it."""

        tags = {"generation"}  # noqa: RUF012  as the base class has it

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    try:
        return environment.from_string(written)
    except TemplateSyntaxError as error:
        raise UserError(
            f"{tokenizer.folder}: the chat_template in {HUGGING_FACE_FILE} is no template (line {error.lineno}: "
            f"{error.message}); mend it"
        ) from None


def _to_json(value: Any, ensure_ascii: bool = False, **layout: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **layout)


def _refuse(message: str) -> NoReturn:
    """What templates call `raise_exception`."""
    raise ValueError(message)
