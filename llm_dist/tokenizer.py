"""Text to token ids and back: one runtime (`tokenizers`) for every kind of vocabulary.

A tokenizer is a folder: `tokenizer.json` (all that decides ids), `tokenizer_config.json` (so that
`transformers.AutoTokenizer` gives the same ids with no code of ours) and `llm_dist_tokenizer.json` (kind, version,
fingerprint, report). This room reads such folders; it knows nothing of corpora, shards, models or torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llm_dist.errors import UserError

if TYPE_CHECKING:
    import tokenizers

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|pad|>",
    "<|unk|>",
    "<|cls|>",
    "<|sep|>",
    "<|mask|>",
    "<|im_start|>",
    "<|im_end|>",
)
"""Ids 0..7 of every tokenizer made here; no text encodes to them. One that was imported has other ids for them."""
SEPARATOR, PAD, UNKNOWN, CLS, SEP, MASK = SPECIAL_TOKENS[:6]

LOSSLESS_KINDS = ("bpe", "unigram", "byte-bpe")
"""decode(encode(text)) == text for any Unicode text."""
KINDS = (*LOSSLESS_KINDS, "wordpiece")
IMPORTED = "imported"
"""The kind of a tokenizer that was not made here."""

VERSION = 1
DEFINITION_FILE = "tokenizer.json"
HUGGING_FACE_FILE = "tokenizer_config.json"
DESCRIPTION_FILE = "llm_dist_tokenizer.json"
FILES = (DEFINITION_FILE, HUGGING_FACE_FILE, DESCRIPTION_FILE)


class Roles(NamedTuple):
    """What an imported tokenizer's tokens are for."""

    special_ids: dict[str, int]
    """Token of `SPECIAL_TOKENS` -> the id that has its role."""
    end_ids: tuple[int, ...]
    """What ends a text."""
    vocabulary_tokens: int
    """Ids that the checkpoint has rows for; at least those of the tokenizer."""


class Tokenizer:
    """Text <-> ids. Safe to share between threads; worker processes load their own from `folder`."""

    def __init__(
        self, runtime: tokenizers.Tokenizer, kind: str, fingerprint: str, folder: Path, roles: Roles | None = None
    ) -> None:
        if roles is not None:
            runtime.no_truncation()
            runtime.no_padding()
        # Without this, text that looks like a special token would become one.
        runtime.encode_special_tokens = True
        self._runtime = runtime
        self.kind = kind
        self.fingerprint = fingerprint
        """sha256 (hex) of all that decides ids."""
        self.folder = folder
        ours = {token: id_ for id_, token in enumerate(SPECIAL_TOKENS)}
        self.vocabulary_tokens: int = (
            runtime.get_vocab_size(with_added_tokens=True) if roles is None else roles.vocabulary_tokens
        )
        self.special_ids = ours if roles is None else roles.special_ids
        """An imported tokenizer may lack `MASK` and the tokens of chats; the others all have an id."""
        self.separator_id = self.special_ids[SEPARATOR]
        self.end_ids = frozenset({self.separator_id} if roles is None else roles.end_ids)
        """What ends a text."""
        self.pad_id = self.special_ids[PAD]

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; special tokens are neither added nor read out of the text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, in parallel threads unless TOKENIZERS_PARALLELISM=false."""
        encodings = self._runtime.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; special and unknown ids are left out, bytes that are no UTF-8 become U+FFFD."""
        return str(self._runtime.decode(list(ids), skip_special_tokens=True))

    def id_to_token(self, id_: int) -> str | None:
        """The token as the vocabulary writes it, for display; None past the vocabulary."""
        return self._runtime.id_to_token(id_)

    def vocabulary(self) -> dict[str, int]:
        """Every token, as the vocabulary writes it, and its id."""
        return dict(self._runtime.get_vocab(with_added_tokens=True))


def load(folder: str | Path) -> Tokenizer:
    """Open a tokenizer folder and verify its fingerprint.

    Raises:
        UserError: a file is missing, is broken, or was changed after training.
    """
    from tokenizers import Tokenizer as Runtime

    folder = Path(folder)
    description = read_description(folder)
    definition = _read_table(folder, DEFINITION_FILE)
    kind, expected, roles = description["kind"], description["fingerprint"], roles_of(description)
    found = fingerprint_of(definition, kind, roles)
    if found != expected:
        raise UserError(
            f"{folder}: {DEFINITION_FILE} has fingerprint {found[:12]}, {DESCRIPTION_FILE} names {expected[:12]}: "
            "it was changed after training; restore it or train it again"
        )
    return Tokenizer(Runtime.from_file(str(folder / DEFINITION_FILE)), kind, found, folder, roles)


def read_description(folder: Path) -> dict[str, Any]:
    """Kind, version, fingerprint and report of a tokenizer folder, after checking that it is one."""
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{folder} is not a tokenizer folder: it has no {', no '.join(missing)}; "
            "make one with `llm-dist tokenizer train`"
        )
    description = _read_table(folder, DESCRIPTION_FILE)
    if lacking := {"kind", "version", "fingerprint", "report"} - description.keys():
        raise UserError(f"{folder}: {DESCRIPTION_FILE} lacks {', '.join(sorted(lacking))}; train the tokenizer again")
    if description["version"] != VERSION:
        raise UserError(
            f"{folder}: tokenizer version {description['version']}, this llm_dist reads version {VERSION}; "
            "use the llm_dist that made it"
        )
    return description


def roles_of(description: dict[str, Any]) -> Roles | None:
    """What the description of an imported tokenizer says of its tokens; None for one that was made here."""
    if description["kind"] != IMPORTED:
        return None
    return Roles(description["special_ids"], tuple(description["end_ids"]), description["report"]["vocabulary_tokens"])


def fingerprint_of(definition: dict[str, Any], kind: str, roles: Roles | None = None) -> str:
    """Sha256 (hex) over the parsed tokenizer.json, kind, version and roles: indifferent to whitespace and key order."""
    content = {"definition": definition, "kind": kind, "version": VERSION}
    content |= {} if roles is None else roles._asdict()
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def _read_table(folder: Path, name: str) -> dict[str, Any]:
    try:
        table = json.loads((folder / name).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{folder}: {name} is not JSON ({error}); restore it or train the tokenizer again") from None
    if not isinstance(table, dict):
        raise UserError(f"{folder}: {name} holds no table; restore it or train the tokenizer again")
    return table
