"""Which code this is, also outside a checkout."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path


@functools.cache
def code_fingerprint() -> str:
    """sha256 over this package's source files, by name."""
    package = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
