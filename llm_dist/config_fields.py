"""What a section of the run file is made of: frozen tables, and fields that say what a change means on resume.

`identity` (another value is another run: refused), `from_now` (allowed when named with --accept, and recorded) or
`free` (machines, logging, saving, length). Reads no file, no environment and no torch.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

OnResume = Literal["identity", "from_now", "free"]


def _field(on_resume: OnResume, default: Any, rules: dict[str, Any]) -> Any:
    return Field(default, json_schema_extra={"on_resume": on_resume}, **rules)


def identity(default: Any = ..., **rules: Any) -> Any:
    """A field whose change makes another run."""
    return _field("identity", default, rules)


def from_now(default: Any = ..., **rules: Any) -> Any:
    """A field that may change from the current step on, when the user says so."""
    return _field("from_now", default, rules)


def free(default: Any = ..., **rules: Any) -> Any:
    """A field that changes no trajectory."""
    return _field("free", default, rules)


class Section(BaseModel):
    """A frozen table of the run file."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, populate_by_name=True, protected_namespaces=()
    )
