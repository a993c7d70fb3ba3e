"""GPT-2: names of tensors and keys, both ways."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llm_dist.config import Heads, Model
from llm_dist.exchange.config_keys import ACTIVATION_NAMES, ACTIVATIONS, HuggingFaceConfig
from llm_dist.exchange.rows import SINUSOIDS, Row, linear_rows

PREFIX = "transformer."
BASE_NAMES = ("wte.", "wpe.", "h.", "ln_f.")
TIED = {"lm_head.weight": "head.weight"}


def body_rows(model: Model) -> Iterator[Row]:
    """All but the heads."""
    yield Row("transformer.wte.weight", ("embedding.weight",), trimmed=True)
    learned = model.positions == "learned"
    yield Row("transformer.wpe.weight", ("positions.weight" if learned else SINUSOIDS,))
    names: dict[str, tuple[str, ...]] = {
        "ln_1": ("attention_norm",),
        "attn.c_attn": ("attention.query", "attention.key", "attention.value"),
        "attn.c_proj": ("attention.output",),
        "ln_2": ("feed_forward_norm",),
        "mlp.c_fc": ("feed_forward.up",),
        "mlp.c_proj": ("feed_forward.down",),
    }
    for layer in range(model.layers):
        for theirs, ours in names.items():
            sources = (f"blocks.{layer}.{source}" for source in ours)
            is_matrix = not theirs.startswith("ln_")
            yield from linear_rows(f"transformer.h.{layer}.{theirs}", *sources, has_bias=True, transposed=is_matrix)
    yield from linear_rows("transformer.ln_f", "norm", has_bias=True)


def head_rows(model: Model, heads: Heads) -> Iterator[Row]:
    """The heads."""
    if heads.language and not model.tied_head:
        yield Row("lm_head.weight", ("head.weight",), trimmed=True)
    if heads.classes:
        yield from linear_rows("classifier", "class_head.output", has_bias=True)


def keys(model: Model, _heads: Heads) -> dict[str, Any]:
    """Content of config.json."""
    return {
        "model_type": "gpt2",
        "n_embd": model.d_model,
        "n_inner": model.width_ff,
        "n_layer": model.layers,
        "n_head": model.heads,
        "n_positions": model.max_sequence_tokens,
        "activation_function": ACTIVATION_NAMES[model.feed_forward],
        "layer_norm_epsilon": model.norm_eps,
        "embd_pdrop": model.dropout,
        "resid_pdrop": model.dropout,
        "attn_pdrop": 0.0,
    }


def model_keys(config: HuggingFaceConfig) -> dict[str, Any]:
    """Our `[model]` of a config.json.

    Raises:
        UserError: a key has a value that we do not compute the same.
    """
    config.require("scale_attn_weights", True)
    config.require("scale_attn_by_inverse_layer_idx", False)
    width = config.number("n_embd", 768)
    return {
        "family": "gpt2",
        "layers": config.number("n_layer", 12),
        "d_model": width,
        "heads": config.number("n_head", 12),
        "d_ff": config.number("n_inner", 4 * width),
        "max_sequence_tokens": config.number("n_positions", 1024),
        "feed_forward": config.chosen("activation_function", ACTIVATIONS, "gelu_new"),
        "norm_eps": config.number("layer_norm_epsilon", 1e-5),
        "tied_head": bool(config.table.get("tie_word_embeddings", True)),
        "dropout": config.number("resid_pdrop", 0.1),
    }
