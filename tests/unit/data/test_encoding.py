"""Encoding: long texts in pieces give the ids of the whole, and workers end with their parent."""

import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_dist import tokenizer as tokenizers
from llm_dist.data import encoding
from llm_dist.data.encoding import encode, long_pieces, num_workers
from llm_dist.tokenizer_training import train

TEXT = (
    "The quick fox's den, 12 of 345... jumps!\n\n  Over <|pad|> lazy dogs;\nit's été à 狐 は 犬 .\r\n\tnot <0x0A> yet "
)
SYLLABLES = ["the", "qui", "ck", "fox", "jum", "ps", "la", "zy", "dog", "over"]
WORDS = " ".join(first + second for first in SYLLABLES for second in SYLLABLES)
FRAGMENTS = [
    "a",
    "The",
    "s",
    "'s",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    ".",
    "...",
    "!\n",
    "<",
    "0x0A>",
    "12",
    "é",
    "e\u0301",
]
VOCABULARY = {"bpe": 320, "unigram": 330, "byte-bpe": 290, "wordpiece": 120}


@pytest.fixture(scope="module", params=tokenizers.KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tokenizers.Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizers") / request.param
    train([TEXT * 20 + WORDS], request.param, VOCABULARY[request.param], folder)
    return tokenizers.load(folder)


@settings(max_examples=150, deadline=None)
@given(text=st.lists(st.sampled_from([*FRAGMENTS, *TEXT.split(), "狐", "<|pad|>", "\u2581", "\u00a0"])).map("".join))
def test_pieces_of_a_long_text_give_the_ids_of_the_whole(tokenizer: tokenizers.Tokenizer, text: str) -> None:
    whole = tokenizer.encode(text)
    with patch.object(encoding, "LONG_CHARACTERS", 3):
        assert "".join(long_pieces(tokenizer.kind, text)) == text
        encoded = encode(tokenizer, ["fox", text, "fox", text])
    short = tokenizer.encode("fox")
    separator = tokenizer.separator_id
    assert encoded.ids.tolist() == [separator, *short, separator, *whole] * 2
    assert encoded.num_tokens.tolist() == [1 + len(short), 1 + len(whole)] * 2
    assert encoded.num_bytes.tolist() == [3, len(text.encode())] * 2


def test_long_texts_are_cut_where_a_letter_ends_and_only_for_our_own_kinds() -> None:
    text = "one two, three\nfour 5 six"
    with patch.object(encoding, "LONG_CHARACTERS", 2):
        assert list(long_pieces("bpe", text)) == ["one", " two, three", "\nfour", " 5 six"]
        assert list(long_pieces("another", text)) == [text]
        assert list(long_pieces("bpe", "12 34 56 78")) == ["12 34 56 78"]


def test_workers_follow_cores_and_input() -> None:
    cores = len(os.sched_getaffinity(0))
    assert num_workers(None, 100) == 1
    assert num_workers(None, 1 << 40) == cores
    assert num_workers(3, 100) == 3


def endless(marker: Path) -> Iterator[str]:
    marker.touch()
    while True:
        yield "a text " * 1000


def encode_for_ever(folder: Path, marker: Path) -> None:
    for batch in encoding.encode_all(endless(marker), tokenizers.load(folder), tokenizers.load, 2):
        marker.write_text(" ".join(str(child.pid) for child in multiprocessing.active_children()))
        assert len(batch.ids)


def test_workers_end_with_a_killed_parent(tiny_tokenizer: Path, tmp_path: Path) -> None:
    marker = tmp_path / "children"
    parent = multiprocessing.get_context("spawn").Process(target=encode_for_ever, args=(tiny_tokenizer, marker))
    parent.start()
    while not (marker.exists() and len(marker.read_text().split()) == 2):
        assert parent.is_alive()
        time.sleep(0.05)
    children = [int(pid) for pid in marker.read_text().split()]
    parent.kill()
    parent.join()
    deadline = time.monotonic() + 20
    while any(_runs(pid) for pid in children):
        assert time.monotonic() < deadline, "a worker outlives its parent"
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
