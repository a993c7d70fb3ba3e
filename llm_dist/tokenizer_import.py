"""Make a tokenizer folder of ours from a Hugging Face folder: the same ids, and which of them have which role.

`tokenizer.json` is used as it is. Older vocabularies become one through `transformers`, which only they need.
This room knows nothing of shards, models or torch.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_dist.errors import UserError
from llm_dist.tokenizer import (
    CLS,
    DEFINITION_FILE,
    DESCRIPTION_FILE,
    FILES,
    HUGGING_FACE_FILE,
    IMPORTED,
    MASK,
    PAD,
    SEP,
    SEPARATOR,
    SPECIAL_TOKENS,
    UNKNOWN,
    VERSION,
    Roles,
    fingerprint_of,
    load,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Runtime

SLOW_FILES = ("vocab.txt", "vocab.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
"""Vocabularies that `transformers` turns into a tokenizer.json."""

_ROLES = ("bos_token", "eos_token", "cls_token", "sep_token", "pad_token", "unk_token", "mask_token")
_USUAL = {
    "bos_token": ("<s>", "<|begin_of_text|>"),
    "eos_token": ("</s>", "<|endoftext|>", "<|end_of_text|>"),
    "cls_token": ("[CLS]",),
    "sep_token": ("[SEP]",),
    "pad_token": ("[PAD]", "<pad>"),
    "unk_token": ("[UNK]", "<unk>"),
    "mask_token": ("[MASK]", "<mask>"),
}
"""Asked for in a folder that names no roles at all."""


@dataclass(frozen=True)
class Imported:
    """What was imported."""

    kind: str
    vocabulary_tokens: int
    fingerprint: str


def has_tokenizer(source: Path) -> bool:
    """Whether a Hugging Face folder holds a tokenizer of any kind."""
    return any((source / name).is_file() for name in (DEFINITION_FILE, *SLOW_FILES))


def import_tokenizer(source: Path, out: Path) -> Imported:
    """Publish the tokenizer of a Hugging Face folder as the tokenizer folder `out`, in one rename.

    A folder that an export of ours made holds the tokenizer it was trained with, which stays that very tokenizer.

    Raises:
        UserError: there is no tokenizer, it does not fit the checkpoint beside it, or `out` is taken.
    """
    if not has_tokenizer(source):
        raise UserError(f"{source} has no tokenizer: neither {DEFINITION_FILE} nor {', '.join(SLOW_FILES)}")
    _require_free(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    partial.mkdir()
    try:
        imported = _copy(source, partial) if (source / DESCRIPTION_FILE).is_file() else _convert(source, partial)
        if (out / DESCRIPTION_FILE).is_file():
            if load(out).fingerprint != imported.fingerprint:
                raise UserError(f"{out} already holds another tokenizer; choose another folder or remove that one")
        else:
            partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return imported


def _require_free(out: Path) -> None:
    if out.exists() and not (out / DESCRIPTION_FILE).is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists and is no tokenizer folder; choose another one or remove it")


def _copy(source: Path, partial: Path) -> Imported:
    for name in FILES:
        shutil.copyfile(source / name, partial / name)
    tokenizer = load(partial)
    _require_rows(source, tokenizer.vocabulary_tokens)
    return Imported(tokenizer.kind, tokenizer.vocabulary_tokens, tokenizer.fingerprint)


def _convert(source: Path, partial: Path) -> Imported:
    from tokenizers import Tokenizer as Runtime

    if (source / DEFINITION_FILE).is_file():
        shutil.copyfile(source / DEFINITION_FILE, partial / DEFINITION_FILE)
        keys = _table(source / HUGGING_FACE_FILE)
    else:
        keys = _made_fast(source, partial)
    try:
        runtime = Runtime.from_file(str(partial / DEFINITION_FILE))
    except Exception as error:  # noqa: BLE001  `tokenizers` raises nothing narrower
        raise UserError(f"{source / DEFINITION_FILE} cannot be read ({error}); fetch it again") from None
    keys = _table(source / "special_tokens_map.json") | keys
    template = source / "chat_template.jinja"
    if template.is_file():
        keys["chat_template"] = template.read_text(encoding="utf-8")  # as transformers does: it counts before the key
    roles = _roles(source, runtime, keys)
    definition = json.loads((partial / DEFINITION_FILE).read_text(encoding="utf-8"))
    imported = Imported(IMPORTED, roles.vocabulary_tokens, fingerprint_of(definition, IMPORTED, roles))
    keys.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    _write(partial / HUGGING_FACE_FILE, keys)
    description = {"version": VERSION, "kind": IMPORTED, "fingerprint": imported.fingerprint}
    described = {"special_ids": roles.special_ids, "end_ids": list(roles.end_ids), "report": asdict(imported)}
    _write(partial / DESCRIPTION_FILE, description | described)
    return imported


def _made_fast(source: Path, partial: Path) -> dict[str, Any]:
    """Let `transformers` write a tokenizer.json; returns the keys of its tokenizer_config.json."""
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise UserError(
            f"{source} has no {DEFINITION_FILE}; to make one of its older vocabulary, pip install 'llm_dist[hf]'"
        ) from None
    try:
        fast = AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
        backend = fast.backend_tokenizer
    except Exception as error:  # noqa: BLE001  whatever its many readers raise
        words = " ".join(str(error).split())
        raise UserError(f"{source}: transformers cannot make a {DEFINITION_FILE} of it: {words[:200]}") from None
    backend.save(str(partial / DEFINITION_FILE), pretty=False)
    roles = {role: str(getattr(fast, role)) for role in _ROLES if getattr(fast, role, None) is not None}
    return roles | _table(source / HUGGING_FACE_FILE)


def _roles(source: Path, runtime: Runtime, keys: Mapping[str, Any]) -> Roles:
    named = {role: _content(keys.get(role)) for role in _ROLES}
    if not any(named.values()):
        named = {
            role: next((t for t in usual if runtime.token_to_id(t) is not None), None) for role, usual in _USUAL.items()
        }
    ids = {role: runtime.token_to_id(token) for role, token in named.items() if token is not None}
    bos, eos, cls, sep, pad, unknown, mask = map(ids.get, _ROLES)
    separator = _first(bos, eos, sep)
    if separator is None:
        raise UserError(
            f"{source}: its tokenizer names no token that begins or ends a text (bos_token, eos_token, sep_token)"
        )
    special = {
        SEPARATOR: separator,
        PAD: _first(pad, separator),
        UNKNOWN: _first(unknown, separator),
        CLS: _first(cls, separator),
        SEP: _first(sep, eos, separator),
        MASK: mask,
        **{token: runtime.token_to_id(token) for token in SPECIAL_TOKENS[6:]},
    }
    known = {token: id_ for token, id_ in special.items() if id_ is not None}
    num_rows = _require_rows(source, 1 + max(runtime.get_vocab(with_added_tokens=True).values()))
    ends = {separator, *([] if eos is None else [eos]), *_generation_ends(source)}
    return Roles(known, tuple(sorted(id_ for id_ in ends if id_ < num_rows)), num_rows)


def _first(*ids: int | None) -> int | None:
    return next((id_ for id_ in ids if id_ is not None), None)


def _content(token: Any) -> str | None:
    """A token is written as itself or as a table."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _generation_ends(source: Path) -> list[int]:
    ends = _table(source / "generation_config.json").get("eos_token_id")
    return [ends] if isinstance(ends, int) else list(ends or [])


def _require_rows(source: Path, num_ids: int) -> int:
    """Rows that the checkpoint beside the tokenizer has for its ids; as many as there are ids where there is none."""
    rows = _table(source / "config.json").get("vocab_size")
    if not isinstance(rows, int):
        return num_ids
    if rows < num_ids:
        raise UserError(
            f"{source}: the tokenizer does not fit the checkpoint: it has {num_ids} tokens, the checkpoint "
            f"vocab_size={rows}; fetch both from one place"
        )
    return rows


def _table(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON ({error}); fetch it again") from None
    return table if isinstance(table, dict) else {}


def _write(path: Path, table: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(table, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
