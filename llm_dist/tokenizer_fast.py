"""Encode a byte-level BPE with `tiktoken`, several times faster, where that is proved to give the very same ids.

Three proofs, each able to say no: of the vocabulary, of what the words' pattern takes for letters, numbers and spaces
(two regular-expression engines may know different editions of Unicode), and on a sample of the very text. Whatever is
not proved is encoded by `tokenizers`. Knows nothing of files of text and shards.

Why the vocabulary can be proved: `tokenizers` joins the pair with the first merge rule, tiktoken the pair whose joined
bytes have the lowest id. With one rule per token, in order of ids, they part at the earliest where neighbours x, y have
no rule but xy is a token. What has been joined inside the bytes of xy up to there are the very joins of xy encoded
alone, in the same order. So if xy alone becomes one token, by its one rule, x and y never meet. Hence: if every token,
alone, encodes to itself, all ids are equal.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_dist.tokenizer import DEFINITION_FILE, SPECIAL_TOKENS, Tokenizer, load
from llm_dist.tokenizer_vocabulary import BYTE_BPE_SPLIT

if TYPE_CHECKING:
    import tiktoken

CLASSES = (r"[\p{L}\p{M}]", r"\p{N}", r"\s", "(?i:[stremvld])")
"""What BYTE_BPE_SPLIT asks of a character."""
MISSING = "tiktoken is not installed; pip install 'llm_dist[fast]' to encode several times faster"

_NUM_BYTES = 256
_NUM_SPECIAL = len(SPECIAL_TOKENS)
_ASSIGNED = ((0, 0xD800), (0xE000, 0x32400), (0xE0000, 0xE0200))
"""Characters outside are unassigned or of private use in every edition of Unicode."""
_LONGEST_CHARACTERS = 1 << 17
"""Inside one run of a million spaces tiktoken's pattern overflows its stack; so long a text goes the slow way."""


class FastTokenizer(Tokenizer):
    """A `Tokenizer` that encodes with tiktoken, in the calling thread; all else stays as it is."""

    def __init__(self, slow: Tokenizer) -> None:
        super().__init__(slow._runtime, slow.kind, slow.fingerprint, slow.folder)
        self._encoding = _tiktoken(BYTE_BPE_SPLIT, _ranks(_definition(slow.folder)["model"]["vocab"]))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text; what looks like a special token is text."""
        slow = super().encode_batch
        return [
            self._encoding.encode_ordinary(text) if len(text) <= _LONGEST_CHARACTERS else slow([text])[0]
            for text in texts
        ]


def load_fast(folder: str | Path) -> FastTokenizer:
    """Open a tokenizer folder for which `proved` has given a fast tokenizer; it is not proved again."""
    return FastTokenizer(load(folder))


def proved(slow: Tokenizer, sample: Sequence[str]) -> FastTokenizer | str:
    """A fast tokenizer with the ids of `slow`, or in one line why there is none; `sample` is text to be encoded."""
    if slow.kind != "byte-bpe":
        return f"tiktoken does not know {slow.kind}"
    try:
        import tiktoken  # noqa: F401 (asked for in time to say that it is missing)
    except ImportError:
        return MISSING
    if mistake := _vocabulary_mistake(slow):
        return f"tiktoken would differ: {mistake}"
    for characters in CLASSES:
        if differing := _differing(characters):
            return f"tiktoken would differ: it reads U+{ord(min(differing)):04X} otherwise in {characters}"
    fast = FastTokenizer(slow)
    if fast.encode_batch(sample) != slow.encode_batch(sample):
        return "tiktoken differs on a sample of the text"
    return fast


def _vocabulary_mistake(tokenizer: Tokenizer) -> str | None:
    """Why tiktoken may join bytes otherwise; None when it cannot."""
    definition = _definition(tokenizer.folder)
    model, splits = definition["model"], definition["pre_tokenizer"]["pretokenizers"]
    if definition["normalizer"] or splits[0].get("pattern") != {"Regex": BYTE_BPE_SPLIT} or len(splits) != 2:
        return "text is not split by the pattern of this version"
    if model.get("dropout") or model.get("ignore_merges") or model.get("byte_fallback"):
        return "merges are not the only rule"
    joined = [model["vocab"].get(left + right) for left, right in model["merges"]]
    first = _NUM_SPECIAL + _NUM_BYTES
    if joined != list(range(first, tokenizer.vocabulary_tokens)):
        return "tokens are not numbered as they were merged"
    alone = tokenizer._runtime.model.tokenize
    unstable = next((token for token, id_ in model["vocab"].items() if id_ >= first and len(alone(token)) > 1), None)
    return None if unstable is None else f"{unstable!r} is no single token when it stands alone"


@cache
def _differing(characters: str) -> set[str]:
    """Characters that belong to a class in one of the two engines only."""
    from tokenizers import Regex, normalizers

    every = "".join(chr(code) for first, end in _ASSIGNED for code in range(first, end))
    single_bytes = {bytes([byte]): byte for byte in range(_NUM_BYTES)}
    # What a pattern does not match, tiktoken leaves out.
    ours = bytes(_tiktoken(characters, single_bytes).encode_ordinary(every)).decode()
    not_theirs = normalizers.Replace(Regex(characters), "").normalize_str(every)
    return set(ours) ^ (set(every) - set(not_theirs))


def _tiktoken(pattern: str, ranks: dict[bytes, int]) -> tiktoken.Encoding:
    import tiktoken

    return tiktoken.Encoding("llm_dist", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


def _ranks(vocabulary: dict[str, int]) -> dict[bytes, int]:
    """Bytes of each token -> its id, without the special ones."""
    byte_of = dict(_bytes_by_letter())
    return {bytes(byte_of[letter] for letter in token): id_ for token, id_ in vocabulary.items() if id_ >= _NUM_SPECIAL}


def _bytes_by_letter() -> Iterator[tuple[str, int]]:
    """How byte-level vocabularies write bytes: printable Latin-1 as itself, the others from U+0100 on (GPT-2)."""
    next_code = 1 << 8
    for byte in range(_NUM_BYTES):
        if 33 <= byte <= 126 or 161 <= byte <= 172 or byte >= 174:
            yield chr(byte), byte
        else:
            yield chr(next_code), byte
            next_code += 1


def _definition(folder: Path) -> dict[str, Any]:
    definition: dict[str, Any] = json.loads((folder / DEFINITION_FILE).read_text(encoding="utf-8"))
    return definition
