"""A small real corpus, its tokenizer, its shards and a finished run, each made once by the commands themselves."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.commands import llm_dist

MODULES = ("argparse", "ast", "csv", "decimal", "difflib", "heapq", "inspect", "random", "statistics", "unittest.mock")
"""Modules of the standard library whose docstrings are the corpus: about 150 kB of English."""

RUN_FILE = """
[run]
name = "tiny"
dir = "{runs}"
steps = 8
seed = 3

[model]
layers = 2
d_model = 32
heads = 2
d_ff = 64
max_sequence_tokens = 64

[data]
train = "{shards}/train"
holdout = "{shards}/holdout"
sequence_tokens = 32

[batch]
tokens_per_step = 256
sequences_per_micro_batch = 4

[optim]
lr = 3e-3
warmup_steps = 2

[engine]
precision = "fp32"
compile = "off"

[checkpoint]
every_steps = 4

[log]
every_steps = 1
sinks = []
"""


def docstrings() -> list[str]:
    texts = []
    for name in MODULES:
        module = importlib.import_module(name)
        classes = [value for value in vars(module).values() if inspect.isclass(value) and value.__module__ == name]
        members = [value for each in (module, *classes) for value in vars(each).values() if callable(value)]
        texts += [text for each in (module, *members) if (text := inspect.getdoc(each)) and len(text) > 60]
    return sorted(set(texts))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "docstrings.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in docstrings()), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tokenizer(corpus: Path) -> Path:
    folder = corpus.parent / "tokenizer"
    said = llm_dist(
        "tokenizer", "train", corpus, "--type", "byte-bpe", "--vocab-size", "512", "--out", folder, "--json"
    )
    assert said.json["bytes_per_token"] > 1.5
    return folder


@pytest.fixture(scope="session")
def other_tokenizer(corpus: Path) -> Path:
    folder = corpus.parent / "other-tokenizer"
    said = llm_dist("tokenizer", "train", corpus, "--type", "byte-bpe", "--vocab-size", "400", "--out", folder)
    assert said.code == 0, said.err
    return folder


@pytest.fixture(scope="session")
def shards(corpus: Path, tokenizer: Path) -> Path:
    return tokenized(corpus, tokenizer, corpus.parent / "shards")


@pytest.fixture(scope="session")
def other_shards(corpus: Path, other_tokenizer: Path) -> Path:
    """The same text in the tokens of another tokenizer."""
    return tokenized(corpus, other_tokenizer, corpus.parent / "other-shards")


def tokenized(corpus: Path, tokenizer: Path, out: Path, *more: str) -> Path:
    words = ("--tokenizer", tokenizer, "--out", out, "--holdout", "0.03", "--workers", "1", *more)
    said = llm_dist("tokenize", corpus, *words)
    assert said.code == 0, said.err
    return out


@pytest.fixture(scope="session")
def write_run_file(shards: Path) -> Callable[[Path], Path]:
    """`write_run_file(folder)`: a run file whose run folder is folder/runs/tiny."""

    def write(folder: Path) -> Path:
        path = folder / "run.toml"
        path.write_text(RUN_FILE.format(runs=folder / "runs", shards=shards), encoding="utf-8")
        return path

    return write


@pytest.fixture
def run_file(tmp_path: Path, write_run_file: Callable[[Path], Path]) -> Path:
    return write_run_file(tmp_path)


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """Where `run_file` puts its run."""
    return tmp_path / "runs" / "tiny"


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, write_run_file: Callable[[Path], Path]) -> Path:
    """A finished run of 8 steps, evaluated at 4 and 8. Tests only read it."""
    folder = tmp_path_factory.mktemp("finished")
    said = llm_dist("train", write_run_file(folder), "eval.every_steps=4", 'log.sinks=["tensorboard", "csv"]', "--json")
    assert said.json == {"exit_code": 0, "exit": "done"}
    return folder / "runs" / "tiny"
