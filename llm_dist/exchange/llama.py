"""Llama, Qwen2, Qwen3 and Mistral: names of tensors and keys, both ways."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llm_dist.config import Heads, Model
from llm_dist.exchange.config_keys import HuggingFaceConfig, global_every_of, rope_of
from llm_dist.exchange.rows import Row, linear_rows
from llm_dist.model.hugging_face import ModelType, model_type

PREFIX = "model."
BASE_NAMES = ("embed_tokens.", "layers.", "norm.")
TIED = {"lm_head.weight": "head.weight"}


def body_rows(model: Model) -> Iterator[Row]:
    """All but the heads."""
    yield Row("model.embed_tokens.weight", ("embedding.weight",), trimmed=True)
    into, others = model.biases != "none", model.biases == "all"
    for layer in range(model.layers):
        theirs, ours = f"model.layers.{layer}", f"blocks.{layer}"
        names = {
            "input_layernorm": ("attention_norm", False),
            "self_attn.q_proj": ("attention.query", into),
            "self_attn.k_proj": ("attention.key", into),
            "self_attn.v_proj": ("attention.value", into),
            "self_attn.o_proj": ("attention.output", others),
            "post_attention_layernorm": ("feed_forward_norm", False),
            "mlp.gate_proj": ("feed_forward.gate", others),
            "mlp.up_proj": ("feed_forward.up", others),
            "mlp.down_proj": ("feed_forward.down", others),
        }
        if model.qk_norm:
            names |= {
                "self_attn.q_norm": ("attention.query_norm", False),
                "self_attn.k_norm": ("attention.key_norm", False),
            }
        for name, (source, has_bias) in names.items():
            yield from linear_rows(f"{theirs}.{name}", f"{ours}.{source}", has_bias=has_bias)
    yield Row("model.norm.weight", ("norm.weight",))


def head_rows(model: Model, heads: Heads) -> Iterator[Row]:
    """The heads."""
    if heads.language and not model.tied_head:
        yield Row("lm_head.weight", ("head.weight",), trimmed=True)
    if heads.classes:
        yield from linear_rows("score", "class_head.output", has_bias=True)


def keys(model: Model, _heads: Heads) -> dict[str, Any]:
    """Content of config.json."""
    kind = model_type(model)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rope_theta}
    if model.rope_scaling is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": model.rope_scaling.factor,
            "low_freq_factor": model.rope_scaling.low_frequency_factor,
            "high_freq_factor": model.rope_scaling.high_frequency_factor,
            "original_max_position_embeddings": model.rope_scaling.original_tokens,
        }
    return {
        "model_type": kind,
        "hidden_size": model.d_model,
        "intermediate_size": model.width_ff,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.d_head,
        "max_position_embeddings": model.max_sequence_tokens,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "rope_parameters": rope,
        # Readers older than `rope_parameters` look for the base here.
        "rope_theta": model.rope_theta,
        "attention_dropout": 0.0,
        **({"rope_scaling": rope} if model.rope_scaling is not None else {}),
        **_kind_keys(kind, model),
    }


def _kind_keys(kind: ModelType, model: Model) -> dict[str, Any]:
    match kind:
        case "llama":
            return {"attention_bias": model.biases == "all", "mlp_bias": model.biases == "all"}
        case "mistral":
            return {"sliding_window": model.window_tokens}
    bias = {"attention_bias": False} if kind == "qwen3" else {}
    if model.window_tokens is None:
        return {"use_sliding_window": False, **bias}
    windowed = [model.is_windowed(layer) for layer in range(model.layers)]
    return {
        "use_sliding_window": True,
        "sliding_window": model.window_tokens,
        "max_window_layers": 0,
        "layer_types": ["sliding_attention" if window else "full_attention" for window in windowed],
        **bias,
    }


_NORM_EPS = 1e-6
_KV_HEADS: dict[str, int] = {"qwen2": 32, "qwen3": 32, "mistral": 8}
"""What a config.json that leaves the key out means."""


def model_keys(config: HuggingFaceConfig) -> dict[str, Any]:
    """Our `[model]` of a config.json.

    Raises:
        UserError: a key has a value that we do not compute the same.
    """
    kind, table = config.table["model_type"], config.table
    config.require("hidden_act", "silu", "swish")
    if kind == "qwen3":
        config.require("attention_bias", False)
    width, heads = config.number("hidden_size"), config.number("num_attention_heads")
    return {
        "family": "llama",
        "layers": config.number("num_hidden_layers"),
        "d_model": width,
        "heads": heads,
        "kv_heads": config.number("num_key_value_heads", min(heads, _KV_HEADS.get(kind, heads))),
        "d_head": config.number("head_dim", 128 if kind == "qwen3" else width // heads),
        "d_ff": config.number("intermediate_size"),
        "max_sequence_tokens": config.number("max_position_embeddings", 2048),
        "norm_eps": config.number("rms_norm_eps", _NORM_EPS),
        "tied_head": bool(table.get("tie_word_embeddings", False)),
        "qk_norm": kind == "qwen3",
        "biases": _biases(config),
        **rope_of(config),
        **_window(config),
    }


def _biases(config: HuggingFaceConfig) -> str:
    if config.table["model_type"] == "qwen2":
        return "qkv"
    if config.table["model_type"] != "llama":
        return "none"
    attention, feed_forward = (bool(config.table.get(key)) for key in ("attention_bias", "mlp_bias"))
    if attention != feed_forward:
        raise config.refusal("attention_bias", attention, f"the value of mlp_bias={str(feed_forward).lower()}")
    return "all" if attention else "none"


def _window(config: HuggingFaceConfig) -> dict[str, Any]:
    table, layers = config.table, config.number("num_hidden_layers")
    if table["model_type"] == "mistral":
        config.require("layer_types", None, ["sliding_attention"] * layers)
        window = table.get("sliding_window", 4096)
        return {} if window is None else {"window_tokens": window}
    if table["model_type"] == "llama" or not table.get("use_sliding_window") or table.get("sliding_window") is None:
        return {}
    first = table.get("max_window_layers", 28)
    types = table.get("layer_types") or [
        "sliding_attention" if layer >= first else "full_attention" for layer in range(layers)
    ]
    has_window, every = global_every_of(config, types)
    return {"window_tokens": table["sliding_window"], "global_every": every} if has_window else {}
