"""Make a tokenizer folder from texts: sample, learn, measure, publish.

The sample bounds the memory and is a pure function of texts and seed; the folder appears in one rename.
This room knows nothing of files of text, shards, models or torch.
"""

from __future__ import annotations

import heapq
import json
import os
import random
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llm_dist.errors import UserError
from llm_dist.tokenizer import (
    CLS,
    DEFINITION_FILE,
    DESCRIPTION_FILE,
    HUGGING_FACE_FILE,
    MASK,
    PAD,
    SEP,
    SEPARATOR,
    SPECIAL_TOKENS,
    UNKNOWN,
    VERSION,
    Tokenizer,
    fingerprint_of,
    load,
    read_description,
)
from llm_dist.tokenizer_vocabulary import BYTE_PIECES, check_request, learn

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Runtime

SAMPLE_BYTES = 1_000_000_000
MEASURED_BYTES = 1_000_000
SPAN_CHARACTERS = 1 << 16
"""Longer documents are sampled in spans of this length, so that one of them cannot fill the sample."""


@dataclass(frozen=True)
class Report:
    """What was trained and how well it fits its own sample (at most 1 MB of it is measured)."""

    kind: str
    vocabulary_tokens: int
    sample_bytes: int
    """UTF-8 bytes that were trained on."""
    sample_documents: int
    """Documents of which something was trained on."""
    bytes_per_token: float
    fertility: float
    """Tokens per word, words being what whitespace separates."""
    fallback_share: float
    """Share of tokens that are no text by themselves: byte fallback, parts of a character, `<|unk|>`."""
    fingerprint: str


class Sample(NamedTuple):
    """A uniform sample of the texts' spans, in reading order."""

    spans: list[str]
    num_documents: int
    num_bytes: int
    measured: list[str]
    """A uniform sample of the sample."""


def train(
    texts: Iterable[str],
    kind: str,
    vocabulary_tokens: int,
    out: str | Path,
    *,
    sample_bytes: int = SAMPLE_BYTES,
    seed: int = 0,
    lowercase: bool = False,
) -> Report:
    """Train a tokenizer and publish its folder `out` in one rename; equal input gives equal bytes.

    Args:
        texts: the documents, read once; memory holds a few times `sample_bytes` of them.
        kind: one of `tokenizer.KINDS`.
        vocabulary_tokens: size of the vocabulary with special tokens and bytes; met exactly.
        out: the folder; it may exist when it is empty or holds this very tokenizer.
        sample_bytes: UTF-8 bytes to train on at most, a uniform sample of the texts.
        seed: of the sample.
        lowercase: wordpiece only: lower-case and strip accents.

    Raises:
        UserError: unknown kind, no text, a vocabulary the text cannot fill or that is too small, `out` is taken.
    """
    out = Path(out)
    check_request(kind, vocabulary_tokens, lowercase)
    _check_free(out, kind, vocabulary_tokens)
    sample = draw_sample(texts, sample_bytes, seed)
    runtime = learn(kind, sample.spans, vocabulary_tokens, lowercase)
    fingerprint = fingerprint_of(json.loads(runtime.to_str()), kind)
    report = _measure(Tokenizer(runtime, kind, fingerprint, out), sample)
    _publish(runtime, report, out)
    return report


def draw_sample(texts: Iterable[str], sample_bytes: int, seed: int = 0) -> Sample:
    """Keep the spans with the smallest random keys that fit into `sample_bytes` (at least one span)."""
    keys = random.Random(seed)
    kept: list[tuple[float, int, int, bytes]] = []
    num_bytes = position = 0
    for document, text in enumerate(texts):
        for span in _spans(text):
            data = span.encode("utf-8", errors="replace")
            heapq.heappush(kept, (-keys.random(), position, document, data))
            position += 1
            num_bytes += len(data)
            while num_bytes > sample_bytes and len(kept) > 1:
                num_bytes -= len(heapq.heappop(kept)[-1])
    measured: list[str] = []
    measured_bytes = 0
    for *_, data in sorted(kept, reverse=True):
        if measured and measured_bytes + len(data) > MEASURED_BYTES:
            break
        measured.append(data.decode())
        measured_bytes += len(data)
    kept.sort(key=lambda entry: entry[1])
    num_documents = len({document for _, _, document, _ in kept})
    return Sample([data.decode() for *_, data in kept], num_documents, num_bytes, measured)


def _spans(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > SPAN_CHARACTERS:
        line_break = text.rfind("\n", start + 1, start + SPAN_CHARACTERS)
        end = line_break if line_break > 0 else start + SPAN_CHARACTERS
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def _measure(tokenizer: Tokenizer, sample: Sample) -> Report:
    token_ids = [id_ for ids in tokenizer.encode_batch(sample.measured) for id_ in ids]
    num_tokens = max(1, len(token_ids))  # what is measured of a corpus of blanks can be blank
    num_words = max(1, sum(len(span.split()) for span in sample.measured))
    fallback = {id_ for id_ in set(token_ids) if _is_fallback(tokenizer, id_)}
    return Report(
        kind=tokenizer.kind,
        vocabulary_tokens=tokenizer.vocabulary_tokens,
        sample_bytes=sample.num_bytes,
        sample_documents=sample.num_documents,
        bytes_per_token=sum(len(span.encode()) for span in sample.measured) / num_tokens,
        fertility=len(token_ids) / num_words,
        fallback_share=sum(id_ in fallback for id_ in token_ids) / num_tokens,
        fingerprint=tokenizer.fingerprint,
    )


def _is_fallback(tokenizer: Tokenizer, id_: int) -> bool:
    return tokenizer.id_to_token(id_) in (UNKNOWN, *BYTE_PIECES) or "\ufffd" in tokenizer.decode([id_])


def _check_free(out: Path, kind: str, vocabulary_tokens: int) -> None:
    """Refuse early what `_publish` would refuse after the training."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / DESCRIPTION_FILE).is_file():
        raise UserError(f"{out} exists and is no tokenizer folder; choose another one or remove it")
    there = read_description(out)
    if (there["kind"], there["report"]["vocabulary_tokens"]) != (kind, vocabulary_tokens):
        raise _taken(out)


def _taken(out: Path) -> UserError:
    return UserError(f"{out} already holds another tokenizer; choose another folder or remove that one")


def _publish(runtime: Runtime, report: Report, out: Path) -> None:
    if (out / DESCRIPTION_FILE).is_file():
        if load(out).fingerprint != report.fingerprint:
            raise _taken(out)
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    partial.mkdir()
    try:
        runtime.save(str(partial / DEFINITION_FILE), pretty=False)
        _write_json(partial / HUGGING_FACE_FILE, _hugging_face_config())
        description = {"version": VERSION, "kind": report.kind, "fingerprint": report.fingerprint}
        _write_json(partial / DESCRIPTION_FILE, {**description, "report": asdict(report)})
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _hugging_face_config() -> dict[str, Any]:
    """What AutoTokenizer needs to give the same ids: it adds nothing and reads no special token out of a text."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SEPARATOR,
        "eos_token": SEPARATOR,
        "unk_token": UNKNOWN,
        "pad_token": PAD,
        "cls_token": CLS,
        "sep_token": SEP,
        "mask_token": MASK,
        "additional_special_tokens": list(SPECIAL_TOKENS[6:]),
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "add_eos_token": False,
        "model_max_length": 10**30,
    }


def _write_json(path: Path, table: dict[str, Any]) -> None:
    path.write_text(json.dumps(table, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
