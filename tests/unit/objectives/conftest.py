"""Tokenizers and run files that the tests of objectives share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from llm_dist import config, tokenizer
from llm_dist.tokenizer import Tokenizer
from llm_dist.tokenizer_training import train

TEXT = "the quick brown fox jumps over the lazy dog, and nobody's reading unbelievable foxtrots! " * 20


@pytest.fixture(scope="session")
def wordpiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("wordpiece") / "tokenizer"
    train([TEXT], "wordpiece", 90, folder)
    return tokenizer.load(folder)


@pytest.fixture(scope="session")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., config.Config]:
    """A run file of an encoder; keys are given as `section__key=value`."""

    def make(**changes: Any) -> config.Config:
        table: dict[str, Any] = {
            "run": {"name": "x", "steps": 1, "seed": 7},
            "model": {"family": "bert", "layers": 1, "d_model": 16, "heads": 2, "max_sequence_tokens": 64},
            "data": {"train": "nowhere", "sequence_tokens": 32},
            "batch": {"tokens_per_step": 64},
            "objective": {"name": "masked"},
        }
        for name, value in changes.items():
            section, key = name.split("__")
            table[section][key] = value
        return config.parse(table)

    return make
