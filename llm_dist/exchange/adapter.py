"""Writes low-rank updates as a folder that PEFT loads onto the Hugging Face model that a run started from.

Where their layer joins several of ours (GPT-2 reads query, key and value in one), the updates of these are one update
of a higher rank, whose parts leave each other's outputs alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from llm_dist.config import Config
from llm_dist.config_lora import ADAPTER, NEW_HEADS
from llm_dist.errors import UserError
from llm_dist.exchange.export import publishing, write_json
from llm_dist.exchange.rows import Row
from llm_dist.exchange.table import rows
from llm_dist.model.hugging_face import hugging_face_class, model_type, why_not_exportable

_PREFIX = "base_model.model."
"""What PEFT puts in front of the names of the model that it wraps."""
_TASKS = {"CausalLM": "CAUSAL_LM", "SequenceClassification": "SEQ_CLS", "TokenClassification": "TOKEN_CLS"}


def export_adapter(weights: Mapping[str, Tensor], run: Config, out: Path, special_ids: Mapping[str, int]) -> str:
    """Write `out` (adapter_config.json, adapter_model.safetensors) and return the class that it belongs to.

    Args:
        weights: full fp32 parameters, updates among them.
        run: the run file.
        out: folder to make.
        special_ids: the tokenizer's.

    Raises:
        UserError: no class of `transformers` computes this model, or `out` is in use or cannot be written.
    """
    name = hugging_face_class(run.model, run.heads)
    if name is None:
        raise UserError(f"no Hugging Face class computes this model: {why_not_exportable(run.model, run.heads)}")
    theirs = rows(run.model, run.heads, special_ids)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for row in theirs:
        if row.name.endswith(".weight") and (parts := _parts(row, weights)):
            layer = row.name.removesuffix(".weight")
            down, up = _joined(row, parts, weights)
            tensors |= {f"{_PREFIX}{layer}.lora_A.weight": down, f"{_PREFIX}{layer}.lora_B.weight": up}
            ranks[layer] = len(down)
    heads = [row for row in theirs if row.sources[0].startswith(NEW_HEADS)]
    tensors |= {f"{_PREFIX}{row.name}": weights[row.sources[0]].contiguous() for row in heads}
    with publishing(out) as partial:
        write_json(partial / "adapter_config.json", _config(run, name, ranks, heads))
        save_file(tensors, partial / "adapter_model.safetensors", metadata={"format": "pt"})
    return name


def _parts(row: Row, weights: Mapping[str, Tensor]) -> list[str]:
    """Layers of ours, among those that the row joins, that have an update."""
    layers = [source.removesuffix(".weight") for source in row.sources]
    return [layer for layer in layers if f"{layer}{ADAPTER}up" in weights]


def _joined(row: Row, parts: list[str], weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """One update of all that the row joins: down [r, in] and up [out, r]."""
    down = torch.cat([weights[f"{layer}{ADAPTER}down"] for layer in parts])
    up = torch.zeros(sum(len(weights[source]) for source in row.sources), len(down))
    first_output = first_rank = 0
    for source in row.sources:
        outputs = len(weights[source])
        if (layer := source.removesuffix(".weight")) in parts:
            own = weights[f"{layer}{ADAPTER}up"]
            up[first_output : first_output + outputs, first_rank : first_rank + own.size(1)] = own
            first_rank += own.size(1)
        first_output += outputs
    return down, up


def _config(run: Config, name: str, ranks: Mapping[str, int], heads: list[Row]) -> dict[str, Any]:
    """Content of adapter_config.json; alpha grows with a joined update's rank, so that its scale stays."""
    higher = {layer: own for layer, own in ranks.items() if own != run.lora.rank}
    task = next((task for ending, task in _TASKS.items() if name.endswith(ending)), None)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if name == "GPT2LMHeadModel" else task,
        "base_model_name_or_path": run.init.source,
        "r": run.lora.rank,
        "lora_alpha": run.lora.alpha,
        "lora_dropout": run.lora.dropout,
        "target_modules": list(ranks),
        "rank_pattern": higher,
        "alpha_pattern": {layer: run.lora.scale * own for layer, own in higher.items()},
        "modules_to_save": sorted({_module(row) for row in heads}) or None,
        "fan_in_fan_out": model_type(run.model, run.heads) == "gpt2",
        "bias": "none",
        "inference_mode": True,
    }


def _module(row: Row) -> str:
    """What PEFT keeps beside the updates; a classifier as a whole, as it does by itself."""
    module = row.name.rpartition(".")[0]
    return "classifier" if module.startswith("classifier.") else module
