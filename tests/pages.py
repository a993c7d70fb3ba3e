"""The pages a newcomer reads, and the shell blocks that stand in them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [
    README,
    *(
        ROOT / "docs" / f"{name}.md"
        for name in (
            "getting-started",
            "data",
            "encoders",
            "configuration",
            "engines",
            "checkpoints",
            "launching",
            "slurm",
            "preflight",
            "evaluation-and-exchange",
            "design",
            "benchmarks",
            "experiments",
        )
    ),
]
"""In reading order: the commands of a page go on from what those before it made."""

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NOT_RUN = re.compile(r"<!-- not run:(.*?)-->\s*\Z", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    page: Path
    line: int
    """Of its first line of content, from 1."""
    language: str
    text: str
    why_not_run: str | None
    """What the comment just above says; None where there is none."""


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        before = text[: match.start()]
        mark = _NOT_RUN.search(before)
        found.append(Block(page, before.count("\n") + 2, match[1], match[2], mark and mark[1].strip()))
    return found


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))
