"""Read documents from text, JSON lines, Parquet, Arrow and WebDataset tars, one after another, in bounded memory.

The order is that of the inputs; a document's id says where it stands. Knows no tokenizer and no shards.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, BinaryIO, Literal, NamedTuple, get_args

from llm_dist.data.inputs import BrokenFileError, InputFile, find_files, naming, open_seekable, open_stream
from llm_dist.data.samples import samples
from llm_dist.errors import UserError

Split = Literal["file", "blank-line", "line"]
"""What a document is in a .txt file."""
OnBad = Literal["stop", "skip"]

_PARQUET_ROWS = 256
_ARROW_FILE = b"ARROW1"
"""How Arrow's file format begins; its stream format does not."""
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Document:
    """A text and where it came from."""

    text: str
    source: str
    """Name of its file, relative to the input that brought it."""
    id: str
    """The id the record carries, else `source` and the line (row in Parquet) at which it begins, from 1."""


@dataclass
class Tally:
    """What reading met; it counts while documents are read."""

    num_files: int = 0
    num_documents: int = 0
    num_bytes: int = 0
    """UTF-8 bytes of the documents' texts."""
    num_skipped_files: int = 0
    """Files of unknown type, hidden, or named twice."""
    num_empty_documents: int = 0
    """Blank documents, which are left out."""
    num_bad_records: int = 0
    """Records, or rests of broken files, left out by on_bad="skip"."""
    first_bad: str | None = None
    documents_per_file: list[int] = field(default_factory=list)

    def bad(self, message: str, on_bad: OnBad) -> None:
        """Count a record that cannot be used, or refuse it."""
        if on_bad == "stop":
            raise UserError(f"{message}; mend it, or leave such records out with --on-bad skip")
        self.num_bad_records += 1
        self.first_bad = self.first_bad or message


_Table = tuple[Sequence[str], Callable[[Sequence[str]], Iterator[Any]]]
"""Names of columns, and what gives the batches of some of them."""


class _Record(NamedTuple):
    number: int
    id: str | None
    text: str


def read_documents(
    inputs: Sequence[str], *, split: Split = "file", on_bad: OnBad = "stop", tally: Tally | None = None
) -> Iterator[Document]:
    """Documents of files, folders, globs and `-`, in order; `tally` counts what is met.

    Raises:
        UserError: nothing to read, no document, or (on_bad="stop") the first record that cannot be used.
    """
    tally = Tally() if tally is None else tally
    files, tally.num_skipped_files = find_files(inputs)
    yield from read_files(files, split=split, on_bad=on_bad, tally=tally)


def read_files(files: Sequence[InputFile], *, split: Split, on_bad: OnBad, tally: Tally) -> Iterator[Document]:
    """Documents of files already found; see `read_documents`."""
    for value, allowed, key in ((split, get_args(Split), "split"), (on_bad, get_args(OnBad), "on-bad")):
        if value not in allowed:
            raise UserError(f"--{key} {value}: must be one of {', '.join(allowed)}")
    for file in files:
        tally.num_files += 1
        tally.documents_per_file.append(0)
        for record in _records(file, split, on_bad, tally):
            if not record.text or record.text.isspace():
                tally.num_empty_documents += 1
                continue
            try:
                tally.num_bytes += num_utf8_bytes(record.text)
            except UnicodeEncodeError as error:
                tally.bad(f"{file.shown}: line {record.number}: not valid Unicode ({error.reason})", on_bad)
                continue
            tally.num_documents += 1
            tally.documents_per_file[-1] += 1
            yield Document(record.text, file.name, record.id or f"{file.name}:{record.number}")
    if not tally.num_documents:
        raise UserError(
            f"{', '.join(file.shown for file in files[:3])}{' ...' if len(files) > 3 else ''}: holds no document "
            f"({tally.num_files} files, {tally.num_empty_documents} blank documents, {tally.num_bad_records} bad "
            "records); name inputs that hold text"
        )


def num_utf8_bytes(text: str) -> int:
    """Bytes of `text` in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


def _records(file: InputFile, split: Split, on_bad: OnBad, tally: Tally) -> Iterator[_Record]:
    """Records of one file; a file broken half-way gives what came before the break."""
    reader = _Reader(file, on_bad, tally)
    try:
        with naming(file):
            if file.format in ("parquet", "arrow"):
                with open_seekable(file) as stream:
                    yield from reader.table(stream)
                return
            with open_stream(file) as stream:
                if file.format == "tar":
                    yield from reader.tar(stream)
                else:
                    yield from reader.json_lines(stream) if file.format == "jsonl" else reader.text(stream, split)
    except BrokenFileError as error:
        tally.bad(str(error), on_bad)


class _Reader:
    """The records of one file; those that cannot be used are told to the tally."""

    def __init__(self, file: InputFile, on_bad: OnBad, tally: Tally) -> None:
        self._file = file
        self._on_bad = on_bad
        self._tally = tally

    def _bad(self, where: str, why: str) -> None:
        self._tally.bad(f"{self._file.shown}: {where}: {why}", self._on_bad)

    def text(self, stream: BinaryIO, split: Split) -> Iterator[_Record]:
        pieces = {"file": _whole, "line": _lines, "blank-line": _paragraphs}[split](stream)
        for number, content in pieces:
            try:
                yield _Record(number, None, content.decode())
            except UnicodeDecodeError as error:
                line = number + content.count(b"\n", 0, error.start)
                self._bad(f"line {line}", f"not UTF-8 (byte 0x{content[error.start]:02x} at offset {error.start})")

    def json_lines(self, stream: BinaryIO) -> Iterator[_Record]:
        for number, line in _lines(stream):
            if not line or line.isspace():
                continue
            yield from self._json(f"line {number}", number, line)

    def tar(self, stream: BinaryIO) -> Iterator[_Record]:
        """One document per sample: its .txt member or, without one, the field `text` of its .json member."""
        for number, (key, members) in enumerate(samples(stream, self._file.shown, ("txt", "json")), start=1):
            if "txt" not in members:
                yield from self._json(f"sample {key}", number, members["json"], key)
                continue
            try:
                yield _Record(number, key, members["txt"].removeprefix(_BOM).decode())
            except UnicodeDecodeError as error:
                self._bad(f"sample {key}", f"not UTF-8 (at offset {error.start} of its .txt)")

    def _json(self, where: str, number: int, content: bytes, key: str | None = None) -> Iterator[_Record]:
        try:
            record = json.loads(content.decode())
        except UnicodeDecodeError as error:
            self._bad(where, f"not UTF-8 (byte 0x{content[error.start]:02x} at column {error.start + 1})")
        except (ValueError, RecursionError) as error:
            self._bad(where, f"not JSON ({error})")
        else:
            if isinstance(record, dict):
                yield from self._fields(where, number, record, key)
            else:
                self._bad(where, f"a {type(record).__name__}, not a JSON object")

    def table(self, stream: BinaryIO) -> Iterator[_Record]:
        """Rows of Parquet, or of Arrow as `datasets` saves it."""
        import pyarrow

        try:
            names, batches = _parquet(stream) if self._file.format == "parquet" else _arrow(stream)
            columns = [name for name in ("text", "id") if name in names]
            if "text" not in columns:
                raise BrokenFileError(f"{self._file.shown}: no column `text` (it has {_some(names)})")
            number = 0
            for batch in batches(columns):
                for row in range(batch.num_rows):
                    number += 1
                    try:
                        record = {name: batch.column(name)[row].as_py() for name in columns}
                    except UnicodeDecodeError:
                        self._bad(f"row {number}", "not UTF-8")
                        continue
                    yield from self._fields(f"row {number}", number, record)
        except pyarrow.ArrowException as error:
            why = " ".join(str(error).split())
            raise BrokenFileError(
                f"{self._file.shown}: broken .{self._file.format} file ({why}); fetch it again"
            ) from None

    def _fields(self, where: str, number: int, record: dict[str, object], key: str | None = None) -> Iterator[_Record]:
        if "text" not in record:
            self._bad(where, f"no field `text` (it has {_some(list(record))})")
        elif not isinstance(text := record["text"], str):
            self._bad(where, f"field `text` is a {type(text).__name__}, not a string")
        else:
            id_ = record.get("id")
            yield _Record(number, key if id_ is None else str(id_), text)


def _parquet(stream: BinaryIO) -> _Table:
    from pyarrow import parquet

    table = parquet.ParquetFile(stream, pre_buffer=False)
    read = partial(table.iter_batches, batch_size=_PARQUET_ROWS, use_threads=False)
    return table.schema_arrow.names, lambda columns: read(columns=columns)


def _arrow(stream: BinaryIO) -> _Table:
    from pyarrow import ipc

    is_file = stream.read(len(_ARROW_FILE)) == _ARROW_FILE
    stream.seek(0)
    if is_file:
        file = ipc.open_file(stream)
        return file.schema.names, lambda _: (file.get_batch(number) for number in range(file.num_record_batches))
    batches = ipc.open_stream(stream)
    return batches.schema.names, lambda _: iter(batches)


def _some(names: Sequence[str]) -> str:
    return (", ".join(map(repr, names[:5])) + (" ..." if len(names) > 5 else "")) or "none"


def _whole(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    yield 1, stream.read().removeprefix(_BOM)


def _lines(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Lines without their ends; only a line feed, perhaps after a carriage return, ends a line."""
    for number, content in enumerate(stream, start=1):
        line = content.removeprefix(_BOM) if number == 1 else content
        yield number, line.removesuffix(b"\n").removesuffix(b"\r")


def _paragraphs(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Runs of lines that are not blank, with the number of their first line."""
    lines: list[bytes] = []
    first = 1
    for number, line in _lines(stream):
        if line and not line.isspace():
            first = first if lines else number
            lines.append(line)
        elif lines:
            yield first, b"\n".join(lines)
            lines = []
    if lines:
        yield first, b"\n".join(lines)
