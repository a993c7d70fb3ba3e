"""The run file as a whole: its sections together, and how it is read, overridden and written.

A run file is TOML written by hand or JSON written by a machine; unknown keys are refused. Validation reads no file, no
environment and no torch.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self, cast

from pydantic import ValidationError, model_validator

from llm_dist.config_fields import OnResume, Section
from llm_dist.config_model import LANGUAGE, FeedForwardKind, Heads, Model, RopeScaling
from llm_dist.config_sections import (
    BatchSize,
    Checkpoint,
    Data,
    Engine,
    Eval,
    Guard,
    Init,
    Log,
    Objective,
    Optim,
    Plan,
    Run,
    Segment,
    Watch,
)
from llm_dist.errors import UserError

__all__ = [
    "BatchSize",
    "Checkpoint",
    "Config",
    "Data",
    "Engine",
    "Eval",
    "FeedForwardKind",
    "Guard",
    "Heads",
    "Init",
    "LANGUAGE",
    "Log",
    "Model",
    "Objective",
    "OnResume",
    "Optim",
    "Plan",
    "RopeScaling",
    "Run",
    "Section",
    "Segment",
    "Watch",
    "fields",
    "fingerprints",
    "load",
    "parse",
    "run_config_path",
]


class Config(Section):
    """A complete run file."""

    run: Run
    model: Model
    data: Data
    batch: BatchSize
    optim: Optim = Optim()
    engine: Engine = Engine()
    checkpoint: Checkpoint = Checkpoint()
    eval: Eval = Eval()
    guard: Guard = Guard()
    watch: Watch = Watch()
    log: Log = Log()
    objective: Objective = Objective()
    init: Init = Init()
    plan: Plan = Plan()

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        tokens, sequence = self.batch.tokens_per_step, self.data.sequence_tokens
        if tokens % sequence:
            near = max(1, round(tokens / sequence)) * sequence
            raise ValueError(
                f"batch.tokens_per_step={tokens} must be a multiple of data.sequence_tokens={sequence}; nearest: {near}"
            )
        if sequence > self.model.max_sequence_tokens:
            raise ValueError(
                f"data.sequence_tokens={sequence} is longer than model.max_sequence_tokens="
                f"{self.model.max_sequence_tokens}; raise the latter"
            )
        if self.optim.warmup_steps > self.schedule_steps:
            raise ValueError(
                f"optim.warmup_steps={self.optim.warmup_steps} is longer than the schedule's "
                f"{self.schedule_steps} steps (optim.total_steps, else run.steps)"
            )
        return self

    @model_validator(mode="after")
    def _engine_can_skip(self) -> Self:
        if self.guard.policy == "skip" and self.engine.name == "zero":
            raise ValueError(
                'guard.policy="skip" needs an engine that can leave an update out; engine.name="zero" has made it when '
                'its numbers are known: choose guard.policy="rewind_and_skip", or engine.name="fsdp"'
            )
        return self

    @model_validator(mode="after")
    def _engine_can_freeze(self) -> Self:
        if self.optim.frozen and self.engine.name == "zero":
            raise ValueError('optim.frozen needs engine.name="plain" or "fsdp"; ZeRO updates whole flat buffers')
        return self

    @model_validator(mode="after")
    def _objective_fits(self) -> Self:
        objective, model, packing = self.objective, self.model, self.data.packing
        named = f'objective.name="{objective.name}"'
        if objective.is_masked and model.is_causal:
            raise ValueError(f'{named} needs model.attention="bidirectional", as model.family="bert" has it')
        if objective.name in ("causal", "instruct") and not model.is_causal:
            raise ValueError(f'{named} needs model.attention="causal", as model.family="llama" has it')
        if objective.is_paired and packing != "separate":
            raise ValueError(f'{named} needs data.packing="separate": a row holds two texts, not parts of many')
        if objective.name == "masked_nsp" and self.sequences_per_step < 2:
            raise ValueError(f"{named} needs at least 2 sequences per step; raise batch.tokens_per_step")
        if self.eval.best not in objective.scores:
            raise ValueError(
                f'eval.best="{self.eval.best}" is no score of {named}; choose one of {", ".join(objective.scores)}'
            )
        if objective.num_frame_tokens and self.text_tokens < 2:
            raise ValueError(f"data.sequence_tokens={self.data.sequence_tokens} leaves no room for text; raise it")
        return self

    @property
    def schedule_steps(self) -> int:
        """Steps the learning-rate schedule spans."""
        return self.optim.total_steps or self.run.steps

    @property
    def sequences_per_step(self) -> int:
        """Rows of a step's global set, S."""
        return self.batch.tokens_per_step // self.data.sequence_tokens

    @property
    def text_tokens(self) -> int:
        """Tokens of text in a sequence: what the objective does not put around it."""
        return self.data.sequence_tokens - self.objective.num_frame_tokens

    @property
    def heads(self) -> Heads:
        """What the model ends in."""
        name = self.objective.name
        if name in ("classify", "tag"):
            return Heads(language=False, classes=len(self.data.labels), per_token=name == "tag")
        return Heads(pair=self.objective.is_paired)

    @property
    def scored_tokens(self) -> int:
        """Most positions of a sequence that reach the head."""
        if self.objective.is_masked:
            return max(1, round(self.objective.mask_fraction * self.text_tokens))
        return 1 if self.objective.name == "classify" else self.data.sequence_tokens

    @property
    def save_every_steps(self) -> int:
        """Checkpoint interval, resolved."""
        return self.checkpoint.every_steps or max(1, self.run.steps // 10)

    def frozen(self) -> Config:
        """The config as a new run keeps it: the schedule's length no longer follows `run.steps`."""
        return self.model_copy(update={"optim": self.optim.model_copy(update={"total_steps": self.schedule_steps})})

    def to_json(self) -> str:
        """Canonical text: every key, sorted, as config.json holds it."""
        return json.dumps(self.model_dump(by_alias=True), indent=2, sort_keys=True) + "\n"


def fingerprints(run: Config) -> dict[str, str]:
    """sha256 of the model section and of the whole run file, as a checkpoint records them."""
    parts = {"model": run.model.model_dump_json(), "config": run.to_json()}
    return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in parts.items()}


def load(source: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a run file (.toml or .json) or a run folder's config.json and apply `section.key=value` overrides.

    Raises:
        UserError: one line for each mistake.
    """
    path = Path(source)
    if not path.is_dir():
        return parse(_read_table(path), overrides, str(path))
    file = run_config_path(path)
    table = _read_table(file)
    if isinstance(table.get("run"), dict):  # the folder may have been moved, or be named from another place
        folder = path if path.name else path.resolve()
        table["run"] |= {"dir": str(folder.parent), "name": folder.name}
    return parse(table, overrides, str(file))


def run_config_path(folder: Path) -> Path:
    """Path of the frozen config of a run folder; refuses a folder that is none."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} is not a run folder: it has no config.json; name a run file or a run folder")
    return path


def parse(table: dict[str, Any], overrides: Sequence[str] = (), origin: str = "run file") -> Config:
    """Validate a table after applying overrides; `origin` names it in messages."""
    for text in overrides:
        _apply_override(table, text)
    try:
        return Config.model_validate(table)
    except ValidationError as error:
        raise UserError("\n".join(f"{origin}: {line}" for line in _mistakes(error))) from None


def _read_table(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such run file or run folder") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; a run file is TOML or JSON") from None
    try:
        table = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (json.JSONDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path}: {error}") from None
    if not isinstance(table, dict):
        raise UserError(f"{path}: a run file is a table of sections, not a {type(table).__name__}")
    return table


def _apply_override(table: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or len(parts) != 2 or not all(parts):
        raise UserError(f"override {text!r} must read section.key=value, for example optim.lr=3e-4")
    section = table.setdefault(parts[0], {})
    if not isinstance(section, dict):
        raise UserError(f"override {text!r}: {parts[0]} is not a section")
    section[parts[1]] = _toml_value(value.strip())


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _mistakes(error: ValidationError) -> Iterator[str]:
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"] if part not in ("str", "list[str]"))
        if item["type"] == "extra_forbidden":
            yield f"{key} is not a key of a run file{_nearest(key)}"
        elif item["type"] == "missing":
            yield f"{key} is missing and has no default"
        elif item["type"] == "value_error":
            yield str(item["ctx"]["error"])
        else:
            yield f"{key}={item['input']!r}: {item['msg'][0].lower()}{item['msg'][1:]}"


def _nearest(key: str) -> str:
    from difflib import get_close_matches

    near = get_close_matches(key, [*fields(), *Config.model_fields], n=1, cutoff=0.75)
    if near:
        return f"; did you mean {near[0]}?"
    section = key.partition(".")[0]
    keys = [name.partition(".")[2] for name in fields() if name.startswith(f"{section}.")]
    return f"; [{section}] has {', '.join(keys)}" if keys else f"; the sections are {', '.join(Config.model_fields)}"


def fields() -> dict[str, OnResume]:
    """Every dotted key of a run file and what a change of it means on resume."""
    return {
        f"{section}.{field.alias or name}": cast(dict[str, OnResume], field.json_schema_extra)["on_resume"]
        for section, table in Config.model_fields.items()
        for name, field in cast(type[Section], table.annotation).model_fields.items()
    }
