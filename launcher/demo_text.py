"""Real prose that every CPython carries: its documentation topics and the docstrings of the standard library."""

from __future__ import annotations

import ast
import json
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

SHORTEST_DOCSTRING = 200
"""Characters; shorter ones are mostly signatures."""


def write_corpus(path: Path) -> int:
    """Write the prose as JSON lines with `id` and `text`; returns the number of documents."""
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for name, text in (*_topics(), *_docstrings()):
            file.write(json.dumps({"id": name, "text": text}, ensure_ascii=False) + "\n")
            count += 1
    return count


def _topics() -> Iterator[tuple[str, str]]:
    from pydoc_data.topics import topics

    yield from ((f"topic:{name}", text.strip()) for name, text in sorted(topics.items()))


def _docstrings() -> Iterator[tuple[str, str]]:
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library)
        if not {"site-packages", "test", "tests", "idlelib", "lib2to3"} & set(name.parts):
            yield from ((f"{name}:{number}", text) for number, text in enumerate(_docstrings_of(path)))


def _docstrings_of(path: Path) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # of the library's own sources, which are only read here
        tree = ast.parse(path.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = (ast.get_docstring(node) or "").strip()
            if len(text) >= SHORTEST_DOCSTRING:
                yield text
