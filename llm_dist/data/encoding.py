"""Encode many documents: batches of texts go to worker processes, ids come back in the order of the texts.

The result depends neither on the number of workers nor on the pieces in which a very long text is encoded. Knows no
files and no shards.
"""

from __future__ import annotations

import os
import re
import signal
import threading
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from llm_dist.data.documents import num_utf8_bytes
from llm_dist.data.folder import DTYPES
from llm_dist.data.shards import dtype_name
from llm_dist.errors import UserError
from llm_dist.tokenizer import KINDS, Tokenizer

BATCH_CHARACTERS = 1 << 19
BATCH_DOCUMENTS = 4096
BATCHES_AHEAD = 3
"""Batches in flight per worker: enough to keep it busy while the reader waits for another."""
BYTES_PER_WORKER = 8 << 20
"""Input below which starting one more worker costs more than it saves: one process encodes in threads already."""

LONG_CHARACTERS = 1 << 16
"""Longer texts are encoded in pieces: the runtime needs more than 100 bytes of memory per character."""

_BORDER = re.compile(r"(?<=[^\W\d_])[ \n]")

Load = Callable[[Path], Tokenizer]


class Encoded(NamedTuple):
    """Documents as ids."""

    ids: npt.NDArray[np.integer[Any]]
    """All documents one after another, each a separator and its tokens; in the stored dtype."""
    num_tokens: npt.NDArray[np.int64]
    """[n]; the separator counts."""
    num_bytes: npt.NDArray[np.int64]
    """[n]; UTF-8 bytes of the texts."""


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> Encoded:
    """Encode one batch."""
    dtype = DTYPES[dtype_name(tokenizer.vocabulary_tokens)]
    short = iter(tokenizer.encode_batch([text for text in texts if len(text) <= LONG_CHARACTERS]))
    # An array refuses ids that do not fit, where numpy's assignment would wrap them.
    flat = array("H" if dtype.itemsize == 2 else "I")
    ends = [0]
    for text in texts:
        flat.append(tokenizer.separator_id)
        if len(text) <= LONG_CHARACTERS:
            flat.fromlist(next(short))
        else:
            for batch in _batches(long_pieces(tokenizer.kind, text)):
                for ids in tokenizer.encode_batch(batch):
                    flat.fromlist(ids)
        ends.append(len(flat))
    tokens = np.frombuffer(flat, dtype)
    assert not len(tokens) or int(tokens.max()) < tokenizer.vocabulary_tokens, "an id outside the vocabulary"
    return Encoded(tokens, np.diff(ends), np.array([num_utf8_bytes(text) for text in texts], np.int64))


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
    """Encode all texts, batch by batch, in order; `workers` processes load their own tokenizer, 1 needs none.

    Raises:
        UserError: a worker process died.
    """
    if workers == 1:
        for batch in _batches(texts):
            yield encode(tokenizer, batch)
        return
    # Spawned, not forked: the tokenizer's threads do not survive a fork.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (load, tokenizer.folder))
    waiting: deque[Future[Encoded]] = deque()
    try:
        for batch in _batches(texts):
            waiting.append(pool.submit(_encode_in_worker, batch))
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


def num_workers(wanted: int | None, input_bytes: int) -> int:
    """Worker processes: as asked, else the cores this process may use, and no more than the input keeps busy."""
    if wanted is not None and wanted < 1:
        raise UserError(f"--workers {wanted}: must be at least 1; leave it out to use every core")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return wanted or max(1, min(cores, input_bytes // BYTES_PER_WORKER))


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


_tokenizer_of_worker: Tokenizer


def _start_worker(load: Load, folder: Path) -> None:
    global _tokenizer_of_worker
    # One process per core: threads inside would only compete.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Ctrl-C is the parent's to handle; a parent that was killed takes its workers along.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _tokenizer_of_worker = load(folder)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None, "only a worker process waits for its parent"
    parent.join()
    os._exit(1)


def _encode_in_worker(texts: Sequence[str]) -> Encoded:
    return encode(_tokenizer_of_worker, texts)
