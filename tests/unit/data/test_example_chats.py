"""Prompts with responses, and conversations, from every kind of file; one line for whatever cannot be learnt from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from llm_dist import config
from llm_dist.data.examples import Columns
from llm_dist.data.labelled import labelled_shards
from llm_dist.data.opening import open_reading, settled
from llm_dist.tokenizer import HUGGING_FACE_FILE, Tokenizer, load
from llm_dist.tokenizer_chat import Message
from llm_dist.tokenizer_template import template_of
from llm_dist.tokenizer_training import train
from tests.unit.data.tiny_examples import WRITERS, json_lines, line_of, mistake, read, table, written

TEXT = "the quick brown fox jumps over the lazy dog: user, assistant and system.\n"


def chats(path: Path, **columns: str) -> list[list[tuple[str, str]]]:
    return [list(zip(each.roles, each.texts, strict=True)) for each in read(path, "instruct", **columns)]


def turn(prompt: str, response: str) -> list[tuple[str, str]]:
    return [("user", prompt), ("assistant", response)]


PAIRS: list[tuple[str, str, dict[str, str]]] = [
    ("a.tsv", "prompt\tresponse\na\tb\nc\td\n", {}),
    ("a.csv", 'Instruction,x,Output\n"a",1,b\nc,2,d\n', {}),
    ("a.csv", "answer,question\nb,a\nd,c\n", {}),
    ("a.tsv", "a\tb\nc\td\n", {}),
    ("a.tsv", "1\tb\ta\n2\td\tc\n", {"text": "2", "label": "1"}),
    ("a.tsv", "en\tde\na\tb\nc\td\n", {"text": "en", "label": "de"}),
    ("a.jsonl", '{"prompt": "a", "response": "b"}\n\n{"instruction": "c", "output": "d", "input": ""}\n', {}),
    ("a.jsonl", '{"input": "a", "output": "b"}\n{"input": "c", "output": "d"}', {"text": "input"}),
]


@pytest.mark.parametrize(("name", "content", "columns"), PAIRS)
def test_prompts_and_responses(tmp_path: Path, name: str, content: str, columns: dict[str, str]) -> None:
    assert chats(written(tmp_path / name, content), **columns) == [turn("a", "b"), turn("c", "d")]


@pytest.mark.parametrize("name", WRITERS)
def test_prompts_and_responses_of_tables(tmp_path: Path, name: str) -> None:
    columns = {"prompt": ["a", "c"], "input": ["e", None], "response": ["b", "d"]}
    path = table(tmp_path / name, columns)
    assert chats(path) == [turn("a\n\ne", "b"), turn("c", "d")]
    assert chats(path, text="response", label="prompt", text_pair="input")[1] == turn("d", "c")


@pytest.mark.parametrize(
    ("key", "columns"), [("input", {}), ("context", {"text_pair": "context"}), ("Input", {"text": "prompt"})]
)
def test_an_input_stands_below_its_prompt(tmp_path: Path, key: str, columns: dict[str, str]) -> None:
    path = json_lines(tmp_path / "a.jsonl", {"prompt": "a", key: "x\ny", "response": "b"})
    assert chats(path, **columns) == [turn("a\n\nx\ny", "b")]


CONVERSATION = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "a", "name": "me"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d"},
]
TURNS = [(each["role"], each["content"]) for each in CONVERSATION]


def test_conversations(tmp_path: Path) -> None:
    assert chats(json_lines(tmp_path / "a.jsonl", {"messages": CONVERSATION, "id": 3})) == [TURNS]
    assert chats(json_lines(tmp_path / "b.jsonl", {"chat": CONVERSATION}), text="chat") == [TURNS]
    rows = pyarrow.Table.from_pylist([{"messages": [{k: m[k] for k in ("role", "content")} for m in CONVERSATION]}])
    parquet.write_table(rows, tmp_path / "a.parquet")
    assert chats(tmp_path / "a.parquet") == [TURNS]


def messages(*pairs: tuple[Any, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


RECORD_MISTAKES: list[tuple[object, dict[str, str], list[str]]] = [
    ({"text": "a", "response": "b"}, {}, [": line 1: no column prompt or instruction or question", "data.text_column"]),
    ({"prompt": "a"}, {}, [": line 1: no column response or output or answer", "data.label_column"]),
    ({"prompt": "a", "response": "b"}, {"label": "x"}, ["data.label_column=x: no such column", "prompt, response"]),
    ({"prompt": "a", "response": "b"}, {"text_pair": "x"}, ["data.text_pair_column=x: no such column"]),
    ({"prompt": " ", "response": "b"}, {}, [": line 1: the prompt (data.text_column) is empty"]),
    ({"prompt": "a", "response": None}, {}, [": line 1: the response (data.label_column) is empty"]),
    ({"prompt": "a", "response": 3}, {}, ["the response (data.label_column) is a int, not a string"]),
    ({"prompt": "a", "response": "b", "input": []}, {}, ["the input (data.text_pair_column) is a list"]),
    ({"prompt": "a", "response": "\ud800"}, {}, ["the response (data.label_column) is not valid Unicode"]),
    ({"messages": "a"}, {}, [": line 1: the messages (data.text_column) are a str, not a list"]),
    ({"messages": []}, {}, [": line 1: no message of an assistant", "leave the example out"]),
    (messages(("user", "a")), {}, [": line 1: no message of an assistant"]),
    (messages(("user", "a"), ("tool", "b")), {}, [": line 1: message 2: role 'tool' is unknown", "system, user"]),
    (messages(("user", ""), ("assistant", "b")), {}, [": line 1: message 1: the content is empty"]),
    (messages(("user", ["a"]), ("assistant", "b")), {}, [": line 1: message 1: the content is a list"]),
    (messages(("user", "a"), ("system", "s"), ("assistant", "b")), {}, [": line 1: a system message behind another"]),
    ({"messages": [{"from": "user"}]}, {}, [": line 1: message 1: not a table with role and content"]),
]


@pytest.mark.parametrize(("record", "columns", "words"), RECORD_MISTAKES)
def test_what_cannot_be_learnt_from(tmp_path: Path, record: object, columns: dict[str, str], words: list[str]) -> None:
    path = json_lines(tmp_path / "a.jsonl", record)
    line = mistake(path, "instruct", **columns)
    assert line.startswith(str(path))
    assert [word for word in words if word not in line] == [], line


def test_files_that_hold_no_responses(tmp_path: Path) -> None:
    assert "holds words with tags, not examples to instruct" in mistake(written(tmp_path / "a.conll", ""), "instruct")
    assert "unknown type of file; examples to instruct" in mistake(written(tmp_path / "a.docx", ""), "instruct")
    line = mistake(written(tmp_path / "a.tsv", "a\tb\nc\n"), "instruct")
    assert ": line 2: 1 columns" in line and "data.label_column" in line


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("instruct") / "tokenizer"
    train([TEXT * 20], "byte-bpe", 310, folder)
    return load(folder)


def run_file(tmp_path: Path, path: Path, tokenizer: Tokenizer, **data: Any) -> config.Config:
    table: dict[str, Any] = {
        "run": {"name": "x", "steps": 1},
        "model": {"layers": 1, "d_model": 16, "heads": 2, "max_sequence_tokens": 64},
        "data": {
            "train": str(path),
            "tokenizer": str(tokenizer.folder),
            "cache": str(tmp_path / "cache"),
            "sequence_tokens": 64,
            **data,
        },
        "batch": {"tokens_per_step": 128},
        "objective": {"name": "instruct"},
    }
    return config.parse(table)


def test_shards_hold_conversations_and_mark_what_is_scored(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = json_lines(tmp_path / "a.jsonl", {"messages": CONVERSATION}, {"prompt": "the fox", "response": "jumps é"})
    run = run_file(tmp_path, path, tokenizer)
    reading = open_reading(run)
    shards = reading.sources[0].shards
    assert (shards.labels.per, shards.labels.names) == ("token", ("response",))
    assert shards.num_bytes == len("sabcd") + len("the foxjumps é".encode())
    assert settled(run, reading).data.labels == []
    rows = reading.sources[0].packing.rows(np.zeros(2, int), np.arange(2), False)
    chats = [[Message(*each) for each in TURNS], [Message("user", "the fox"), Message("assistant", "jumps é")]]
    for row, chat in enumerate(template_of(tokenizer).encode(chats)):
        count = int(rows.num_scored[row])
        assert rows.inputs[row, :count].tolist() == chat.ids
        assert rows.targets[row].tolist() == [0 if each else -100 for each in chat.is_scored] + [-100] * (64 - count)


def test_what_is_too_long(tmp_path: Path, tokenizer: Tokenizer) -> None:
    long = {"prompt": "fox " * 80, "response": "b"}
    path = json_lines(tmp_path / "a.jsonl", {"prompt": "a", "response": "dog " * 80}, long)
    assert "data.sequence_tokens=64" in line_of(lambda: open_reading(run_file(tmp_path, path, tokenizer)))
    line = line_of(lambda: open_reading(run_file(tmp_path, path, tokenizer, too_long="cut")))
    assert line == (
        f"data.train={path}: a.jsonl: line 2: no token of a response lies in the first data.sequence_tokens=64 "
        "tokens; raise that, or leave the example out"
    )
    made = labelled_shards(str(path), Columns(), "instruct", tokenizer.folder, tmp_path / "cache", None)
    line = line_of(lambda: open_reading(run_file(tmp_path, made, tokenizer, too_long="cut")))
    assert f"data.train={made}: example 2: no token of a response" in line
    path = json_lines(tmp_path / "a.jsonl", {"prompt": "a", "response": "dog " * 80})
    rows = (
        open_reading(run_file(tmp_path, path, tokenizer, too_long="cut"))
        .sources[0]
        .packing.rows(np.zeros(1, int), np.zeros(1, int), False)
    )
    assert (rows.num_scored.tolist(), rows.targets[0, -1]) == ([64], 0)


def with_template(tokenizer: Tokenizer, folder: Path, template: str) -> Path:
    shutil.copytree(tokenizer.folder, folder)
    path = folder / HUGGING_FACE_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    return folder


def test_another_template_makes_other_shards(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = json_lines(tmp_path / "a.jsonl", {"prompt": "a", "response": "b"})
    template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    folders = tokenizer.folder, with_template(tokenizer, tmp_path / "tokenizer", template)
    made = {
        labelled_shards(str(path), Columns(), "instruct", each, tmp_path / "cache", None)
        for each in (*folders, *folders)
    }
    assert len(made) == 2


def test_a_chat_that_the_template_refuses_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    refuses = "{% if messages[0].content == 'c' %}{{ raise_exception('no c') }}{% endif %}"
    other = with_template(tokenizer, tmp_path / "tokenizer", refuses + "{% for m in messages %}{{ m }}{% endfor %}")
    path = json_lines(tmp_path / "a.jsonl", {"prompt": "a", "response": "b"}, {"prompt": "c", "response": "d"})
    line = line_of(lambda: labelled_shards(str(path), Columns(), "instruct", other, tmp_path / "cache", None))
    assert line == "a.jsonl: line 2: the tokenizer's chat_template does not take this conversation: no c"


def test_classes_of_a_run_without_classes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    line = line_of(lambda: run_file(tmp_path, tmp_path, tokenizer, labels=["a"]))
    assert 'data.labels names classes, which objective.name="instruct" does not have' in line
