"""ModernBERT: names of tensors and keys, both ways."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llm_dist.config import FeedForwardKind, Heads, Model
from llm_dist.exchange.config_keys import ACTIVATION_NAMES, HuggingFaceConfig, global_every_of, rope_of
from llm_dist.exchange.rows import Row, linear_rows

PREFIX = "model."
BASE_NAMES = ("embeddings.", "layers.", "final_norm.")
TIED = {"decoder.weight": "head.weight"}

_GATED: dict[str, FeedForwardKind] = {"gelu": "geglu", "silu": "swiglu"}
_THETAS = {"full_attention": 160_000.0, "sliding_attention": 10_000.0}


def body_rows(model: Model) -> Iterator[Row]:
    """All but the heads."""
    yield Row("model.embeddings.tok_embeddings.weight", ("embedding.weight",), trimmed=True)
    yield from linear_rows("model.embeddings.norm", "embedding_norm", has_bias=model.norm_bias)
    has_biases = model.biases == "all"
    for layer in range(model.layers):
        theirs, ours = f"model.layers.{layer}", f"blocks.{layer}"
        if model.has_attention_norm(layer):
            yield from linear_rows(f"{theirs}.attn_norm", f"{ours}.attention_norm", has_bias=model.norm_bias)
        joined = (f"{ours}.attention.{name}" for name in ("query", "key", "value"))
        yield from linear_rows(f"{theirs}.attn.Wqkv", *joined, has_bias=has_biases)
        yield from linear_rows(f"{theirs}.attn.Wo", f"{ours}.attention.output", has_bias=has_biases)
        yield from linear_rows(f"{theirs}.mlp_norm", f"{ours}.feed_forward_norm", has_bias=model.norm_bias)
        halves = (f"{ours}.feed_forward.{name}" for name in ("gate", "up"))
        yield from linear_rows(f"{theirs}.mlp.Wi", *halves, has_bias=has_biases)
        yield from linear_rows(f"{theirs}.mlp.Wo", f"{ours}.feed_forward.down", has_bias=has_biases)
    yield from linear_rows("model.final_norm", "norm", has_bias=model.norm_bias)


def head_rows(model: Model, heads: Heads) -> Iterator[Row]:
    """The head for tokens; that for classes has a layer that ours lacks."""
    if not heads.language:
        return
    yield from linear_rows("head.dense", "head.transform.dense", has_bias=model.biases == "all")
    yield from linear_rows("head.norm", "head.transform.norm", has_bias=model.norm_bias)
    if not model.tied_head:
        yield Row("decoder.weight", ("head.weight",), trimmed=True)
    yield Row("decoder.bias", ("head.bias",), trimmed=True)


def keys(model: Model, _heads: Heads) -> dict[str, Any]:
    """Content of config.json."""
    windowed = [model.is_windowed(layer) for layer in range(model.layers)]
    local_theta = model.window_rope_theta or model.rope_theta
    activation, has_biases = ACTIVATION_NAMES[model.feed_forward], model.biases == "all"
    return {
        "model_type": "modernbert",
        "hidden_size": model.d_model,
        "intermediate_size": model.width_ff,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "max_position_embeddings": model.max_sequence_tokens,
        "hidden_activation": activation,
        "classifier_activation": activation,
        "norm_eps": model.norm_eps,
        "norm_bias": model.norm_bias,
        "attention_bias": has_biases,
        "mlp_bias": has_biases,
        "classifier_bias": has_biases,
        "decoder_bias": True,
        "local_attention": model.window_tokens or 128,
        "layer_types": ["sliding_attention" if window else "full_attention" for window in windowed],
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": model.rope_theta},
            "sliding_attention": {"rope_type": "default", "rope_theta": local_theta},
        },
        # Readers older than `layer_types` and `rope_parameters` look here.
        "global_attn_every_n_layers": _global_every(model),
        "global_rope_theta": model.rope_theta,
        "local_rope_theta": local_theta,
        "embedding_dropout": model.dropout,
        "mlp_dropout": 0.0,
        "attention_dropout": 0.0,
    }


def _global_every(model: Model) -> int:
    """Where no layer sees everything, older readers still let the first do so."""
    return 1 if model.window_tokens is None else model.global_every or model.layers


def model_keys(config: HuggingFaceConfig) -> dict[str, Any]:
    """Our `[model]` of a config.json.

    Raises:
        UserError: a key has a value that we do not compute the same.
    """
    table = config.table
    feed_forward = config.chosen("hidden_activation", _GATED, "gelu")
    config.require("classifier_activation", table.get("hidden_activation", "gelu"))
    has_biases = bool(table.get("attention_bias", False))
    config.require("mlp_bias", has_biases)
    config.require("classifier_bias", has_biases)
    config.require("decoder_bias", True)
    return {
        "family": "modernbert",
        "layers": config.number("num_hidden_layers", 22),
        "d_model": config.number("hidden_size", 768),
        "heads": config.number("num_attention_heads", 12),
        "d_ff": config.number("intermediate_size", 1152),
        "max_sequence_tokens": config.number("max_position_embeddings", 8192),
        "feed_forward": feed_forward,
        "norm_eps": config.number("norm_eps", 1e-5),
        "norm_bias": bool(table.get("norm_bias", False)),
        "biases": "all" if has_biases else "none",
        "tied_head": bool(table.get("tie_word_embeddings", True)),
        "dropout": config.number("embedding_dropout", 0.0),
        **_windows(config),
    }


def _windows(config: HuggingFaceConfig) -> dict[str, Any]:
    table, layers = config.table, config.number("num_hidden_layers", 22)
    every = config.number("global_attn_every_n_layers", 3)
    types = table.get("layer_types") or [
        "sliding_attention" if layer % every else "full_attention" for layer in range(layers)
    ]
    has_window, global_every = global_every_of(config, types)
    everywhere, local = _theta(config, "full_attention"), _theta(config, "sliding_attention")
    if not has_window:
        return {"rope_theta": everywhere}
    return {
        "window_tokens": 2 * (config.number("local_attention", 128) // 2),
        "global_every": global_every,
        "rope_theta": everywhere if global_every is not None else local,
        "window_rope_theta": local if global_every is not None and local != everywhere else None,
    }


def _theta(config: HuggingFaceConfig, layer_type: str) -> float:
    """Base of the rotary frequencies in layers of a type."""
    older = {"full_attention": "global_rope_theta", "sliding_attention": "local_rope_theta"}[layer_type]
    rope = dict((config.table.get("rope_parameters") or {}).get(layer_type) or {})
    rope.setdefault("rope_theta", config.table.get(older) or _THETAS[layer_type])
    if config.table.get("rope_scaling") is not None:
        rope |= config.table["rope_scaling"]
    found = rope_of(HuggingFaceConfig(config.folder, {"rope_parameters": rope}))
    if "rope_scaling" in found:
        raise config.refusal("rope_parameters.rope_type", "llama3", '"default"')
    return float(found["rope_theta"])
