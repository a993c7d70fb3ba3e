"""Small random Hugging Face models of every class that can be read, and ours made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llm_dist.exchange.export import export
from llm_dist.exchange.load import HuggingFaceModel, open_folder
from llm_dist.model.transformer import Transformer
from llm_dist.tokenizer import PAD, SPECIAL_TOKENS

transformers = pytest.importorskip("transformers", reason="needs the extra llm_dist[hf]")

VOCABULARY_TOKENS = 101
PAD_ID = SPECIAL_TOKENS.index(PAD)

_LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_MODERN = {"local_attention": 8, "cls_token_id": 3, "sep_token_id": 4, "bos_token_id": 3, "eos_token_id": 4}
_GROUPED = {"num_key_value_heads": 2}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "llama-tied-biases-wide": (
        "LlamaForCausalLM",
        {**_GROUPED, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 16},
    ),
    "llama3": (
        "LlamaForCausalLM",
        {**_GROUPED, "rope_parameters": {**_LLAMA3, "original_max_position_embeddings": 16}},
    ),
    "llama-tagger": ("LlamaForTokenClassification", {"num_labels": 3}),
    "qwen2": ("Qwen2ForCausalLM", {**_GROUPED, "tie_word_embeddings": True}),
    "qwen2-window": (
        "Qwen2ForCausalLM",
        {**_GROUPED, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
    ),
    "qwen2-global-every": (
        "Qwen2ForCausalLM",
        {**_GROUPED, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3ForCausalLM", {**_GROUPED, "head_dim": 16}),
    "mistral": ("MistralForCausalLM", {**_GROUPED, "head_dim": 16, "sliding_window": 5}),
    "mistral-everywhere": ("MistralForCausalLM", {**_GROUPED, "sliding_window": None}),
    "gpt2": ("GPT2LMHeadModel", {}),
    "gpt2-untied-relu": ("GPT2LMHeadModel", {"tie_word_embeddings": False, "activation_function": "relu"}),
    "gpt2-tagger": ("GPT2ForTokenClassification", {"num_labels": 3}),
    "bert": ("BertForMaskedLM", {}),
    "bert-untied": ("BertForMaskedLM", {"tie_word_embeddings": False, "hidden_act": "gelu_new"}),
    "bert-pairs": ("BertForPreTraining", {}),
    "bert-classes": ("BertForSequenceClassification", {"num_labels": 3}),
    "bert-tags": ("BertForTokenClassification", {"num_labels": 3}),
    "roberta": ("RobertaForMaskedLM", {"type_vocab_size": 1}),
    "roberta-classes": ("RobertaForSequenceClassification", {"type_vocab_size": 1, "num_labels": 3}),
    "roberta-tags": ("RobertaForTokenClassification", {"type_vocab_size": 1, "num_labels": 3}),
    "modernbert": ("ModernBertForMaskedLM", {**_MODERN, "layer_types": ["full_attention", "sliding_attention"]}),
    "modernbert-biases": (
        "ModernBertForMaskedLM",
        {
            **_MODERN,
            "layer_types": ["sliding_attention"] * 2,
            "norm_bias": True,
            "attention_bias": True,
            "mlp_bias": True,
            "classifier_bias": True,
            "tie_word_embeddings": False,
        },
    ),
}


def theirs(case: str, seed: int = 0, **changes: Any) -> Any:
    """A model of theirs whose every weight matters."""
    name, keys = CASES[case]
    model_class = getattr(transformers, name)
    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY_TOKENS,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "pad_token_id": PAD_ID,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    shape["n_inner" if name.startswith("GPT2") else "intermediate_size"] = 48
    torch.manual_seed(seed)
    model = model_class(model_class.config_class(**(shape | keys | changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.2)
    return model.eval()


def ours(source: HuggingFaceModel) -> Transformer:
    """The model of a folder, with its weights."""
    model = Transformer(source.model, source.vocabulary_tokens, torch.float32, source.heads)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(source.parameter(name))
    return model.eval()


def saved(case: str, folder: Path, **options: Any) -> Any:
    """Write a model of theirs; returns it."""
    model = theirs(case, **options)
    model.save_pretrained(folder)
    return model


def exported(source: HuggingFaceModel, out: Path) -> str:
    """Write what was read; returns the class."""
    tokenizer = out.parent / "tokenizer"
    tokenizer.mkdir(exist_ok=True)
    weights = {name: source.parameter(name) for name, _ in ours(source).named_parameters()}
    return export(
        weights,
        source.model,
        tokenizer,
        out,
        real_vocabulary_tokens=source.vocabulary_tokens,
        heads=source.heads,
        labels=source.labels,
    )


def reopened(source: HuggingFaceModel, folder: Path) -> HuggingFaceModel:
    """Exported and read again."""
    exported(source, folder)
    return open_folder(folder)
