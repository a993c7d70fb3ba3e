"""Files that readers on other machines see whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def publish(path: Path, text: str) -> None:
    """Put a file in place, folder included; two writers at once do not mix, the later one stands."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writing = path.with_name(f".{path.name}-{os.uname().nodename}-{os.getpid()}")
    with writing.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    writing.replace(path)
