"""Samples of an ordinary WebDataset tar: members that share a key, the name up to the first dot of its last part.

Reads forward only, one sample at a time. Knows no documents.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import BinaryIO, NamedTuple

from llm_dist.data.inputs import BrokenFileError


class Sample(NamedTuple):
    """Neighbouring members with one key."""

    key: str
    members: dict[str, bytes]
    """Content by what follows the key's dot; only the endings that were asked for."""


def samples(stream: BinaryIO, shown: str, endings: tuple[str, ...]) -> Iterator[Sample]:
    """Samples of a tar that have a member with one of `endings`; `shown` names the tar in messages.

    Raises:
        BrokenFileError: it is no tar, or ends too early.
    """
    sample = Sample("", {})
    try:
        with tarfile.open(fileobj=stream, mode="r|") as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                stem, _, ending = path.name.partition(".")
                key = str(path.with_name(stem)) if stem else member.name
                if key != sample.key or ending in sample.members:
                    if sample.members:
                        yield sample
                    sample = Sample(key, {})
                content = tar.extractfile(member) if ending in endings else None
                if content is not None:
                    sample.members[ending] = content.read()
    except tarfile.TarError as error:
        raise BrokenFileError(f"{shown}: broken .tar file ({error}); fetch it again") from None
    if sample.members:
        yield sample
