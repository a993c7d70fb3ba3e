"""Encode many documents: batches of texts go to worker processes or threads, ids come back in the order of the texts.

Faster than a library alone, and with the same ids: `_KnownWords` asks `tokenizers` for each word once; `_JoinedTexts`
gives `tiktoken` whole batches as one text, with a pattern that never looks ahead. The result depends neither on the
number of workers nor on the pieces in which a very long text is encoded. Knows no files and no shards.
"""

from __future__ import annotations

import os
import re
import signal
import threading
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from llm_dist.data.documents import num_utf8_bytes
from llm_dist.data.folder import DTYPES
from llm_dist.data.shards import dtype_name
from llm_dist.data.spill import Ids, Numbers, gather
from llm_dist.errors import UserError
from llm_dist.tokenizer import KINDS, Tokenizer
from llm_dist.tokenizer_fast import FastTokenizer

BATCH_CHARACTERS = 1 << 20
BATCH_DOCUMENTS = 4096
BATCHES_AHEAD = 3
"""Batches in flight per worker: enough to keep it busy while the reader waits for another."""
MOST_THREADS = 4
"""Workers up to which tiktoken runs in threads, which start at once; more would wait for the interpreter."""

LONG_CHARACTERS = 1 << 16
"""Longer texts are encoded in pieces: the runtime needs more than 100 bytes of memory per character."""
KNOWN_CHARACTERS = 1 << 22
"""Words remembered, in characters, each word costing `_WORD_COST` more: up to a hundred thousand, 30 MB per worker."""
_WORD_COST, _LONGEST_WORD = 24, 64
"""A longer word is hardly met again."""

_LETTER = (
    r"A-Za-zÀ-ÖØ-öø-\u0220\u0250-\u02ad\u1e00-\u1e9b\u1ea0-\u1ef9\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03ce"
    r"\u0400-\u0481\u048a-\u04ce\u04d0-\u04f5\u05d0-\u05ea\u0621-\u063a\u0641-\u064a\u0671-\u06d3\uac00-\ud7a3"
)
"""Letters of scripts that space their words, all in Unicode 3.2: whatever edition Python and tokenizers know."""
_WORD = re.compile(rf"[ \n]?[^ \n]*(?:(?<![{_LETTER}])[ \n][^ \n]*)*")

_END, _CUT, _BLANKS, _MARKS = "\0", "\1", b" \t\v\f", b"\2\3\4\5"
_MARK_OF_BLANK = bytes.maketrans(_BLANKS, _MARKS)
"""A mark stands for a cut and the blank behind it."""
_WIDE = "\x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"
"""White space of more than one byte."""
_WIDE_CODES = np.array([int.from_bytes(character.encode().ljust(3, b"\0")) for character in _WIDE])
_OTHER, _WIDE_LEAD, _LINE, _BLANK = range(4)
_CLASS_BYTES = b"", b"\xc2\xe1\xe2\xe3", b"\r\n\0", _BLANKS
_CLASSES = bytes(max([0, *(n for n, own in enumerate(_CLASS_BYTES) if byte in own)]) for byte in range(256))
_BORDER = re.compile(r"(?<=[^\W\d_])[ \n]")

Load = Callable[[Path], Tokenizer]


class Encoded(NamedTuple):
    """Documents as ids."""

    ids: Ids
    """All documents one after another, each a separator and its tokens; in the stored dtype."""
    num_tokens: Numbers
    """[n]; the separator counts."""
    num_bytes: Numbers
    """[n]; UTF-8 bytes of the texts."""


class Encoder:
    """Encodes batches of texts. One per worker process; threads share it where tiktoken encodes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pieces = _JoinedTexts(tokenizer) if isinstance(tokenizer, FastTokenizer) else _KnownWords(tokenizer)

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Encode one batch."""
        pieces = [list(long_pieces(self._tokenizer.kind, text)) for text in texts]
        encoded = map(self._pieces.encode, _batches(piece for each in pieces for piece in each))
        ids, sizes = (np.concatenate(columns) for columns in zip(*encoded, strict=True))
        assert int(ids.max()) < self._tokenizer.vocabulary_tokens, "an id outside the vocabulary"
        if len(sizes) > len(texts):
            firsts = np.cumsum([0, *map(len, pieces)])[:-1]
            continues = np.ones(len(sizes), np.int64)
            continues[firsts] = 0
            ids = np.delete(ids, (np.cumsum(sizes) - sizes)[continues == 1])
            sizes = np.add.reduceat(sizes - continues, firsts)
        return Encoded(ids, sizes, np.array([num_utf8_bytes(text) for text in texts], np.int64))


class _KnownWords:
    """Encodes with `tokenizers`, which is asked for a word only when it is new.

    A word ends where a letter stands before a space or a line feed. No kind of ours joins the two, so the ids of a text
    are those of its words. A text of another kind is one word.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._dtype = DTYPES[dtype_name(tokenizer.vocabulary_tokens)]
        self._forget()

    def encode(self, texts: Sequence[str]) -> tuple[Ids, Numbers]:
        """Ids of all texts, each behind a separator, and how many of each: [n]."""
        words = [_WORD.findall(text) if self._tokenizer.kind in KINDS else [text] for text in texts]
        unknown = list(set().union(*words).difference(self._known))
        for word, ids in zip(unknown, self._tokenizer.encode_batch(unknown), strict=True):
            self._known[word] = self._bytes(ids)
        separator, ids_of = self._bytes([self._tokenizer.separator_id]), self._known.__getitem__
        contents = [b"".join([separator, *map(ids_of, each)]) for each in words]
        for word in unknown:
            if len(word) > _LONGEST_WORD:
                del self._known[word]
            else:
                self._room -= len(word) + _WORD_COST
        if self._room < 0:
            self._forget()
        sizes = np.array([len(content) for content in contents], np.int64) // self._dtype.itemsize
        return np.frombuffer(b"".join(contents), self._dtype), sizes

    def _bytes(self, ids: list[int]) -> bytes:
        # An array refuses ids that do not fit, where numpy's assignment would wrap them.
        return array("H" if self._dtype.itemsize == 2 else "I", ids).tobytes()

    def _forget(self) -> None:
        self._known = {"": b""}
        self._room = KNOWN_CHARACTERS


class _JoinedTexts:
    """Encodes with tiktoken: a batch at once, with a pattern that runs without backtracking, half as long.

    The words' pattern looks ahead in one place: of white space before a word its last character goes with the word. So
    a batch is cut there, by a special token that is left out afterwards, and the alternative that looks ahead is
    dropped. It would matter only inside white space of several characters (behind its last line break) that something
    follows: there, both patterns now end at the cut. At a text's end they take all white space anyway.
    """

    def __init__(self, tokenizer: FastTokenizer) -> None:
        import tiktoken

        self._tokenizer = tokenizer
        self._dtype = DTYPES[dtype_name(tokenizer.vocabulary_tokens)]
        whole, looks_ahead = tokenizer._encoding, r"|\s+(?!\S)"
        assert whole._pat_str.count(looks_ahead) == 1, "the words' pattern has changed"
        self._special = {_END: tokenizer.separator_id, _CUT: tokenizer.pad_id}
        self._encoding = tiktoken.Encoding(
            "llm_dist_joined",
            pat_str=whole._pat_str.replace(looks_ahead, ""),
            mergeable_ranks=whole._mergeable_ranks,
            special_tokens=self._special,
        )

    def encode(self, texts: Sequence[str]) -> tuple[Ids, Numbers]:
        """Ids of all texts, each behind a separator, and how many of each: [n]."""
        # One character that is not ASCII makes the handling of a whole batch slower, so its kind is joined apart.
        halves = [[text for text in texts if text.isascii() == is_ascii] for is_ascii in (True, False)]
        ids, sizes = self._encode_all(*filter(None, halves))
        places = np.argsort(np.argsort([not text.isascii() for text in texts], kind="stable"))
        return gather(ids, (np.cumsum(sizes) - sizes)[places], sizes[places]), sizes[places]

    def _encode_all(self, *batches: Sequence[str]) -> tuple[Ids, Numbers]:
        ids, sizes = (np.concatenate(columns) for columns in zip(*map(self._encode, batches), strict=True))
        return ids, sizes

    def _encode(self, texts: Sequence[str]) -> tuple[Ids, Numbers]:
        if (joined := _cut(_END + _END.join(texts), len(texts))) is not None:
            found = self._encoding.encode_to_numpy(joined, allowed_special=set(self._special), disallowed_special=())
            ids = found.astype(self._dtype)[found != self._special[_CUT]]
            return ids, np.diff(np.flatnonzero(ids == self._special[_END]), append=len(ids))
        if len(texts) > 1:
            # Few texts cannot be joined: all others are found and joined in the halves without them.
            return self._encode_all(texts[: len(texts) // 2], texts[len(texts) // 2 :])
        ids = np.array([self._tokenizer.separator_id, *self._tokenizer.encode(texts[0])], self._dtype)
        return ids, np.array([len(ids)])


def _cut(joined: str, num_texts: int) -> str | None:
    """A batch with its cuts; None where a text itself holds a mark, or wide white space stands beside other."""
    utf8 = bytearray(joined.encode())
    content, classes = np.frombuffer(utf8, np.uint8), np.frombuffer(utf8.translate(_CLASSES), np.uint8)
    if np.count_nonzero(content <= _MARKS[-1]) != num_texts or _is_wide_beside_space(content, classes):
        return None
    is_blank = classes == _BLANK
    cuts = np.flatnonzero(is_blank[:-2] & is_blank[1:-1] & (classes[2:] <= _WIDE_LEAD)) + 1
    content[cuts] = np.frombuffer(content[cuts].tobytes().translate(_MARK_OF_BLANK), np.uint8)
    for mark, blank in zip(_MARKS, _BLANKS, strict=True):
        if mark in utf8:
            utf8 = utf8.replace(bytes([mark]), bytes([ord(_CUT), blank]))
    return utf8.decode()


def _is_wide_beside_space(content: npt.NDArray[np.uint8], classes: npt.NDArray[np.uint8]) -> bool:
    """Whether white space of several bytes stands beside white space, or a text's border."""
    leads = np.flatnonzero(classes == _WIDE_LEAD)
    first, second, third = (content.take(leads + place, mode="clip").astype(np.int64) for place in range(3))
    is_pair = first == 0xC2
    is_wide = np.isin((first << 16) + (second << 8) + np.where(is_pair, 0, third), _WIDE_CODES)
    starts = leads[is_wide]
    ends = starts + np.where(is_pair[is_wide], 2, 3)
    beside = np.concatenate([classes[starts - 1], classes.take(ends, mode="clip")])
    return bool((beside >= _LINE).any() or (starts[1:] == ends[:-1]).any())


def long_pieces(kind: str, text: str) -> Iterator[str]:
    """Cut a long text where no id changes: our own kinds join no letter with the space or line feed after it."""
    start = 0
    while kind in KINDS and len(text) - start > LONG_CHARACTERS:
        borders = (match.start() for match in _BORDER.finditer(text, start + LONG_CHARACTERS))
        border = next((place for place in borders if text[place - 1].isalpha()), None)
        if border is None:
            break
        yield text[start:border]
        start = border
    yield text[start:]


def encode_all(texts: Iterable[str], tokenizer: Tokenizer, load: Load, workers: int) -> Iterator[Encoded]:
    """Encode all texts, batch by batch, in order; 1 worker is this very thread.

    Raises:
        UserError: a worker process died.
    """
    if workers == 1:
        yield from map(Encoder(tokenizer).encode, _batches(texts))
        return
    pool, run = _pool(tokenizer, load, workers)
    waiting: deque[Future[Encoded]] = deque()
    try:
        for batch in _batches(texts):
            waiting.append(pool.submit(run, batch))
            if len(waiting) >= BATCHES_AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            f"one of {workers} encoding processes was killed, most often for want of memory; use fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _pool(tokenizer: Tokenizer, load: Load, workers: int) -> tuple[Executor, Callable[[Sequence[str]], Encoded]]:
    """Workers, and what they run."""
    if isinstance(tokenizer, FastTokenizer) and workers <= MOST_THREADS:
        return ThreadPoolExecutor(workers, "encoding"), Encoder(tokenizer).encode
    # Spawned, not forked: the tokenizer's threads do not survive a fork.
    spawn = get_context("spawn")
    return ProcessPoolExecutor(workers, spawn, _start_worker, (load, tokenizer.folder)), _encode_in_worker


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


_encoder_of_worker: Encoder


def _start_worker(load: Load, folder: Path) -> None:
    global _encoder_of_worker
    # One process per core: threads inside would only compete.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Ctrl-C is the parent's to handle; a parent that was killed takes its workers along.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encoder_of_worker = Encoder(load(folder))


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None, "only a worker process waits for its parent"
    parent.join()
    os._exit(1)


def _encode_in_worker(texts: Sequence[str]) -> Encoded:
    return _encoder_of_worker.encode(texts)
