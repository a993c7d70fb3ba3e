"""Writes configuration.md from llm_dist/config_sections.py, so that the page cannot differ from the code.

Run `python docs/generate.py` after a change of the run file's keys; a test compares the two.
"""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, cast, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from llm_dist.config import Config, Section

PAGE = Path(__file__).parent / "configuration.md"

HEAD = """\
# The run file: every key

<!-- Written by docs/generate.py from llm_dist/config_sections.py and config_model.py; change the docstrings there. -->

A run file is TOML written by hand, or JSON written by a machine (`config.json` of a run folder is one). It states
what is trained; machines (how many ranks) stand on the command line. Unknown keys are refused, with the nearest known
key named. Every command that takes a run file also takes overrides after it, `section.key=value`, read by the rules
of TOML; text that is no TOML value is taken as a string, so `engine.name=zero` needs no quotes.

A complete, small run file stands in [getting started](getting-started.md); the ones under `configs/` reach from a CPU
core to 70 billion parameters. `config.json` shows what a run really uses, defaults included.

**On resume** says what a change of the key means to a run that has begun:

| | |
|---|---|
| identity | another value is another run: refused, naming the key |
| from now | allowed when named, `--accept section.key`; holds from the current step on |
| free | changes no trajectory; may differ at every start |

`data.train` is free because folders may move: what they hold may not change. Each source's fingerprint and the
tokenizer's are compared with those the run began on, and a difference is refused. `data.mixture` may be changed from
the current step on only ([data](data.md#what-a-run-reads)). Engine, ranks and micro-batch are free because the
mathematics is the same; a run continues bit for bit only where they stay the same ([engines](engines.md)).

Beyond the bounds of single keys, three rules: `batch.tokens_per_step` is a multiple of `data.sequence_tokens`;
`data.sequence_tokens` is at most `model.max_sequence_tokens`; `optim.warmup_steps` is at most the length of the
schedule (`optim.total_steps`, else `run.steps`). In `[model]`, `heads` divides `d_model` unless `d_head` is given,
`kv_heads` divides `heads`, rotary positions need an even head width, and a bidirectional window is even. An objective
that hides tokens needs bidirectional attention, `causal` and `instruct` need causal attention, and pairs of texts need
`data.packing = "separate"`.
"""


def page() -> str:
    """The whole page."""
    return HEAD + "".join(f"\n{_section(name, field)}" for name, field in Config.model_fields.items())


def _section(name: str, field: FieldInfo) -> str:
    table = cast(type[Section], field.annotation)
    rows = "".join(_row(name, key, each) for key, each in table.model_fields.items())
    return (
        f"## [{name}]\n\n{_one_line(table.__doc__ or '')}\n\n"
        f"| key | type | default | on resume | what it is |\n|---|---|---|---|---|\n{rows}"
    )


def _row(section: str, key: str, field: FieldInfo) -> str:
    on_resume = cast(dict[str, str], field.json_schema_extra)["on_resume"].replace("_", " ")
    bounds = ", ".join(_bounds(field))
    kind = f"{_type(field.annotation)}{f', {bounds}' if bounds else ''}"
    return (
        f"| `{section}.{field.alias or key}` | {kind} | {_default(field)} | {on_resume} "
        f"| {_one_line(field.description or '')} |\n"
    )


def _type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(f"`{json.dumps(value)}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_type(each) for each in arguments if each is not type(None))
    if origin is list:
        return f"list of {_type(arguments[0])}"
    if origin is dict:
        return f"table of {_type(arguments[1])} by name"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return f"`{{{', '.join(annotation.model_fields)}}}`"
    return {int: "integer", float: "number", str: "text", bool: "true or false"}[annotation]


def _bounds(field: FieldInfo) -> Iterator[str]:
    for rule in field.metadata:
        match rule:
            case Ge(ge=least):
                yield f"at least {least}"
            case Gt(gt=least):
                yield f"above {least}"
            case Le(le=most):
                yield f"at most {most}"
            case Lt(lt=most):
                yield f"below {most}"
            case MinLen():
                yield "not empty"
            case _:
                yield {"^[^/]+$": "without `/`"}[rule.pattern]


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required"
    return "absent" if field.default is None else f"`{json.dumps(field.default)}`"


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
