"""Where words begin in a row of ids, from the tokens alone: what a person would call a word, in any script.

Letters and digits continue a word, a space, a change to punctuation or back, and every ideograph begin one. Knows
nothing of texts, rows' meaning or torch.
"""

from __future__ import annotations

import unicodedata
from typing import Any

import numpy as np
import numpy.typing as npt

from llm_dist.tokenizer import Tokenizer

_SPACE, _LETTER, _MARK, _ALONE, _BYTES = range(5)
_SPACES = {"\u2581": " ", "\u0120": " ", "\u010a": "\n"}
"""How vocabularies of others write a space (sentencepiece, GPT-2) and a line feed (GPT-2)."""
_CONTINUES = "##"
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
_IDEOGRAPHS = ((0x2E80, 0x30FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x323AF))


class Words:
    """What kind of character each token of a vocabulary begins and ends with."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        special = set(tokenizer.special_ids.values())
        texts = ["" if id_ in special else _text(tokenizer, id_) for id_ in range(tokenizer.vocabulary_tokens)]
        self._first = np.array([_kind(text[:1]) for text in texts], np.int8)
        self._last = np.array([_kind(text[-1:]) for text in texts], np.int8)
        has_marks = any(text.startswith(_CONTINUES) and len(text) > len(_CONTINUES) for text in texts)
        self._continues = np.array([text.startswith(_CONTINUES) for text in texts]) if has_marks else None

    def begin(self, ids: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.bool_]:
        """Whether a word begins at each of `ids` [n, T]; the first of a row always begins one."""
        begins = np.ones(ids.shape, np.bool_)
        if self._continues is not None:
            begins[:, 1:] = ~self._continues[ids[:, 1:]]
            return begins
        before, after = self._last[ids[:, :-1]], self._first[ids[:, 1:]]
        begins[:, 1:] = (before != after) | (after == _SPACE) | (after == _ALONE)
        return begins


def _text(tokenizer: Tokenizer, id_: int) -> str:
    token = tokenizer.id_to_token(id_) or ""
    if tokenizer.kind == "byte-bpe" or (len(token) == 6 and token.startswith("<0x")):
        return tokenizer.decode([id_])
    return "".join(_SPACES.get(character, character) for character in token)


def _kind(character: str) -> int:
    if not character:
        return _ALONE
    if character == _UNFINISHED:
        return _BYTES
    if character.isspace():
        return _SPACE
    if any(first <= ord(character) <= last for first, last in _IDEOGRAPHS):
        return _ALONE
    return _LETTER if character.isalnum() or unicodedata.category(character).startswith("M") else _MARK
