"""PEFT loads our updates onto the model they were made for, and computes what our merged export computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llm_dist import config
from llm_dist.config_lora import ADAPTER
from llm_dist.errors import UserError
from llm_dist.exchange.adapter import export_adapter
from llm_dist.exchange.export import export
from llm_dist.exchange.table import OUR_IDS
from llm_dist.model.adapters import merged
from llm_dist.model.size import parameter_shapes
from tests.unit.model.shapes import KINDS, VOCABULARY_TOKENS, some_ids

EVERY = '["*.attention.*", "*.feed_forward.*"]'
CASES: dict[str, tuple[str, str, str]] = {
    "llama": ("llama-grouped", "causal", '["*.attention.query", "*.attention.value"]'),
    "llama, every layer": ("llama", "causal", EVERY),
    "gpt2, joined": ("gpt2", "instruct", '["*.attention.query", "*.attention.value"]'),
    "gpt2, every layer of a block": ("gpt2", "causal", '["blocks.1.*.*"]'),
    "llama, tags": ("qwen2", "tag", EVERY),
    "bert, classes": ("bert", "classify", '["*.query"]'),
    "roberta, classes": ("bert-one-segment", "classify", '["*.query", "*.down"]'),
    "modernbert": ("modernbert", "masked", EVERY),
}


def run_of(kind: str, objective: str, targets: str) -> config.Config:
    keys: dict[str, Any] = {"family": "bert", "segments": 1} if kind == "bert-one-segment" else KINDS[kind]
    table: dict[str, Any] = {
        "run": {"name": "x", "steps": 1},
        "model": {"layers": 2, "d_model": 32, "heads": 4, "d_ff": 48, "max_sequence_tokens": 64, "dropout": 0.0} | keys,
        "data": {"train": "nowhere", "sequence_tokens": 32},
        "batch": {"tokens_per_step": 64},
        "init": {"from": "base"},
        "objective": {"name": objective},
        "lora": {"rank": 3, "alpha": 6.0},
    }
    labels = 'data.labels=["a", "b", "c"]' if objective in ("classify", "tag") else "run.seed=1"
    return config.parse(table, [f"lora.targets={targets}", labels])


def random_weights(run: config.Config) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = parameter_shapes(run.model, VOCABULARY_TOKENS, run.heads, run.lora)
    return {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("case", CASES)
def test_peft_computes_what_the_merged_export_computes(tmp_path: Path, case: str) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra llm_dist[hf]")
    peft = pytest.importorskip("peft", reason="needs peft, which the tests install")
    run = run_of(*CASES[case])
    weights = random_weights(run)
    (tmp_path / "tokenizer").mkdir()
    base = {name: value for name, value in weights.items() if ADAPTER not in name}
    base |= {name: value + 1 for name, value in base.items() if name.startswith(("class_head.", "pooler."))}
    common: dict[str, Any] = {"real_vocabulary_tokens": VOCABULARY_TOKENS, "heads": run.heads}
    name = export(base, run.model, tmp_path / "tokenizer", tmp_path / "base", **common)
    export(merged(weights, run.lora), run.model, tmp_path / "tokenizer", tmp_path / "merged", **common)
    assert export_adapter(weights, run, tmp_path / "adapter", OUR_IDS) == name

    def logits(model: Any) -> Tensor:
        with torch.no_grad():
            found: Tensor = model.eval()(some_ids()).logits
        return found

    of_base = getattr(transformers, name).from_pretrained(tmp_path / "base")
    before = logits(of_base)
    expected = logits(getattr(transformers, name).from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(
        logits(peft.PeftModel.from_pretrained(of_base, tmp_path / "adapter")), expected, rtol=1e-5, atol=1e-5
    )
    assert not torch.allclose(before, expected, atol=1e-2), "updates matter"


def test_the_folder_says_what_it_is(tmp_path: Path) -> None:
    run = run_of("llama", "causal", '["blocks.1.attention.value"]')
    export_adapter(random_weights(run), run, tmp_path / "adapter", OUR_IDS)
    table = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert table["target_modules"] == ["model.layers.1.self_attn.v_proj"]
    assert (table["r"], table["lora_alpha"], table["task_type"]) == (3, 6.0, "CAUSAL_LM")
    assert (table["base_model_name_or_path"], table["modules_to_save"], table["rank_pattern"]) == ("base", None, {})


def test_what_has_no_class_has_no_adapter_there(tmp_path: Path) -> None:
    run = run_of("llama", "causal", EVERY)
    odd = run.model_copy(update={"model": run.model.model_copy(update={"feed_forward": "gelu"})})
    with pytest.raises(UserError, match="no Hugging Face class computes this model"):
        export_adapter({}, odd, tmp_path / "adapter", OUR_IDS)
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match="exists and is not an empty folder"):
        export_adapter(random_weights(run), run, tmp_path / "taken", OUR_IDS)
