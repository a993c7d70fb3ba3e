"""Writes a model as a Hugging Face folder that `transformers` opens with no code of ours.

Needs neither `transformers` nor the engine that trained the model. The same weights give the same bytes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from llm_dist.config import LANGUAGE, Heads, Model
from llm_dist.errors import UserError
from llm_dist.exchange.rows import Row
from llm_dist.exchange.table import OUR_IDS, hugging_face_config, rows, token_ids
from llm_dist.model.hugging_face import hugging_face_class, why_not_exportable
from llm_dist.model.size import Precision, parameter_shapes

MAX_FILE_BYTES = 5 * 10**9
"""A weights file that would grow beyond this is split, as the hub likes it; a larger single tensor stays whole."""

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def export(
    weights: Mapping[str, Tensor],
    model: Model,
    tokenizer_folder: Path,
    out: Path,
    *,
    real_vocabulary_tokens: int,
    dtype: Precision = "fp32",
    heads: Heads = LANGUAGE,
    labels: tuple[str, ...] = (),
    special_ids: Mapping[str, int] = OUR_IDS,
    end_id: int | None = None,
) -> str:
    """Write `out` (config.json, safetensors, generation_config.json, tokenizer) and return the class that opens it.

    Args:
        weights: full fp32 parameters by the names of `Transformer`; asked for one file's worth at a time.
        real_vocabulary_tokens: the tokenizer's vocabulary; padded rows beyond it are left out.
        dtype: of the written weights.
        heads: what the model ends in.
        labels: names of its classes, in their order.
        special_ids: the tokenizer's.
        end_id: token that ends a text, where that is not the separator.

    Raises:
        UserError: no class of `transformers` computes this model, or `out` is in use or cannot be written.
    """
    name = hugging_face_class(model, heads)
    if name is None:
        raise UserError(f"no Hugging Face class computes this model: {why_not_exportable(model, heads)}")
    missing = parameter_shapes(model, real_vocabulary_tokens, heads).keys() - weights.keys()
    assert not missing, f"weights lack {sorted(missing)}"
    with publishing(out) as partial:
        torch_name = str(DTYPES[dtype]).removeprefix("torch.")
        keys = hugging_face_config(
            model,
            name,
            real_vocabulary_tokens,
            torch_name,
            heads=heads,
            labels=labels,
            special_ids=special_ids,
            end_id=end_id,
        )
        write_json(partial / "config.json", keys)
        if model.is_causal and heads.language:
            write_json(partial / "generation_config.json", token_ids(special_ids, end_id))
        shapes = parameter_shapes(model, real_vocabulary_tokens, heads)
        sizes = {
            row: prod(row.shape(shapes, model, real_vocabulary_tokens)) * DTYPES[dtype].itemsize
            for row in rows(model, heads, special_ids)
        }
        _write_weights(partial, weights, sizes, (model, real_vocabulary_tokens), DTYPES[dtype])
        for file in sorted(tokenizer_folder.iterdir()):
            if file.is_file():
                shutil.copyfile(file, partial / file.name)
    return name


@contextmanager
def publishing(out: Path) -> Iterator[Path]:
    """A folder that becomes `out` at the end, in one rename.

    Raises:
        UserError: `out` is in use or cannot be written.
    """
    partial = out.with_name(f".{out.name}.partial")
    try:
        _require_free(out)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        for file in partial.iterdir():  # safetensors writes files that nobody else may read
            file.chmod(partial.stat().st_mode & 0o666)
        partial.rename(out)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{out} cannot be written ({getattr(error, 'strerror', None) or error}); free the space or name another"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _require_free(out: Path) -> None:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder; name a folder that is not there yet")


def write_json(path: Path, table: Mapping[str, Any]) -> None:
    """Write a table as a file of their kind."""
    path.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_weights(
    folder: Path,
    weights: Mapping[str, Tensor],
    sizes: Mapping[Row, int],
    made_for: tuple[Model, int],
    dtype: torch.dtype,
) -> None:
    """Write every row; `sizes` in bytes, `made_for` the model and its vocabulary."""
    files = list(_split(sizes))
    place: dict[str, str] = {}
    for index, some_rows in enumerate(files, 1):
        name = "model.safetensors" if len(files) == 1 else f"model-{index:05}-of-{len(files):05}.safetensors"
        tensors: dict[str, Tensor] = {}
        written: set[tuple[str, ...]] = set()
        for row in some_rows:
            tensor = row.value(weights, *made_for).to(dtype).contiguous()
            # Two of theirs that are one of ours may not share its memory.
            tensors[row.name] = tensor.clone() if row.sources in written else tensor
            written.add(row.sources)
        save_file(tensors, folder / name, metadata={"format": "pt"})
        place |= dict.fromkeys(tensors, name)
    if len(files) > 1:
        index_table = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": place}
        write_json(folder / "model.safetensors.index.json", index_table)


def _split(sizes: Mapping[Row, int]) -> Iterator[list[Row]]:
    some_rows: list[Row] = []
    for row, num_bytes in sizes.items():
        if some_rows and sum(sizes[other] for other in some_rows) + num_bytes > MAX_FILE_BYTES:
            yield some_rows
            some_rows = []
        some_rows.append(row)
    yield some_rows
