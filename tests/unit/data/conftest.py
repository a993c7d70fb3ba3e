"""Folders that the tests of this room read."""

from pathlib import Path

import pytest
from hypothesis import settings

from llm_dist.tokenizer_training import train

# Machines that run tests are busy: a slow example proves nothing.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer of 280 tokens."""
    folder = tmp_path_factory.mktemp("tiny_tokenizer") / "tokenizer"
    train(["the quick brown fox jumps over the lazy dog " * 20], "byte-bpe", 280, folder)
    return folder
