"""tiktoken encodes only where it gives the ids of `tokenizers`; what would differ is seen and said."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llm_dist import tokenizer_fast
from llm_dist.tokenizer import DEFINITION_FILE, DESCRIPTION_FILE, SPECIAL_TOKENS, Tokenizer, fingerprint_of, load
from llm_dist.tokenizer_fast import CLASSES, MISSING, FastTokenizer, load_fast, proved
from llm_dist.tokenizer_training import train

TEXT = "The quick brown fox's 1234 jumps, didn't it?\n\n  Ça où été — 狐は跳ぶ。 naïve  \r\n\tx = [1, 22, 333]; " * 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fast") / "tokenizer"
    train([TEXT], "byte-bpe", 330, folder)
    return folder


@pytest.fixture(scope="module")
def pair(folder: Path) -> tuple[Tokenizer, FastTokenizer]:
    slow = load(folder)
    fast = proved(slow, [TEXT])
    assert isinstance(fast, FastTokenizer), fast
    return slow, fast


@settings(max_examples=100, deadline=None)
@given(st.one_of(st.text(), st.text(alphabet="The quickbrown'sS\u017f1 \n\r\té狐\u0301<|>endoftext", max_size=60)))
@example("<|endoftext|>" + "".join(SPECIAL_TOKENS))
@example("\u00a0 \u2028\u1680\x85 x \u200b")
@example("'\u017f 'S 'LL 'lL ''s")
@example("\x00\ufffd\U000e0100\U0010ffff")
def test_ids_are_equal(pair: tuple[Tokenizer, FastTokenizer], text: str) -> None:
    slow, fast = pair
    assert fast.encode(text) == slow.encode(text)
    assert fast.decode(fast.encode(text)) == text


def test_what_looks_special_stays_text_and_runs_are_no_trap(pair: tuple[Tokenizer, FastTokenizer]) -> None:
    slow, fast = pair
    assert min(fast.encode("<|endoftext|><|pad|>")) >= len(SPECIAL_TOKENS)
    for text in (" " * 1_100_000 + "x", " \n" * 50_000, "1" * 50_000):
        assert fast.encode(text) == slow.encode(text)


def test_a_worker_loads_the_same(folder: Path, pair: tuple[Tokenizer, FastTokenizer]) -> None:
    worker = load_fast(folder)
    assert worker.encode_batch([TEXT, "", " fox"]) == pair[0].encode_batch([TEXT, "", " fox"])
    assert (worker.fingerprint, worker.vocabulary_tokens) == (pair[0].fingerprint, pair[0].vocabulary_tokens)


def test_both_engines_know_the_same_characters() -> None:
    assert [tokenizer_fast._differing(characters) for characters in CLASSES] == [set()] * len(CLASSES)


def test_missing_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    assert proved(load(folder), []) == MISSING


def test_other_characters_or_ids_are_seen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_fast, "_differing", lambda characters: {"é"} if characters == r"\s" else set())
    assert proved(load(folder), []) == r"tiktoken would differ: it reads U+00E9 otherwise in \s"
    monkeypatch.undo()
    monkeypatch.setattr(FastTokenizer, "encode_batch", lambda self, texts: [[9]])
    assert proved(load(folder), ["fox"]) == "tiktoken differs on a sample of the text"


def rebuilt(folder: Path, out: Path, tokens: list[str], merges: list[tuple[str, str]]) -> Tokenizer:
    """A tokenizer folder with these tokens behind the single bytes."""
    shutil.copytree(folder, out)
    definition = json.loads((folder / DEFINITION_FILE).read_text())
    vocabulary = {token: id_ for token, id_ in definition["model"]["vocab"].items() if id_ < 264}
    definition["model"]["vocab"] = vocabulary | {token: 264 + number for number, token in enumerate(tokens)}
    definition["model"]["merges"] = [list(pair) for pair in merges]
    (out / DEFINITION_FILE).write_text(json.dumps(definition))
    description = json.loads((out / DESCRIPTION_FILE).read_text())
    description["fingerprint"] = fingerprint_of(definition, "byte-bpe")
    (out / DESCRIPTION_FILE).write_text(json.dumps(description))
    return load(out)


def test_a_vocabulary_that_tiktoken_joins_otherwise_is_refused(folder: Path, tmp_path: Path) -> None:
    # b c joins before a b can, so no rule makes abc of a bc; tiktoken would join them.
    slow = rebuilt(folder, tmp_path / "trap", ["bc", "ab", "abc"], [("b", "c"), ("a", "b"), ("ab", "c")])
    assert proved(slow, []) == "tiktoken would differ: 'abc' is no single token when it stands alone"
    assert FastTokenizer(slow).encode("abc") != slow.encode("abc"), "the trap is one"
    sound = rebuilt(folder, tmp_path / "sound", ["bc", "ab", "abc"], [("b", "c"), ("a", "b"), ("a", "bc")])
    fast = proved(sound, ["abc"])
    assert isinstance(fast, FastTokenizer)
    twice = rebuilt(folder, tmp_path / "twice", ["bc", "ab", "abc"], [("b", "c"), ("a", "b"), ("a", "bc"), ("ab", "c")])
    assert proved(twice, []) == "tiktoken would differ: tokens are not numbered as they were merged"


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_no_vocabulary_that_is_proved_differs(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    tokens = ["a", "b", "c"]
    merges: list[tuple[str, str]] = []
    for _ in range(data.draw(st.integers(1, 8))):
        left, right = data.draw(st.sampled_from(tokens)), data.draw(st.sampled_from(tokens))
        if left + right not in tokens:
            merges.append((left, right))
            tokens.append(left + right)
    slow = rebuilt(folder, tmp_path_factory.mktemp("random") / "tokenizer", tokens[3:], merges)
    if tokenizer_fast._vocabulary_mistake(slow) is None:
        fast = FastTokenizer(slow)
        for _ in range(20):
            text = data.draw(st.text(alphabet="abc", min_size=3, max_size=24))
            assert fast.encode(text) == slow.encode(text)
