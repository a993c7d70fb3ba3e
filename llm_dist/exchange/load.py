"""Opens a Hugging Face folder as a model of ours: its `[model]`, its heads, and each parameter when it is asked for.

Needs neither `transformers` nor any code that lies in the folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from llm_dist.config import Heads, Model
from llm_dist.errors import UserError
from llm_dist.exchange import table
from llm_dist.exchange.bert import pad_id_of
from llm_dist.exchange.config_keys import HuggingFaceConfig, read_config
from llm_dist.exchange.rows import Row
from llm_dist.exchange.tensor_files import TensorFiles
from llm_dist.model.hugging_face import NAMES, ModelType
from llm_dist.model.size import parameter_shapes
from llm_dist.tokenizer import PAD

_BUFFERS = re.compile(r"(^|\.)(attn\.(masked_)?bias|position_ids|token_type_ids|inv_freq)$")
"""Tables that older checkpoints carry along, and that are computed."""
_OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


@dataclass(frozen=True)
class HuggingFaceModel:
    """What a folder holds, in our words."""

    folder: Path
    model: Model
    vocabulary_tokens: int
    heads: Heads
    """Those whose parameters are all there."""
    labels: tuple[str, ...]
    """Names of the classes, in their order."""
    files: TensorFiles
    names: Mapping[str, str]
    """Full names of theirs -> as the files have them."""
    rows: Mapping[str, Row]
    """Parameters of ours -> the tensor of theirs that holds each."""

    def parameter(self, name: str) -> Tensor:
        """A parameter of ours, fp32 on the CPU; rows that pad the vocabulary are zero.

        Raises:
            UserError: it is not there, or its file is damaged.
        """
        if name not in self.rows:
            raise UserError(f"{self.folder} has no {name}")
        row = self.rows[name]
        return row.part(self.files.read(self.names[row.name]), name, self.shapes)

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of every parameter of ours that the folder may hold."""
        return parameter_shapes(self.model, self.vocabulary_tokens, _every_head(self.heads))

    def padded_to(self, vocabulary_multiple: int) -> HuggingFaceModel:
        """The same, its vocabulary padded up to a multiple of so many rows."""
        return replace(self, model=self.model.model_copy(update={"vocabulary_multiple": vocabulary_multiple}))


def is_hugging_face(folder: Path) -> bool:
    """Whether a folder is one of theirs rather than a run of ours."""
    try:
        keys = read_config(folder).table
    except UserError:
        return False
    return "model_type" in keys or "architectures" in keys


def open_folder(folder: Path) -> HuggingFaceModel:
    """Open a folder and check that its tensors are there, in the right shapes; reads no weights yet.

    Raises:
        UserError: an unknown model or key, or files or tensors that are missing or damaged.
    """
    config = read_config(folder)
    kind, model = table.kind_of(config), table.model_of(config)
    vocabulary_tokens = int(config.number("vocab_size", 50257 if kind == "gpt2" else None))
    files = TensorFiles(folder)
    names = _full_names(files.names, kind)
    architecture = str((config.table.get("architectures") or [""])[0])
    tables = _Tables(model, kind, pad_id_of(config), architecture.endswith("TokenClassification"))
    heads = _heads(tables, architecture, files, names)
    _require_all(folder, tables.rows(_promised(architecture)), names)
    there = [row for row in tables.rows(_EVERY) if row.name in names]
    _require_no_more(folder, kind, names, {row.name for row in tables.rows(_EVERY)})
    shapes = parameter_shapes(model, vocabulary_tokens, _every_head(heads))
    for row in there:
        wanted, found = row.shape(shapes, model, vocabulary_tokens), files.shape(names[row.name])
        if found != wanted:
            raise UserError(
                f"{folder}: {names[row.name]} has shape {list(found)}, but config.json means {list(wanted)}"
            )
    labels = _labels(config, heads.classes)
    rows = {source: row for row in there for source in row.sources}
    return HuggingFaceModel(folder, model, vocabulary_tokens, heads, labels, files, names, rows)


_NO_HEADS = Heads(language=False)
_EVERY = Heads(pair=True, classes=1)


def _every_head(there: Heads) -> Heads:
    """All parameters that can be asked for have a shape here."""
    return Heads(language=True, pair=True, classes=there.classes or 1, per_token=there.per_token and not there.pair)


class _Tables(NamedTuple):
    """The rows of a folder's model, for any heads."""

    model: Model
    kind: ModelType
    pad_id: int
    per_token: bool

    def rows(self, heads: Heads) -> list[Row]:
        return table.rows(self.model, heads._replace(per_token=self.per_token), {PAD: self.pad_id}, self.kind)

    def head_rows(self, heads: Heads) -> list[Row]:
        body = set(self.rows(_NO_HEADS))
        return [row for row in self.rows(heads) if row not in body]


def _full_names(names: Iterable[str], kind: ModelType) -> dict[str, str]:
    """Names as a newer model with heads has them -> as the files have them."""
    prefix, base_names, _ = table.known_names(kind)
    full = {}
    for name in names:
        modern = name
        for old, new in _OLD_NAMES.items():
            modern = modern.replace(old, new)
        full[f"{prefix}{modern}" if modern.startswith(base_names) else modern] = name
    for head in ("cls.predictions", "lm_head"):
        if f"{head}.decoder.bias" in full:
            full.setdefault(f"{head}.bias", full[f"{head}.decoder.bias"])
    return full


def _heads(tables: _Tables, architecture: str, files: TensorFiles, names: Mapping[str, str]) -> Heads:
    """Those of which every tensor is there; a tied head for tokens has none of its own."""

    def has(heads: Heads) -> bool:
        return all(row.name in names for row in tables.head_rows(heads))

    classes = _NO_HEADS._replace(classes=1)
    output = next((row for row in tables.head_rows(classes) if row.sources == ("class_head.output.weight",)), None)
    num_classes = files.shape(names[output.name])[0] if output is not None and has(classes) else 0
    return Heads(
        language=has(Heads()) and (_promised(architecture).language or "For" not in architecture),
        pair=tables.kind == "bert" and has(_NO_HEADS._replace(pair=True)),
        classes=num_classes,
        per_token=tables.per_token,
    )


def _promised(architecture: str) -> Heads:
    """Heads that a class of theirs has."""
    return Heads(
        language=architecture.endswith(("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForPreTraining")),
        pair=architecture.endswith("ForPreTraining"),
        classes=int(architecture.endswith("TokenClassification")),
    )


def _require_all(folder: Path, rows: Sequence[Row], names: Mapping[str, str]) -> None:
    if missing := [row.name for row in rows if row.name not in names and not _may_lack(row)]:
        raise UserError(
            f"{folder} lacks {len(missing)} of the tensors that its config.json means, first {missing[0]}; "
            "fetch the folder again"
        )


def _may_lack(row: Row) -> bool:
    """The bias of an untied head stands twice in newer folders, once in older ones."""
    return row.name.endswith(".decoder.bias")


def _require_no_more(folder: Path, kind: ModelType, names: Mapping[str, str], known: set[str]) -> None:
    """What the body holds besides would be left out of what is computed."""
    prefix, _, tied = table.known_names(kind)
    for full, name in names.items():
        if full.startswith(prefix) and full not in known and full not in tied and not _BUFFERS.search(full):
            raise UserError(f"{folder}: tensor {name} belongs to no {NAMES[kind]} model of this config.json")


def _labels(config: HuggingFaceConfig, num_classes: int) -> tuple[str, ...]:
    given: Mapping[str, Any] = config.table.get("id2label") or {}
    return tuple(str(given.get(str(number), f"LABEL_{number}")) for number in range(num_classes))
