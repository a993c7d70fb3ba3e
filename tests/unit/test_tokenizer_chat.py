"""Conversations as ids: what an assistant says is scored, text stays text, templates of others give their ids."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_dist.errors import UserError
from llm_dist.tokenizer import HUGGING_FACE_FILE, KINDS, SEPARATOR, Tokenizer, load
from llm_dist.tokenizer_chat import IM_END, IM_START, ChatML, Message
from llm_dist.tokenizer_import import import_tokenizer
from llm_dist.tokenizer_template import WrittenTemplate, template_of
from llm_dist.tokenizer_training import train
from tests import hugging_face_tokenizers as makers

TEXT = "the quick brown fox jumps over the lazy dog: user, assistant and system.\n"
CHAT = [
    Message("system", "be brief"),
    Message("user", "the fox?"),
    Message("assistant", "jumps <|im_end|> over"),
    Message("user", "the dog?"),
    Message("assistant", "lazy"),
]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}\n"
    "{% endfor %}\n{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
FORGETFUL = (
    "{% for message in messages %}{{ message['role'] + ': ' }}"
    "{% if loop.last or message['role'] == 'user' %}{{ message['content'] }}{% endif %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.mark.parametrize("kind", KINDS)
def test_our_form_is_chatml_and_scores_contents_and_their_ends(tmp_path: Path, kind: str) -> None:
    train([TEXT * 20], kind, 90 if kind == "wordpiece" else 296, tmp_path / "tokenizer")
    tokenizer = load(tmp_path / "tokenizer")
    template = template_of(tokenizer)
    [(ids, is_scored)] = template.encode([CHAT])
    expected: list[int] = [tokenizer.special_ids[SEPARATOR]]
    scored: list[int] = []
    start, end = tokenizer.special_ids[IM_START], tokenizer.special_ids[IM_END]
    for message in CHAT:
        content = [*tokenizer.encode(message.content), end]
        expected += [start, *tokenizer.encode(f"{message.role}\n"), *content, *tokenizer.encode("\n")]
        scored += content if message.role == "assistant" else []
    assert ids == expected
    assert [id_ for id_, flag in zip(ids, is_scored, strict=True) if flag] == scored
    assert ids.count(end) == len(CHAT), "what a text spells is text"
    assert (template.fingerprint, template.end_ids) == (None, {end})
    prompt = template.prompt(CHAT[:2])
    assert prompt == ids[: len(prompt)] and is_scored[len(prompt)] and not any(is_scored[: len(prompt)])


Folder = Callable[[str, str | None], Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """A folder of theirs with a chat template."""
    transformers = pytest.importorskip("transformers", reason="needs the extra llm_dist[hf]")
    root = tmp_path_factory.mktemp("theirs")

    def make(kind: str, template: str | None) -> Path:
        out = root / f"{kind}-{abs(hash(template))}"
        if not out.exists():
            makers.byte_level(out) if kind == "byte-level" else makers.llama(out)
            theirs = transformers.AutoTokenizer.from_pretrained(out)
            if template == CHATML:
                theirs.add_special_tokens({"additional_special_tokens": [IM_START, IM_END]})
            theirs.chat_template = template
            theirs.save_pretrained(out)
        return out

    return make


def imported(source: Path) -> Tokenizer:
    out = source.with_name(f"{source.name}-ours")
    if not out.exists():
        import_tokenizer(source, out)
    return load(out)


PLAIN = [message._replace(content=message.content.replace(" <|im_end|>", "")) for message in CHAT]


def their_ids(source: Path, chat: list[Message], **options: bool) -> list[int]:
    from transformers import AutoTokenizer

    messages = [message._asdict() for message in chat]
    theirs = AutoTokenizer.from_pretrained(source)
    return list(theirs.apply_chat_template(messages, tokenize=True, return_dict=False, **options))


@pytest.mark.parametrize(("kind", "written"), [("byte-level", CHATML), ("llama", CHATML), ("llama", LLAMA_2)])
def test_templates_of_others_give_their_ids(folder: Folder, kind: str, written: str) -> None:
    source = folder(kind, written)
    tokenizer = imported(source)
    template = template_of(tokenizer)
    assert isinstance(template, WrittenTemplate)
    [(ids, is_scored)] = template.encode([PLAIN])
    assert ids == their_ids(source, PLAIN)
    assert template.prompt(PLAIN[:4]) == their_ids(source, PLAIN[:4], add_generation_prompt=True)
    end = tokenizer.special_ids[IM_END] if written == CHATML else tokenizer.vocabulary()["</s>"]
    assert template.end_ids == {end}
    spans: list[list[int]] = [[]]
    for id_, flag in zip(ids, is_scored, strict=True):
        if flag:
            spans[-1].append(id_)
        elif spans[-1]:
            spans.append([])
    answers = [span for span in spans if span]
    assert [tokenizer.decode(answer).strip() for answer in answers] == ["jumps over", "lazy"]
    assert [answer[-1] for answer in answers] == [end, end]


@settings(max_examples=40, deadline=None)
@given(text=st.text(alphabet="ab \n<|im_end|>é字\ue000</s>", max_size=40))
def test_text_never_becomes_a_special_token(folder: Folder, text: str) -> None:
    for kind, written in (("byte-level", CHATML), ("llama", LLAMA_2)):
        tokenizer = imported(folder(kind, written))
        template = template_of(tokenizer)
        usual = [Message("user", "a"), Message("assistant", "b")]
        ends = {*template.end_ids, *(tokenizer.special_ids[SEPARATOR],)}
        [plain, spelled] = template.encode([usual, [Message("user", f"x{text}"), Message("assistant", f"y{text}")]])
        assert sum(id_ in ends for id_ in plain.ids) == sum(id_ in ends for id_ in spelled.ids)
        scored = [id_ for id_, flag in zip(spelled.ids, spelled.is_scored, strict=True) if flag]
        assert tokenizer.decode(scored[:-1]).strip().replace(" ", "") == f"y{text}".strip().replace(" ", "")


def test_what_a_text_spells_is_scored_like_its_surroundings(folder: Folder) -> None:
    tokenizer = imported(folder("byte-level", CHATML))
    [(ids, is_scored)] = template_of(tokenizer).encode([CHAT])
    assert ids.count(tokenizer.special_ids[IM_END]) == len(CHAT)
    answers = tokenizer.decode([id_ for id_, flag in zip(ids, is_scored, strict=True) if flag])
    assert answers == "jumps <|im_end|> overlazy"


def one_line(action: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        action()
    (line,) = str(caught.value).splitlines()
    return line


def test_a_template_that_forgets_is_refused(folder: Folder) -> None:
    template = template_of(imported(folder("llama", FORGETFUL)))
    assert template.encode([PLAIN[1:3]])
    assert "writes earlier messages anew" in one_line(lambda: template.encode([PLAIN]))


def test_what_a_template_refuses_is_said_in_its_words(folder: Folder) -> None:
    template = template_of(imported(folder("llama", LLAMA_2)))
    line = one_line(lambda: template.encode([PLAIN[2:]]))
    assert line.endswith("does not take this conversation: Conversation roles must alternate user/assistant")


def test_a_tokenizer_without_a_form(folder: Folder) -> None:
    line = one_line(lambda: template_of(imported(folder("llama", None))))
    assert "neither a chat template nor <|im_start|> and <|im_end|>" in line and HUGGING_FACE_FILE in line


def rewritten(tokenizer: Path, chat_template: object) -> Tokenizer:
    path = tokenizer / HUGGING_FACE_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": chat_template}))
    return load(tokenizer)


def test_templates_that_a_user_writes(tmp_path: Path) -> None:
    train([TEXT * 20], "byte-bpe", 310, tmp_path / "tokenizer")
    named = [{"name": "tool_use", "template": "{"}, {"name": "default", "template": CHATML}]
    template = template_of(rewritten(tmp_path / "tokenizer", named))
    chatml = ChatML(load(tmp_path / "tokenizer"))
    assert template.encode([PLAIN])[0].ids == chatml.encode([PLAIN])[0].ids[1:]
    marked = CHATML.replace("+ message['content'] +", "}}{% generation %}{{ message['content'] }}{% endgeneration %}{{")
    assert template_of(rewritten(tmp_path / "tokenizer", marked)).encode([PLAIN]) == template.encode([PLAIN])
    line = one_line(lambda: template_of(rewritten(tmp_path / "tokenizer", "{% for %}")))
    assert "is no template (line 1: " in line
    line = one_line(lambda: template_of(rewritten(tmp_path / "tokenizer", "{{ ''.__class__.__mro__ }}")).prompt(PLAIN))
    assert "does not take this conversation" in line and "unsafe" in line
