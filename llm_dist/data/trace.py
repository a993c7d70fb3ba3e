"""Name the documents whose tokens a step read: source file, place in the shards, beginning of the text.

Nothing is looked up that was written for it: the order says which tokens, the index which documents, and the shuffle,
computed again, which of the input's documents these were. Knows no run folder and no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from llm_dist import tokenizer
from llm_dist.data.index import ShardSet
from llm_dist.data.origin import read_origin
from llm_dist.data.packing import Span
from llm_dist.data.reading import Reading, Source
from llm_dist.errors import UserError

_MOST_TOKENS_PER_CHARACTER = 4
"""A token is at least one byte of UTF-8, and a character at most four."""


@dataclass(frozen=True)
class TracedDocument:
    """What one row took of one document, inside one chunk."""

    row: int
    """In the step's global set."""
    row_tokens: tuple[int, int]
    """Where it stands among the row's inputs: first, and end (not included)."""
    source: str
    """Name of the source in data.train."""
    file: str | None
    """Name of the input file; None where the shards do not record it."""
    number: int | None
    """Which document of that file it is, from 1; blank and bad records are not counted."""
    document_tokens: tuple[int, int]
    """Which of the document's stored tokens these are; token 0 is its separator."""
    shard: str
    chunk: int
    """Number inside the shard."""
    text: str
    """The beginning of these tokens' text; the document's own beginning if document_tokens begins with 0."""


@dataclass(frozen=True)
class Trace:
    """The documents of one step."""

    step: int
    epochs: dict[str, float]
    """Epochs of each source that were read before the step."""
    notes: list[str]
    """Why some files are not named."""
    documents: list[TracedDocument]
    """Row by row, in the order of the row's tokens."""

    def lines(self) -> Iterator[str]:
        """For people: one line per document."""
        yield from self.notes
        for found in self.documents:
            file = f"{found.file} document {found.number}" if found.file else "file unknown"
            yield (
                f"row {found.row} tokens {_range(found.row_tokens)}: {found.source}: {file}, tokens "
                f"{_range(found.document_tokens)}, {found.shard} chunk {found.chunk}: {found.text!r}"
            )


@dataclass(frozen=True)
class _Piece:
    row: int
    row_token: int
    start: int
    """In the stream."""
    num_tokens: int
    place: int
    """Which document of the stream."""
    document_token: int
    chunk: int


def check_same_data(reading: Reading, fingerprints: Mapping[str, str]) -> None:
    """The data is what a run with these recorded fingerprints read.

    Raises:
        UserError: it is not, so that other documents would be named.
    """
    for source in reading.sources:
        before, now = fingerprints.get(f"data.{source.name}"), source.shards.fingerprint
        if before not in (None, now):
            raise UserError(
                f"source {source.name} ({source.shards.folder}) has the fingerprint {now[:12]}, and the run read "
                f"{before[:12]}; restore the folder to trace its steps"
            )


def trace(reading: Reading, step: int, max_characters: int = 80) -> Trace:
    """The documents of step `step`, counted from 1 as metrics do: the step after which `step` steps are finished.

    Raises:
        UserError: a block the step read is damaged.
    """
    assert step > 0
    places = reading.places(range(step - 1, step), range(reading.sequences_per_step))
    notes: list[str] = []
    documents: list[TracedDocument] = []
    for number, source in enumerate(reading.sources):
        rows = np.flatnonzero(places.sources[0] == number)
        windows = zip(rows.tolist(), places.epochs[0, rows].tolist(), places.windows[0, rows].tolist(), strict=True)
        documents += _of_source(source, list(windows), max_characters, notes)
    documents.sort(key=lambda found: (found.row, found.row_tokens))
    return Trace(step, reading.epochs(step - 1), notes, documents)


def _of_source(
    source: Source, windows: list[tuple[int, int, int]], max_characters: int, notes: list[str]
) -> Iterator[TracedDocument]:
    """Documents in rows of one source: (row, epoch, window) each."""
    shards = source.shards
    first_documents = shards.first_documents()
    pieces = [
        piece
        for row, epoch, window in windows
        for span in source.packing.spans(epoch, window)
        for piece in _pieces(shards, first_documents, row, span)
    ]
    origin = read_origin(shards.dataset)
    if origin is None and pieces:
        notes.append(
            f"{shards.folder}: its dataset.json does not say which document came from where; "
            "tokenize again to have files named"
        )
    numbers = origin.numbers(np.array([piece.place for piece in pieces], np.int64)).tolist() if origin else []
    decode = tokenizer.load(shards.tokenizer_folder).decode
    for index, piece in enumerate(pieces):
        file, number = origin.source(numbers[index]) if origin else (None, None)
        shard, chunk = shards.chunks.place_of(piece.chunk)
        tokens = shards.tokens(piece.start, min(piece.num_tokens, max_characters * _MOST_TOKENS_PER_CHARACTER + 1))
        row_tokens = piece.row_token, piece.row_token + piece.num_tokens
        document_tokens = piece.document_token, piece.document_token + piece.num_tokens
        text = decode(tokens.tolist())[:max_characters]
        yield TracedDocument(piece.row, row_tokens, source.name, file, number, document_tokens, shard, chunk, text)


def _pieces(shards: ShardSet, first_documents: np.ndarray, row: int, span: Span) -> Iterator[_Piece]:
    """The documents of a span, cut where chunks are."""
    done = 0
    for chunk, first, count in shards.spans(span.start, span.num_tokens):
        ends = shards.document_ends(chunk)
        position = first
        while position < first + count:
            document = int(ends.searchsorted(np.uint32(position), side="right"))
            size = min(int(ends[document]), first + count) - position
            begin = int(ends[document - 1]) if document else -_tokens_before(shards, chunk)
            place = int(first_documents[chunk]) + document
            yield _Piece(row, span.row_token + done, span.start + done, size, place, position - begin, chunk)
            position, done = position + size, done + size


def _tokens_before(shards: ShardSet, chunk: int) -> int:
    """Tokens that a chunk's first document has in the chunks before."""
    num_tokens = 0
    while shards.chunks.continues(chunk):
        chunk -= 1
        ends = shards.document_ends(chunk)
        num_tokens += int(ends[-1]) - (int(ends[-2]) if len(ends) > 1 else 0)
    return num_tokens


def _range(tokens: tuple[int, int]) -> str:
    return f"{tokens[0]}-{tokens[1] - 1}"
