"""From a Hugging Face folder to a run: the run file that uses it, and the folder that `llm-dist import` makes."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_dist import config
from llm_dist.config import Model
from llm_dist.errors import UserError
from llm_dist.exchange.load import HuggingFaceModel, open_folder
from llm_dist.tokenizer_import import import_tokenizer

_SEQUENCE_TOKENS = 2048
_SEQUENCES_PER_STEP = 64

_RUN_FILE = """\
# Goes on training {source}.
# First: llm-dist tokenize TEXT --tokenizer {tokenizer} --out SHARDS

[run]
name = "{name}"
steps = 1000

# The model of the folder. Where positions are rotary, max_sequence_tokens, rope_theta and rope_scaling may change, to
# read longer sequences; the other keys belong to the weights.
[model]
{model}

[init]
from = {quoted}

[objective]
name = "{objective}"

[data]
train = "SHARDS/train"
holdout = "SHARDS/holdout"
sequence_tokens = {sequence_tokens}
{packing}
[batch]
tokens_per_step = {tokens_per_step}

# A tenth of the rate that a first training would have.
[optim]
lr = 3e-5
warmup_steps = 50
"""


@dataclass(frozen=True)
class Prepared:
    """What `llm-dist import` made."""

    run_file: str
    tokenizer: str
    vocabulary_tokens: int
    labels: tuple[str, ...]
    tokenizer_fingerprint: str


def prepare(folder: Path, out: Path) -> Prepared:
    """Write `out`/tokenizer and `out`/run.toml, with which a run starts from the folder's weights.

    Raises:
        UserError: the folder cannot be read, or `out` is in use.
    """
    source = open_folder(folder)
    run_file = out / "run.toml"
    if run_file.exists():
        raise UserError(f"{run_file} is there already; name another folder")
    imported = import_tokenizer(folder, out / "tokenizer")
    text = _run_file(source, out)
    partial = run_file.with_name(f".run.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.rename(run_file)
    return Prepared(
        str(run_file), str(out / "tokenizer"), source.vocabulary_tokens, source.labels, imported.fingerprint
    )


def run_of(source: HuggingFaceModel) -> config.Config:
    """A run file as if the folder's weights had been trained by it.

    Raises:
        UserError: the folder has no head to use.
    """
    heads, model = source.heads, source.model
    if not heads.language and not heads.classes:
        raise UserError(f"{source.folder} has a body without a head; start a run from it with init.from")
    sequence_tokens = _sequence_tokens(model)
    table: dict[str, Any] = {
        "run": {"name": source.folder.resolve().name or "imported", "steps": 1},
        "model": model.model_dump(),
        "objective": {"name": _objective(source)},
        "data": {"train": "nowhere", "sequence_tokens": sequence_tokens, "labels": list(source.labels)},
        "batch": {"tokens_per_step": 2 * sequence_tokens},
        "optim": {"warmup_steps": 0},
        "engine": {"precision": "fp32"},
    }
    if not heads.language or heads.pair:
        table["data"]["packing"] = "separate"
    return config.parse(table, origin=str(source.folder))


def _sequence_tokens(model: Model) -> int:
    return min(_SEQUENCE_TOKENS, model.max_sequence_tokens)


def _objective(source: HuggingFaceModel) -> str:
    if not source.heads.language and source.heads.classes:
        return "tag" if source.heads.per_token else "classify"
    if source.heads.pair:
        return "masked_nsp"
    return "causal" if source.model.is_causal else "masked"


def _run_file(source: HuggingFaceModel, out: Path) -> str:
    sequence_tokens = _sequence_tokens(source.model)
    objective = _objective(source)
    return _RUN_FILE.format(
        source=source.folder,
        tokenizer=out / "tokenizer",
        name=source.folder.resolve().name or "imported",
        model="\n".join(f"{key} = {_toml(value)}" for key, value in _keys(source.model).items()),
        quoted=_toml(str(source.folder.resolve())),
        objective=objective,
        sequence_tokens=sequence_tokens,
        packing='packing = "separate"\n' if objective in ("masked_nsp", "classify", "tag") else "",
        tokens_per_step=sequence_tokens * _SEQUENCES_PER_STEP,
    )


def _keys(model: Model) -> dict[str, Any]:
    """Keys that the family does not give the same value."""
    required = {"family": model.family, "layers": model.layers, "d_model": model.d_model, "heads": model.heads}
    by_default = Model(**(required | {"d_head": model.d_head})).model_dump()
    needed = {key: value for key, value in model.model_dump().items() if by_default[key] != value}
    if model.d_head * model.heads != model.d_model:
        needed["d_head"] = model.d_head
    return required | needed


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(inner)}" for key, inner in value.items()) + " }"
    return json.dumps(value)
