"""From windows of a source to rows of tokens: how documents are laid into sequences of one length.

concatenate  every sequence_tokens of the circular stream are a window; documents are cut where it ends
best_fit     a window is a bin of whole documents, as full as they come, and padding; only longer documents are cut
separate     a window is one document, and padding; a longer document has several windows

Either way a row's borders come from the index, never from token ids. Knows no order and no torch.
"""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from llm_dist.data.bins import BINS_VERSION, BinPlan, plan_bins, separate_bins, single_bins
from llm_dist.data.index import ShardSet
from llm_dist.data.order import CELL_TOKENS, Indices, phases
from llm_dist.errors import UserError
from llm_dist.rows import NOT_LABELLED, Rows

_PLANS_KEPT = 1024
"""Plans of chunks, some 15 kB each; lanes read from 256 cells at a time."""
_CHUNKS_WORTH_KEEPING = 1024
_READERS, _BLOCK = 32, 4096


class Span(NamedTuple):
    """Tokens of the stream that stand together in a row."""

    row_token: int
    """Where they begin in the row."""
    start: int
    """Where they begin in the stream."""
    num_tokens: int


class Packing(Protocol):
    """The windows of one source."""

    num_windows: int
    is_padded: bool

    @property
    def cell_windows(self) -> int:
        """How many neighbouring windows are read at about the same time."""

    def rows(self, epochs: Indices, windows: Indices, document_mask: bool) -> Rows:
        """The rows of `windows` [n] in their `epochs` [n].

        Raises:
            UserError: what is read is damaged.
        """

    def spans(self, epoch: int, window: int) -> list[Span]:
        """Which tokens of the stream make up a window."""

    def cell(self, epoch: int, cell: int) -> tuple[int, int]:
        """First token of a cell in the stream, and tokens."""


def cell_windows(sequence_tokens: int) -> int:
    """Windows that make up a cell of about CELL_TOKENS."""
    return max(1, CELL_TOKENS // sequence_tokens)


class Concatenated:
    """Windows cut from the stream at a phase that each epoch draws anew."""

    is_padded = False

    def __init__(self, shards: ShardSet, sequence_tokens: int, seed: int) -> None:
        """Raises `UserError` when the source is shorter than one sequence."""
        if shards.num_tokens < sequence_tokens:
            raise UserError(
                f"{shards.folder} has {shards.num_tokens} tokens, fewer than data.sequence_tokens={sequence_tokens}; "
                "lower data.sequence_tokens or add text"
            )
        self._shards = shards
        self._sequence_tokens = sequence_tokens
        self._seed = seed
        self._phase = lru_cache(lambda epoch: int(phases(seed, np.array([epoch]), shards.num_tokens)[0]))
        self.num_windows = shards.num_tokens // sequence_tokens
        self.cell_windows = cell_windows(sequence_tokens)

    def rows(self, epochs: Indices, windows: Indices, document_mask: bool) -> Rows:
        """Rows as they stand in the stream; inputs and what follows them share one array."""
        starts = self.starts(epochs, windows)
        tokens = np.empty((len(starts), self._sequence_tokens + 1), np.int64)
        self._shards.gather(starts, self._sequence_tokens + 1, tokens)
        ids = self._shards.document_ids(starts, self._sequence_tokens) if document_mask else None
        return Rows(tokens[:, :-1], tokens[:, 1:], None, ids)

    def starts(self, epochs: Indices, windows: Indices) -> Indices:
        """Where windows begin in the stream: [n]."""
        if len(epochs) and (epochs == epochs[0]).all():
            phase: int | Indices = self._phase(int(epochs[0]))
        else:
            phase = phases(self._seed, epochs, self._shards.num_tokens)
        begins: Indices = (windows * self._sequence_tokens + phase) % self._shards.num_tokens
        return begins

    def spans(self, epoch: int, window: int) -> list[Span]:
        """One span."""
        start = int(self.starts(np.array([epoch]), np.array([window]))[0])
        return [Span(0, start, self._sequence_tokens)]

    def cell(self, epoch: int, cell: int) -> tuple[int, int]:
        """A run of windows, and the token behind it."""
        first = cell * self.cell_windows
        num_windows = min(self.cell_windows, self.num_windows - first)
        start = int(self.starts(np.array([epoch]), np.array([first]))[0])
        return start, num_windows * self._sequence_tokens + 1


class Binned:
    """Windows are the bins of each chunk, in the order of chunks; the same in every epoch."""

    is_padded = True
    _kind, _plan_bins = "", staticmethod(plan_bins)

    def __init__(self, shards: ShardSet, sequence_tokens: int, cache: Path) -> None:
        """Plan every chunk (2 ms for a million tokens), unless `cache` remembers how many bins each has."""
        self._shards = shards
        self._sequence_tokens = sequence_tokens
        self._plan = lru_cache(_PLANS_KEPT)(self._make_plan)
        self._ends = np.cumsum(self._num_bins(cache))
        self.num_windows = int(self._ends[-1])
        self.cell_windows = cell_windows(sequence_tokens)

    def rows(self, epochs: Indices, windows: Indices, document_mask: bool) -> Rows:
        """Pieces of documents side by side, then padding, which is a document of its own."""
        shape = len(windows), self._sequence_tokens
        inputs, following = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        num_scored, ids = np.empty(len(windows), np.int64), np.zeros(shape, np.int32) if document_mask else None
        for row, (epoch, window) in enumerate(zip(epochs.tolist(), windows.tolist(), strict=True)):
            end = 0
            for document, (_, start, count) in enumerate(self.spans(epoch, window)):
                tokens, first, end = self._shards.tokens(start, count + 1), end, end + count
                inputs[row, first:end], following[row, first:end] = tokens[:-1], tokens[1:]
                if ids is not None:
                    ids[row, end:] = document + 1
            num_scored[row] = end
        return Rows(inputs, following, num_scored, ids)

    def spans(self, epoch: int, window: int) -> list[Span]:
        """One span for each piece."""
        chunk = int(self._ends.searchsorted(window, side="right"))
        first = int(self._ends[chunk - 1]) if chunk else 0
        base = int(self._shards.chunks.first_token[chunk])
        spans, row_token = [], 0
        for start, count in self._plan(chunk).pieces(window - first):
            spans.append(Span(row_token, base + start, count))
            row_token += count
        return spans

    def documents(self, windows: Indices) -> Indices:
        """Number in the stream of the document with which each of `windows` [n] begins."""
        chunks = self._ends.searchsorted(windows, side="right")
        documents = np.empty(len(windows), np.int64)
        for chunk in np.unique(chunks).tolist():
            own = np.flatnonzero(chunks == chunk)
            plan = self._plan(chunk)
            bins = windows[own] - (int(self._ends[chunk - 1]) if chunk else 0)
            first_pieces = np.concatenate([[0], plan.ends[:-1]])[bins]
            ends = self._shards.document_ends(chunk)
            within = ends.searchsorted(plan.firsts[first_pieces].astype(np.uint32), side="right")
            documents[own] = self._first_documents[chunk] + within
        return documents

    @cached_property
    def _first_documents(self) -> Indices:
        return self._shards.first_documents()

    def cell(self, epoch: int, cell: int) -> tuple[int, int]:
        """The whole chunks in which a cell's bins lie."""
        first, last = cell * self.cell_windows, min((cell + 1) * self.cell_windows, self.num_windows) - 1
        chunks = self._ends.searchsorted([first, last], side="right").tolist()
        first_token = self._shards.chunks.first_token
        start = int(first_token[chunks[0]])
        return start, int(first_token[chunks[1] + 1]) - start + 1

    def _make_plan(self, chunk: int) -> BinPlan:
        return self._plan_bins(self._shards.document_ends(chunk), self._sequence_tokens)

    def _num_bins(self, cache: Path) -> Indices:
        """Bins of each chunk: [chunks]; counting them takes minutes for a trillion tokens, so large counts are kept."""
        num_chunks = len(self._shards.chunks)
        path = cache / "bins" / f"{self._shards.fingerprint}-{self._sequence_tokens}{self._kind}-v{BINS_VERSION}.npy"
        is_worth_keeping = num_chunks >= _CHUNKS_WORTH_KEEPING or self._shards.is_remote
        if is_worth_keeping and (known := _kept(path, num_chunks)) is not None:
            return known
        # In threads because document ends may lie behind a network.
        with ThreadPoolExecutor(_READERS) as threads:
            blocks = (range(first, min(first + _BLOCK, num_chunks)) for first in range(0, num_chunks, _BLOCK))
            ends = (each for block in blocks for each in threads.map(self._shards.document_ends, block))
            counted = np.array([len(self._plan_bins(each, self._sequence_tokens).ends) for each in ends], np.int64)
        if is_worth_keeping:
            _keep(path, counted)
        return counted


class BestFit(Binned):
    """Bins are as full as documents come."""


class Separate(Binned):
    """A bin holds one document, or a piece of one."""

    _kind, _plan_bins = "-separate", staticmethod(separate_bins)

    def rows(self, epochs: Indices, windows: Indices, document_mask: bool) -> Rows:
        """A document is a row, which no mask needs to divide."""
        return super().rows(epochs, windows, False)


class Labelled(Separate):
    """A bin holds one document, as far as it fits, and the document's label or its tokens' labels come with it."""

    _kind, _plan_bins = "-single", staticmethod(single_bins)

    def rows(self, epochs: Indices, windows: Indices, document_mask: bool) -> Rows:
        """Rows with their targets."""
        rows, labels = super().rows(epochs, windows, document_mask), self._shards.labels
        assert labels is not None, "shards of labelled examples have labels"
        if labels.per == "document":
            return rows._replace(targets=labels.of_documents(self.documents(windows)))
        targets = np.full(rows.inputs.shape, NOT_LABELLED, np.int64)
        for row, (epoch, window) in enumerate(zip(epochs.tolist(), windows.tolist(), strict=True)):
            [(_, start, count)] = self.spans(epoch, window)
            targets[row, :count] = labels.of_tokens(start, count)
        return rows._replace(targets=targets)


def _kept(path: Path, num_chunks: int) -> Indices | None:
    """What `_keep` saved; None where it is not there or not whole, which costs only the time to count again."""
    try:
        known: Indices = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    is_whole = known.dtype == np.int64 and known.shape == (num_chunks,) and known.min(initial=1) > 0
    return known if is_whole else None


def _keep(path: Path, array: Indices) -> None:
    """Save an array for the next start; several ranks may do so at once."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            np.save(file, array)
        Path(file.name).rename(path)
    except OSError as error:
        raise UserError(f"{path.parent}: cannot be written ({error.strerror}); choose another data.cache") from None
