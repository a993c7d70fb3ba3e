"""The first weights of a run from a Hugging Face folder: what must fit, what may differ, and what is new.

Knows no engine: it answers for one parameter at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Runtime
from torch import Tensor

from llm_dist.config import Heads, Model
from llm_dist.errors import UserError
from llm_dist.exchange.load import HuggingFaceModel, open_folder
from llm_dist.exchange.rows import Shapes
from llm_dist.model.size import parameter_shapes
from llm_dist.tokenizer import DEFINITION_FILE, Tokenizer

Fill = Callable[[str, Sequence[int]], Tensor]
"""Name and shape of a parameter -> its first value."""

_OF_HEADS = ("head.", "pooler.", "pair_head.", "class_head.")
_FREE = {"family", "dropout", "vocabulary_multiple"}
"""Keys that no weight depends on."""
_REACH = ("window_tokens", "global_every", "rope_theta", "window_rope_theta", "rope_scaling")
"""Keys that a run may change on purpose, to read longer sequences; said in one line each."""


def fill_from_hugging_face(
    folder: Path,
    model: Model,
    heads: Heads,
    tokenizer: Tokenizer,
    otherwise: Fill,
    report: Callable[[str], None],
) -> Fill:
    """First values of a run's parameters: those of the folder, and `otherwise` of heads that it lacks.

    Raises:
        UserError: the folder cannot be read, or model or tokenizer of the run do not fit it.
    """
    source = open_folder(folder).padded_to(model.vocabulary_multiple)
    _require_tokenizer(source, tokenizer)
    _require_same_model(source, model, heads, report)
    shapes = parameter_shapes(model, source.vocabulary_tokens, heads)
    new = new_heads(folder, shapes, {name: source.shapes[name] for name in source.rows}, report)

    def fill(name: str, shape: Sequence[int]) -> Tensor:
        return otherwise(name, shape) if name in new else source.parameter(name)

    return fill


def new_heads(source: Path, shapes: Shapes, there: Shapes, report: Callable[[str], None]) -> frozenset[str]:
    """Parameters of heads that the source of a run lacks, or has in another shape; says in one line which they are.

    Args:
        shapes: of the run's parameters.
        there: of the source's.
    """
    new = [name for name, shape in shapes.items() if name.startswith(_OF_HEADS) and there.get(name) != shape]
    if new:
        report(f"init.from={source} has no weights for {', '.join(sorted(new))}: they start at random")
    return frozenset(new)


def _require_tokenizer(source: HuggingFaceModel, tokenizer: Tokenizer) -> None:
    unfit = f"init.from={source.folder}: the tokenizer does not fit the checkpoint"
    way_out = "; tokenize with its own, which `llm-dist tokenizer import` takes from it"
    if tokenizer.vocabulary_tokens != source.vocabulary_tokens:
        raise UserError(
            f"{unfit}: the data's has {tokenizer.vocabulary_tokens} tokens, the checkpoint "
            f"{source.vocabulary_tokens}{way_out}"
        )
    if not (source.folder / DEFINITION_FILE).is_file():
        return
    theirs = Runtime.from_file(str(source.folder / DEFINITION_FILE)).get_vocab(with_added_tokens=True)
    ours = tokenizer.vocabulary()
    if ours != theirs:
        token = min(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
        raise UserError(
            f"{unfit}: token {token!r} has id {ours.get(token)} in the data's, {theirs.get(token)} there{way_out}"
        )


def _require_same_model(source: HuggingFaceModel, model: Model, heads: Heads, report: Callable[[str], None]) -> None:
    free = {*_FREE, *_REACH}
    if model.positions != "learned":
        free.add("max_sequence_tokens")
    if not heads.language:
        free |= {"tied_head", "head_transform"}
    for key in Model.model_fields:
        here, there = _resolved(model, key), _resolved(source.model, key)
        if here != there and key not in free:
            raise UserError(
                f"init.from={source.folder}: model.{key}={here} here, {there} there; give the run the model of the "
                "folder, as `llm-dist import` writes it"
            )
    for key in _REACH:
        here, there = _resolved(model, key), _resolved(source.model, key)
        if here != there:
            report(f"init.from={source.folder} was trained with model.{key}={there}; this run has {here}")


def _resolved(model: Model, key: str) -> Any:
    """Value of a key, with what it means where it is absent."""
    match key:
        case "kv_heads":
            return model.num_kv_heads
        case "d_ff":
            return model.width_ff
        case "window_rope_theta":
            return None if model.window_tokens is None else model.window_rope_theta or model.rope_theta
    return getattr(model, key)
