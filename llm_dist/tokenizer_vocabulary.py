"""Learn a vocabulary of each kind from spans of text; the result is always a `tokenizers` runtime.

sentencepiece vocabularies are written with real spaces instead of its U+2581, so that no normaliser stands between
text and ids: a U+2581 in a text is a character like any other, and every text survives the way there and back.
This room knows nothing of files, sampling and reports.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from llm_dist.errors import UserError
from llm_dist.tokenizer import KINDS, SPECIAL_TOKENS, UNKNOWN

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Runtime

CHARACTER_COVERAGE = 0.9995
"""Share of the text's characters that get a token of their own; rarer ones fall back to bytes or `<|unk|>`."""

BYTE_PIECES = tuple(f"<0x{byte:02X}>" for byte in range(256))
NUM_FIXED = len(SPECIAL_TOKENS) + len(BYTE_PIECES)
RESERVED_BY_SENTENCEPIECE = "\0\t\u2581\u2585"
"""NUL and U+2585 make it drop a sentence; tab and U+2581 are its own marks. Left to byte fallback."""
SPACE_MARK = "\u2581"
NO_TEXT = "the corpus holds no text to train a tokenizer on; name inputs that do"

_BORDER = rf"[\r\n{RESERVED_BY_SENTENCEPIECE}]"
_INSIDE = rf"[^\r\n{RESERVED_BY_SENTENCEPIECE}]"
# Line breaks lead a line, so that they are learnt; its length stays below the 4192 bytes above which sentencepiece
# drops a sentence without a word, cut before a space where there is one.
LINE = re.compile(rf"[\r\n]*(?:{_INSIDE}{{1,1000}}(?= |{_BORDER}|\Z)|{_INSIDE}{{1,1000}})")

BYTE_BPE_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""GPT-4's pattern with combining marks kept in their word; no possessive quantifiers, so tiktoken runs it too."""


def learn(kind: str, spans: Sequence[str], vocabulary_tokens: int, lowercase: bool = False) -> Runtime:
    """A runtime with exactly `vocabulary_tokens` tokens; equal spans give an equal runtime.

    Raises:
        UserError: no text, too small a vocabulary, or one larger than the text can fill.
    """
    if not any(span.strip() for span in spans):
        raise UserError(NO_TEXT)
    if kind == "byte-bpe":
        return _learn_byte_bpe(spans, vocabulary_tokens)
    if kind == "wordpiece":
        return _learn_wordpiece(spans, vocabulary_tokens, lowercase)
    return from_sentencepiece(kind, train_sentencepiece(kind, spans, vocabulary_tokens))


def check_request(kind: str, vocabulary_tokens: int, lowercase: bool) -> None:
    """Refuse what no text could make possible."""
    if kind not in KINDS:
        raise UserError(f"tokenizer type {kind!r} is unknown; choose one of {', '.join(KINDS)}")
    if lowercase and kind != "wordpiece":
        raise UserError(f"lower-casing loses text, which only wordpiece may; drop it or choose wordpiece, not {kind}")
    minimum = len(SPECIAL_TOKENS) + 1 if kind == "wordpiece" else NUM_FIXED
    if vocabulary_tokens < minimum:
        raise _too_small(kind, vocabulary_tokens, minimum)


def train_sentencepiece(kind: str, spans: Sequence[str], vocabulary_tokens: int) -> bytes:
    """A sentencepiece model, which knows one of our special tokens: the unknown one."""
    import sentencepiece

    model = io.BytesIO()
    ours_only = len(SPECIAL_TOKENS) - 1  # sentencepiece counts the unknown token only
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for span in spans for line in LINE.findall(span)),
            model_writer=model,
            model_type=kind,
            vocab_size=vocabulary_tokens - ours_only,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            character_coverage=CHARACTER_COVERAGE,
            train_extremely_large_corpus=sum(map(len, spans)) > 1 << 30,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            unk_id=0,
            unk_piece=UNKNOWN,
            num_threads=16,  # decides how sums are rounded, so never the number of cores
            minloglevel=5,
        )
    except RuntimeError as error:
        raise _translated(str(error), kind, vocabulary_tokens, ours_only) from None
    return model.getvalue()


def _translated(message: str, kind: str, vocabulary_tokens: int, ours_only: int) -> Exception:
    if too_small := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return _too_small(kind, vocabulary_tokens, int(too_small[1]) + ours_only)
    if too_large := re.search(r"set it to a value <= (\d+)", message):
        return _too_large(kind, vocabulary_tokens, int(too_large[1]) + ours_only)
    if "sentences_.empty()" in message:
        return UserError(NO_TEXT)
    return RuntimeError(message)


def from_sentencepiece(kind: str, model: bytes) -> Runtime:
    """The same vocabulary in `tokenizers`: specials, 256 byte pieces, then the trained pieces with real spaces."""
    import sentencepiece
    from tokenizers import Regex, decoders, models, pre_tokenizers

    source = sentencepiece.SentencePieceProcessor(model_proto=model)
    trained = [
        (source.id_to_piece(id_).replace(SPACE_MARK, " "), source.get_score(id_))
        for id_ in range(source.get_piece_size())
        if not (source.is_unknown(id_) or source.is_byte(id_))
    ]
    pieces = [(token, 0.0) for token in (*SPECIAL_TOKENS, *BYTE_PIECES)] + trained
    ids = {piece: id_ for id_, (piece, _) in enumerate(pieces)}
    assert len(ids) == len(pieces)
    # A piece has spaces and line breaks in front only, so these borders change no id; they make encoding linear.
    splits = [pre_tokenizers.Split(Regex(r"[\r\n]+| +"), "merged_with_next")]
    if kind == "bpe":
        merges = _merges([piece for piece, _ in trained], ids)
        bpe = models.BPE(ids, merges, unk_token=UNKNOWN, byte_fallback=True, fuse_unk=False)
        return _assemble(bpe, None, splits, decoders.ByteFallback())
    # Unigram looks every string of its vocabulary up in the text, also "<0x0A>" and "<|pad|>": part their brackets.
    names = "|".join(re.escape(token[2:-2]) for token in SPECIAL_TOKENS)
    splits.insert(0, pre_tokenizers.Split(Regex(rf"<(?=0x[0-9A-F]{{2}}>|\|(?:{names})\|>)"), "merged_with_previous"))
    unigram = models.Unigram(pieces, unk_id=ids[UNKNOWN], byte_fallback=True)
    return _assemble(unigram, None, splits, decoders.ByteFallback())


def _merges(pieces: Sequence[str], ids: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, by rank of the third: sentencepiece's rule for merging."""
    merges = []
    for piece in pieces:
        joins = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [(left, right) for left, right in joins if left in ids and right in ids]
        merges += sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return merges


def _learn_byte_bpe(spans: Sequence[str], vocabulary_tokens: int) -> Runtime:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    splits = [
        pre_tokenizers.Split(Regex(BYTE_BPE_SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    blank = Tokenizer(models.BPE())
    blank.pre_tokenizer = pre_tokenizers.Sequence(splits)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_tokens,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    blank.train_from_iterator(spans, trainer)
    if blank.get_vocab_size() < vocabulary_tokens:
        raise _too_large("byte-bpe", vocabulary_tokens, blank.get_vocab_size())
    return _assemble(blank.model, None, splits, decoders.ByteLevel())


def _learn_wordpiece(spans: Sequence[str], vocabulary_tokens: int, lowercase: bool) -> Runtime:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    blank = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    normalizer = blank.normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=lowercase)
    splitter = blank.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    first, continuing = _wordpiece_alphabet(normalizer.normalize_str(span) for span in spans)
    # Given beforehand, because the trainer would number what it meets in the order of a hash table.
    given = [*SPECIAL_TOKENS, *(f"##{character}" for character in continuing)]
    if vocabulary_tokens < len(given) + len(first):
        raise _too_small("wordpiece", vocabulary_tokens, len(given) + len(first))
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocabulary_tokens,
        min_frequency=2,
        special_tokens=given,
        initial_alphabet=first,
        limit_alphabet=len(first),
        show_progress=False,
    )
    blank.train_from_iterator(spans, trainer)
    if blank.get_vocab_size() < vocabulary_tokens:
        raise _too_large("wordpiece", vocabulary_tokens, blank.get_vocab_size())
    return _assemble(blank.model, normalizer, [splitter], decoders.WordPiece())


def _wordpiece_alphabet(spans: Iterable[str]) -> tuple[list[str], list[str]]:
    """Characters that cover the text, and those of them that also stand inside words."""
    counts: Counter[str] = Counter()
    inside: set[str] = set()
    for span in spans:
        counts.update("".join(span.split()))
        inside.update(re.findall(r"(?<=\S)\S", span))
    uncovered = (1 - CHARACTER_COVERAGE) * counts.total()
    for character, count in sorted(counts.items(), key=lambda item: (item[1], item[0])):
        uncovered -= count
        if uncovered < 0:
            break
        del counts[character]
    return sorted(counts), sorted(inside & counts.keys())


def _assemble(model: Any, normalizer: Any, splits: Sequence[Any], decoder: Any) -> Runtime:
    from tokenizers import AddedToken, Tokenizer, pre_tokenizers

    runtime = Tokenizer(model)
    if normalizer is not None:
        runtime.normalizer = normalizer
    runtime.pre_tokenizer = pre_tokenizers.Sequence(list(splits))
    runtime.decoder = decoder
    runtime.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    assert [runtime.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))
    return runtime


def _too_small(kind: str, vocabulary_tokens: int, minimum: int) -> UserError:
    return UserError(
        f"a vocabulary of {vocabulary_tokens} tokens is too small for {kind}: special tokens, bytes and characters "
        f"of this text need at least {minimum}"
    )


def _too_large(kind: str, vocabulary_tokens: int, maximum: int) -> UserError:
    return UserError(
        f"a vocabulary of {vocabulary_tokens} tokens is larger than this text allows with {kind}: at most {maximum}; "
        "ask for fewer or give more text"
    )
