"""Where words begin, for every kind of vocabulary."""

from __future__ import annotations

import numpy as np
import pytest

from llm_dist import tokenizer
from llm_dist.tokenizer_training import train
from llm_dist.tokenizer_words import Words

TEXT = (
    "The quick brown fox jumped over 27 lazy dogs; \u6eda\u6eda\u957f\u6c5f\u4e1c\u901d\u6c34. "
    "Unbelievably caf\u00e9s (or na\u00efve ones) aren't cheap, says A-Z!\n"
)
KINDS = {"bpe": 330, "unigram": 316, "byte-bpe": 290, "wordpiece": 120}


@pytest.mark.parametrize(("kind", "size"), KINDS.items())
def test_pieces_of_words_are_joined_and_nothing_else(tmp_path, kind, size):
    train([TEXT * 30], kind, size, tmp_path / "tokenizer")
    loaded = tokenizer.load(tmp_path / "tokenizer")
    ids = loaded.encode("The quick jumped Unbelievably over, lazy-dogs 27!")
    assert len(ids) > 10
    begins = Words(loaded).begin(np.array([ids]))[0]
    pieces = np.split(np.array(ids), np.flatnonzero(begins)[1:])
    words = [loaded.decode(piece.tolist()).replace("##", "").strip() for piece in pieces]
    joined = [word for word in words if word]
    assert joined == ["The", "quick", "jumped", "Unbelievably", "over", ",", "lazy", "-", "dogs", "27", "!"]


@pytest.mark.parametrize(("kind", "size"), list(KINDS.items())[:3])
def test_ideographs_stand_alone_and_line_feeds_end_words(tmp_path, kind, size):
    train([TEXT * 30], kind, size, tmp_path / "tokenizer")
    loaded = tokenizer.load(tmp_path / "tokenizer")
    ids = loaded.encode("fox\nfox")
    begins = Words(loaded).begin(np.array([ids]))[0]
    starts = [loaded.decode(ids[place:]).lstrip() for place in np.flatnonzero(begins).tolist()]
    assert "fox\nfox" in starts and "fox" in starts
    if kind != "byte-bpe":
        chinese = loaded.encode("\u957f\u6c5f")
        assert Words(loaded).begin(np.array([chinese])).sum() >= 2


def test_special_tokens_begin_and_end_words(tmp_path):
    train([TEXT * 30], "bpe", KINDS["bpe"], tmp_path / "tokenizer")
    loaded = tokenizer.load(tmp_path / "tokenizer")
    fox = loaded.encode("fox")
    begins = Words(loaded).begin(np.array([[*fox, loaded.separator_id, *fox]]))[0]
    assert begins[0] and begins[len(fox)] and begins[len(fox) + 1]
