"""Encoding: words, pieces and whole batches give the ids of each text alone, and workers end with their parent."""

import multiprocessing
import os
import re
import time
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llm_dist import tokenizer as tokenizers
from llm_dist.data import encoding
from llm_dist.data.encoding import Encoder, encode_all, long_pieces
from llm_dist.data.tokenize import num_workers
from llm_dist.tokenizer_fast import FastTokenizer, load_fast, proved
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
    train([TEXT * 20 + WORDS + "dog.\n" * 100], request.param, VOCABULARY[request.param], folder)
    return tokenizers.load(folder)


@settings(max_examples=150, deadline=None)
@given(text=st.lists(st.sampled_from([*FRAGMENTS, *TEXT.split(), "狐", "<|pad|>", "\u2581", "\u00a0"])).map("".join))
def test_pieces_of_a_long_text_give_the_ids_of_the_whole(tokenizer: tokenizers.Tokenizer, text: str) -> None:
    whole = tokenizer.encode(text)
    with patch.object(encoding, "LONG_CHARACTERS", 3):
        assert "".join(long_pieces(tokenizer.kind, text)) == text
        encoded = Encoder(tokenizer).encode(["fox", text, "fox", text])
    short = tokenizer.encode("fox")
    separator = tokenizer.separator_id
    assert encoded.ids.tolist() == [separator, *short, separator, *whole] * 2
    assert encoded.num_tokens.tolist() == [1 + len(short), 1 + len(whole)] * 2
    assert encoded.num_bytes.tolist() == [3, len(text.encode())] * 2


def alone(tokenizer: tokenizers.Tokenizer, texts: Sequence[str]) -> tuple[list[int], list[int]]:
    """Ids and sizes by the plainest way."""
    each = [[tokenizer.separator_id, *tokenizer.encode(text)] for text in texts]
    return [id_ for ids in each for id_ in ids], [len(ids) for ids in each]


def check(encoder: Encoder, tokenizer: tokenizers.Tokenizer, texts: Sequence[str]) -> None:
    encoded = encoder.encode(texts)
    assert (encoded.ids.tolist(), encoded.num_tokens.tolist()) == alone(tokenizer, texts)
    assert encoded.num_bytes.tolist() == [len(text.encode()) for text in texts]


def test_long_texts_are_cut_where_a_letter_ends_and_only_for_our_own_kinds() -> None:
    text = "one two, three\nfour 5 six"
    with patch.object(encoding, "LONG_CHARACTERS", 2):
        assert list(long_pieces("bpe", text)) == ["one", " two, three", "\nfour", " 5 six"]
        assert list(long_pieces("another", text)) == [text]
        assert list(long_pieces("bpe", "12 34 56 78")) == ["12 34 56 78"]


# --- words that tokenizers is asked for once


SPACED = [
    "a",
    "é",
    "ж",
    "가",
    "狐",
    "½",
    "²",
    "Ⅷ",
    "ⱼ",
    "\U0001df00",
    "\u0301",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "\u00a0",
    ".",
    "'s",
    "<",
]


@settings(max_examples=300, deadline=None)
@given(text=st.lists(st.sampled_from([*SPACED, *FRAGMENTS])).map("".join))
def test_the_ids_of_a_text_are_those_of_its_words(tokenizer: tokenizers.Tokenizer, text: str) -> None:
    words = encoding._WORD.findall(text)
    assert "".join(words) == text
    assert words.count("") == 1
    check(Encoder(tokenizer), tokenizer, [text, "the fox", text])


def test_words_end_at_letters_that_every_edition_of_unicode_knows() -> None:
    from tokenizers import Regex, normalizers

    letters = re.findall(f"[{encoding._LETTER}]", "".join(map(chr, range(0x110000))))
    assert {"z", "Z", "ß", "ế", "Ω", "ё", "ת", "ي", "پ", "힣"} < set(letters)
    assert all(letter.isalpha() for letter in letters)
    assert normalizers.Replace(Regex(r"\p{L}"), "").normalize_str("".join(letters)) == ""
    assert all(unicodedata.ucd_3_2_0.category(letter)[0] == "L" for letter in letters)


class Counting(tokenizers.Tokenizer):
    """Notes the texts it is asked for."""

    def __init__(self, slow: tokenizers.Tokenizer) -> None:
        super().__init__(slow._runtime, slow.kind, slow.fingerprint, slow.folder)
        self.asked: list[str] = []

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        self.asked += texts
        return super().encode_batch(texts)


def test_each_word_is_asked_for_once_until_it_is_forgotten(
    tokenizer: tokenizers.Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting = Counting(tokenizer)
    encoder = Encoder(counting)
    for _ in range(3):
        check(encoder, tokenizer, ["the fox jumps", "the fox", "over the fox"])
    assert sorted(counting.asked) == [" fox", " jumps", " the", "over", "the"]
    long = "x" * 65
    for _ in range(2):
        check(encoder, tokenizer, [long])
    assert counting.asked[5:] == [long, long], "long words are not kept"
    monkeypatch.setattr(encoding, "KNOWN_CHARACTERS", 100)
    counting.asked.clear()
    forgetful = Encoder(counting)
    for number in range(50):
        check(forgetful, tokenizer, [f"fox jump{'s' * (number % 7)} over"])
        assert len(forgetful._pieces._known) < 10
    assert 3 < counting.asked.count("fox") < 50


def test_texts_of_another_kind_are_not_cut(tokenizer: tokenizers.Tokenizer) -> None:
    other = Counting(tokenizer)
    other.kind = "another"
    check(Encoder(other), tokenizer, ["the fox jumps", "over the fox"])
    assert sorted(other.asked) == ["over the fox", "the fox jumps"]


def test_ids_that_do_not_fit_are_refused(tokenizer: tokenizers.Tokenizer) -> None:
    broken = Counting(tokenizer)
    for id_, error in ((70_000, OverflowError), (tokenizer.vocabulary_tokens, AssertionError)):
        broken.encode_batch = lambda texts, id_=id_: [[id_] for _ in texts]
        with pytest.raises(error):
            Encoder(broken).encode(["fox"])
    broken.vocabulary_tokens = 70_001
    broken.encode_batch = lambda texts: [[70_000] for _ in texts]
    assert Encoder(broken).encode(["fox"]).ids.tolist() == [tokenizer.separator_id, 70_000]


# --- batches that tiktoken gets as one text


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[tokenizers.Tokenizer, FastTokenizer]:
    folder = tmp_path_factory.mktemp("fast") / "tokenizer"
    spaces = "a  b   c    d\n  e\n\n    f\t\t\tg \n h  \n\n  i \u3000k  <  =   1 a\u00a0\u00a0\u00a0a "
    train([TEXT * 20 + WORDS + spaces * 100], "byte-bpe", 360, folder)
    slow = tokenizers.load(folder)
    # What is cut or joined wrongly must show in the ids.
    assert [len(slow.encode(text)) for text in ("  ", "   ", "\u00a0\u00a0", "\u00a0a", "\t\t")] == [1] * 5
    fast = proved(slow, [TEXT])
    assert isinstance(fast, FastTokenizer), fast
    return slow, fast


BLANKS = [
    " ",
    " ",
    "  ",
    "   ",
    "\n",
    "\r",
    "\t",
    "\v",
    "\f",
    "\x1c",
    "\x85",
    "\u00a0",
    "\u2003",
    "\u2028",
    "\u3000",
    "\u200b",
    "\ufeff",
]
SOLID = [
    "a",
    "fox",
    "é",
    "狐",
    "ﬁ",
    "\u2019",
    "\u201c",
    "1",
    "22",
    ".",
    "...",
    "'s",
    "\u0301",
    "\0",
    "\1",
    "\2",
    "\3",
    "\4",
    "\5",
    "\6",
    "<|endoftext|>",
    "€",
    "\U0001f98a",
]


@settings(max_examples=500, deadline=None)
@given(texts=st.lists(st.lists(st.sampled_from([*BLANKS, *SOLID]), max_size=12).map("".join), min_size=1, max_size=5))
@example(texts=["  ", "a  ", "  a", " "])
@example(texts=["\u00a0", "a\u00a0", "\u00a0a", "a\u00a0b", "a \u00a0b", "a\u00a0\u00a0b"])
@example(texts=["  \0", "\0", "a  \1b", "\1"])
@example(texts=["\n  \n  a", "a.\n\n   b", "\r  a", "\x85  a", "\v\va", " \ta", "  1", "  '"])
def test_a_joined_batch_gives_the_ids_of_each_text(pair, texts: list[str]) -> None:
    slow, fast = pair
    check(Encoder(fast), slow, texts)


def test_what_is_joined_is_not_asked_for_text_by_text(pair, monkeypatch: pytest.MonkeyPatch) -> None:
    slow, fast = pair
    texts = [
        "  The  fox\n    jumps over\u00a0 the dog. ",
        "in\u00a0one piece, as\u2003are\u3000most",
        TEXT.replace("\0", ""),
    ] * 5
    texts[7] = "\0 alone"
    asked = []
    encode_batch = FastTokenizer.encode_batch
    monkeypatch.setattr(
        FastTokenizer, "encode_batch", lambda self, each: asked.extend(each) or encode_batch(self, each)
    )
    check(Encoder(fast), slow, texts)
    assert set(asked) == {texts[0], texts[7]}, "only texts with a mark, or with two kinds of space side by side"


@pytest.mark.parametrize(
    "text", [" " * 1_100_000 + "x", " \n" * 50_000, "1" * 50_000, "  ." * 50_000, "\u3000" * 50_000]
)
def test_long_runs_are_no_trap(pair, text: str) -> None:
    slow, fast = pair
    check(Encoder(fast), slow, ["a  b", text, text])


def test_white_space_is_what_tiktoken_takes_for_it() -> None:
    tiktoken = pytest.importorskip("tiktoken")
    every = [chr(code) for first, end in ((0, 0xD800), (0xE000, 0x110000)) for code in range(first, end)]
    one_byte = {bytes([byte]): byte for byte in range(256)}
    spaces = tiktoken.Encoding("spaces", pat_str=r"\s", mergeable_ranks=one_byte, special_tokens={})
    found = bytes(spaces.encode_ordinary("".join(every))).decode()
    assert sorted(found) == sorted({*encoding._WIDE, *" \t\v\f\r\n"})
    assert {character for character in every if character.encode()[0] in b"\xc2\xe1\xe2\xe3"} > set(encoding._WIDE)


@pytest.mark.parametrize("most_threads", [4, 0])
def test_threads_and_processes_give_what_one_worker_gives(
    pair, monkeypatch: pytest.MonkeyPatch, most_threads: int
) -> None:
    slow, fast = pair
    monkeypatch.setattr(encoding, "MOST_THREADS", most_threads)
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 200)
    texts = [f"{number}  foxes jump over\n\n  {number * number} dogs" for number in range(60)]
    results = [list(encode_all(texts, fast, load_fast, workers)) for workers in (1, 2)]
    results.append(list(encode_all(texts, slow, tokenizers.load, 1)))
    for batches in results:
        assert len(batches) > 5
        ids, sizes = alone(slow, texts)
        assert [id_ for batch in batches for id_ in batch.ids.tolist()] == ids
        assert [size for batch in batches for size in batch.num_tokens.tolist()] == sizes


# --- workers


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
