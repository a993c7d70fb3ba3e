"""Name the documents whose tokens a step read: source file, place in the shards, beginning of the text.

Nothing is looked up that was written for it: the order says which tokens, the index which documents, and the shuffle,
computed again, which of the input's documents these were. Knows no run folder and no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from llm_dist import tokenizer
from llm_dist.data.index import ShardSet
from llm_dist.data.order import Order, sequence_ids
from llm_dist.data.origin import read_origin

_MOST_TOKENS_PER_CHARACTER = 4
"""A token is at least one byte of UTF-8, and a character at most four."""


@dataclass(frozen=True)
class TracedDocument:
    """What one row took of one document, inside one chunk."""

    row: int
    """In the step's global set."""
    row_tokens: tuple[int, int]
    """Where it stands in the row: first, and end (not included); a row has sequence_tokens + 1 tokens."""
    source: str | None
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
    epoch: int
    """Of the step's first row, from 0."""
    note: str | None
    """Why no source is named."""
    documents: list[TracedDocument]
    """Row by row, in the order of the row's tokens."""

    def lines(self) -> Iterator[str]:
        """For people: one line per document."""
        if self.note:
            yield self.note
        for found in self.documents:
            source = f"{found.source} document {found.number}" if found.source else "source unknown"
            yield (
                f"row {found.row} tokens {_range(found.row_tokens)}: {source}, tokens {_range(found.document_tokens)}, "
                f"{found.shard} chunk {found.chunk}: {found.text!r}"
            )


@dataclass(frozen=True)
class _Piece:
    row: int
    row_token: int
    num_tokens: int
    place: int
    """Which document of the stream."""
    document_token: int
    chunk: int


def trace(shards: ShardSet, order: Order, step: int, sequences_per_step: int, max_characters: int = 80) -> Trace:
    """The documents of step `step`, counted from 1 as metrics do: the step after which `step` steps are finished.

    Raises:
        UserError: a chunk the step read is damaged.
    """
    assert step > 0
    epochs, starts = order.starts(sequence_ids(step - 1, sequences_per_step))
    first_documents = shards.first_documents()
    pieces = [
        piece
        for row, start in enumerate(starts.tolist())
        for piece in _pieces(shards, first_documents, row, start, order.sequence_tokens + 1)
    ]
    origin = read_origin(shards.dataset)
    places = np.array([piece.place for piece in pieces], np.int64)
    sources = [origin.source(number) for number in origin.numbers(places).tolist()] if origin else None
    decode = tokenizer.load(shards.tokenizer_folder).decode
    documents = []
    for index, piece in enumerate(pieces):
        source, number = sources[index] if sources else (None, None)
        shard, chunk = shards.place_of(piece.chunk)
        count = min(piece.num_tokens, max_characters * _MOST_TOKENS_PER_CHARACTER + 1)
        tokens = shards.tokens(int(starts[piece.row]) + piece.row_token, count)
        row_tokens = piece.row_token, piece.row_token + piece.num_tokens
        document_tokens = piece.document_token, piece.document_token + piece.num_tokens
        text = decode(tokens.tolist())[:max_characters]
        documents.append(TracedDocument(piece.row, row_tokens, source, number, document_tokens, shard, chunk, text))
    note = (
        None
        if origin
        else (
            f"{shards.folder}: its dataset.json does not say which document came from where; "
            "tokenize again to have sources named"
        )
    )
    return Trace(step, int(epochs[0]), note, documents)


def _pieces(shards: ShardSet, first_documents: np.ndarray, row: int, start: int, count: int) -> Iterator[_Piece]:
    """The documents among `count` tokens from `start` on, circular, cut where chunks are."""
    position, done = start % shards.num_tokens, 0
    while done < count:
        chunk = shards.chunk_at(position)
        within = position - shards.first_token(chunk)
        ends = shards.document_ends(chunk)
        document = int(ends.searchsorted(np.uint32(within), side="right"))
        size = min(int(ends[document]) - within, count - done)
        passed = within - int(ends[document - 1]) if document else within + _tokens_before(shards, chunk)
        yield _Piece(row, done, size, int(first_documents[chunk]) + document, passed, chunk)
        position, done = (position + size) % shards.num_tokens, done + size


def _tokens_before(shards: ShardSet, chunk: int) -> int:
    """Tokens that a chunk's first document has in the chunks before."""
    num_tokens = 0
    while shards.continues(chunk):
        chunk -= 1
        ends = shards.document_ends(chunk)
        num_tokens += int(ends[-1]) - (int(ends[-2]) if len(ends) > 1 else 0)
    return num_tokens


def _range(tokens: tuple[int, int]) -> str:
    return f"{tokens[0]}-{tokens[1] - 1}"
