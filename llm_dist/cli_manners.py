"""What the commands of `llm-dist` have in common: options, examples in the help, and how results are shown."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from llm_dist.errors import exit_code_of

Json = Annotated[bool, typer.Option("--json", help="End with one JSON object on standard output.")]
Checkpoint = Annotated[
    Path, typer.Argument(metavar="RUN_OR_CHECKPOINT", help="Run folder, checkpoint folder or Hugging Face folder.")
]
Step = Annotated[int | None, typer.Option(help="Checkpoint of this step instead of the latest.")]
Best = Annotated[bool, typer.Option("--best", help="Checkpoint of the best validation (eval.best).")]
Precision = Literal["fp32", "bf16"]


def examples(*lines: str) -> str:
    """The end of a command's help."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def finish(work: Callable[[], Any], as_json: bool) -> None:
    """End the command with what `work` gives, or with the mistake it names."""

    def act() -> int:
        show(work(), as_json)
        return 0

    raise typer.Exit(exit_code_of(act))


def show(result: Any, as_json: bool) -> None:
    """Print fields: one JSON object, or a line each."""
    fields = asdict(result) if is_dataclass(result) and not isinstance(result, type) else dict(result)
    if as_json:
        print(json.dumps(fields, default=str))
        return
    width = max(map(len, fields), default=0)
    for name, value in fields.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            print(name.replace("_", " "))
            for entry in value:
                print("  " + ", ".join(f"{key.replace('_', ' ')} {_readable(item)}" for key, item in entry.items()))
        else:
            print(f"{name.replace('_', ' '):<{width}}  {_readable(value)}")


def _readable(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4f}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
