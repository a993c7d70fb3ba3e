"""Decide which text is held out: whole documents by hash or, where these cannot make the share, the input's tail.

A pure function of the documents and their hashes. Knows text and counts; not tokens and files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from llm_dist.data.documents import Document, num_utf8_bytes
from llm_dist.data.spill import Words, mix64
from llm_dist.errors import UserError

_BIN_BITS = 16
_SALT = 0x686F6C64
"""Makes who is held out independent of the order in which documents are stored."""

_BORDERS = (
    ("a blank line", re.compile(rb"\n[ \t\r]*\n\s*")),
    ("a line end", re.compile(rb"\n")),
    ("a sentence end", re.compile(rb"[.!?][\"')\]]*\s+|\xe3\x80\x82|\xef\xbc\x81|\xef\xbc\x9f")),
    ("a space", re.compile(rb"\s+")),
)
"""Where a text may be cut, best first; a cut stands at the end of a match. The last three sentence ends are CJK's."""


@dataclass(frozen=True)
class Parts:
    """Which documents are held out; at most one is cut in two."""

    how: str
    """For people: how the held-out part was chosen."""
    held_bins: int = 0
    """Bins of hashes, from the first on, whose documents are held out."""
    tail_from: int | None = None
    """Documents from this number on are held out."""
    cut: tuple[str, str] | None = None
    """The text of document `tail_from`, in two: its head is trained on."""

    def holds(self, number: int, word: int) -> bool:
        """Whether the document with this number and hash is held out (the one that is cut: its end is)."""
        if self.tail_from is not None:
            return number >= self.tail_from
        return _bin(word) < self.held_bins

    def masks(
        self, numbers: npt.NDArray[np.int64], hashes: npt.NDArray[np.uint64]
    ) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Which of many documents have text that is trained on, and which have held-out text: [n], [n]."""
        if self.tail_from is None:
            held = _bin(hashes) < np.uint64(self.held_bins)
            return ~held, held
        held = numbers >= self.tail_from
        return ~held | (numbers == self.tail_from) & (self.cut is not None), held

    def cut_of(self, number: int) -> tuple[str, str] | None:
        """Head and tail of the document's text if it is the one that is cut."""
        return self.cut if number == self.tail_from else None


ALL_TRAIN = Parts("nothing is held out")


@overload
def _bin(word: int) -> int: ...
@overload
def _bin(word: Words) -> Words: ...
def _bin(word: Any) -> Any:
    return mix64(word ^ _SALT) >> (64 - _BIN_BITS)


class Bytes:
    """Bytes of text by the hash of their document: enough to choose a share without keeping the documents."""

    def __init__(self) -> None:
        self.total = 0
        self._of_bin = np.zeros(1 << _BIN_BITS, np.int64)

    def add(self, hashes: npt.NDArray[np.uint64], num_bytes: npt.NDArray[np.int64]) -> None:
        """Count documents: hashes and bytes [n]."""
        np.add.at(self._of_bin, _bin(hashes).astype(np.int64), num_bytes)
        self.total += int(num_bytes.sum())

    def whole_documents(self, share: float) -> Parts | None:
        """Whole documents that make about `share` of the bytes; None when none do within a factor of two."""
        held = np.cumsum(self._of_bin)
        bins = int(np.searchsorted(held, share * self.total)) + 1
        made = int(held[bins - 1]) / self.total
        if not share / 2 <= made <= 2 * share or held[bins - 1] == self.total:
            return None
        return Parts(f"whole documents chosen by hash, {made:.2%} of the bytes", held_bins=bins)


def tail(documents: Iterable[Document], total_bytes: int, share: float) -> Parts:
    """The last `share` of the bytes, cut between documents or else at the best border inside one.

    Raises:
        UserError: the text is too short for two parts.
    """
    wanted = max(1, round(total_bytes * share))
    start = 0
    for number, document in enumerate(documents):
        end = start + num_utf8_bytes(document.text)
        if end > total_bytes - wanted:
            return _tail_in(document, number, start, total_bytes, wanted)
        start = end
    raise AssertionError("the documents are shorter than they were when they were counted")


def _tail_in(document: Document, number: int, start: int, total_bytes: int, wanted: int) -> Parts:
    """The tail of about `wanted` bytes that begins in or beside document `number`, itself beginning at `start`."""
    end = start + num_utf8_bytes(document.text)
    how = "the input's tail, since whole documents cannot make the share"
    borders = [border for border in (start, end) if 0 < border < total_bytes]
    nearest = min(borders, key=lambda border: abs(total_bytes - wanted - border), default=0)
    between = Parts(f"{how}; cut between documents", tail_from=number + (nearest == end))
    if borders and wanted / 2 <= total_bytes - nearest <= 2 * wanted:
        return between
    content, left = document.text.encode(), total_bytes - start
    place, border = _cut(content, left - wanted, range(left - 2 * wanted, left - wanted // 2 + 1))
    if place is None and borders:
        return between
    if place is None:
        raise UserError(
            f"{document.source}: {total_bytes} bytes of text are too few to hold out a part; "
            "add text, or train on all of it with --holdout 0"
        )
    cut = content[:place].decode(), content[place:].decode()
    return Parts(f"{how}; cut in {document.id} at {border}", tail_from=number, cut=cut)


def _cut(content: bytes, wanted: int, allowed: range) -> tuple[int | None, str]:
    """Place in UTF-8 `content` nearest to `wanted`, at the best kind of border found in `allowed`, and its name.

    Neither side is blank; None when there is no such place.
    """
    first = len(content) - len(content.lstrip()) + 1
    last = len(content.rstrip()) - 1
    low, high = max(first, allowed.start), min(last, allowed.stop - 1)
    for name, pattern in _BORDERS:
        ends = (match.end() for match in pattern.finditer(content, max(0, low - 1), max(0, high)))
        inside = [end for end in ends if low <= end <= high]
        if inside:
            return min(inside, key=lambda end: abs(end - wanted)), name
    at = min(max(wanted, first), last)
    characters = [place for place in range(at - 3, at + 4) if first <= place <= last and content[place] & 0xC0 != 0x80]
    return min(characters, key=lambda place: abs(place - wanted), default=None), "a character"
