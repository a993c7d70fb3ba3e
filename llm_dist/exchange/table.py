"""How a Hugging Face folder names, arranges and configures what we call by other names; writes nothing.

One row per tensor of theirs: the parameters of ours it is made of and how. What cannot be exported is decided in
`llm_dist.model.hugging_face`; a model that reaches this room can be.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llm_dist.config import Model
from llm_dist.model.attention import sinusoids
from llm_dist.tokenizer import PAD, SEPARATOR, SPECIAL_TOKENS

SINUSOIDS = "(sinusoids)"
"""Stands where a table of theirs is computed by ours."""


class Row(NamedTuple):
    """A tensor of a Hugging Face model."""

    name: str
    sources: tuple[str, ...]
    """Parameters of ours, joined along their first axis."""
    transposed: bool = False
    """GPT-2 keeps [in, out] where others keep [out, in]."""
    trimmed: bool = False
    """Rows beyond the tokenizer's vocabulary are padding and stay here."""

    def shape(self, shapes: Mapping[str, tuple[int, ...]], model: Model, vocabulary_tokens: int) -> tuple[int, ...]:
        """Shape of their tensor, given the shapes of ours."""
        if self.sources == (SINUSOIDS,):
            return model.max_sequence_tokens, model.d_model
        rows = sum(shapes[source][0] for source in self.sources)
        shape = (vocabulary_tokens if self.trimmed else rows, *shapes[self.sources[0]][1:])
        return shape[::-1] if self.transposed else shape

    def value(self, weights: Mapping[str, Tensor], model: Model, vocabulary_tokens: int) -> Tensor:
        """Their tensor, made of ours; may share memory with it."""
        if self.sources == (SINUSOIDS,):
            return sinusoids(torch.arange(model.max_sequence_tokens)[None], model.d_model)[0]
        parts = [weights[source] for source in self.sources]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        whole = whole[:vocabulary_tokens] if self.trimmed else whole
        return whole.t() if self.transposed else whole


def rows(model: Model) -> list[Row]:
    """Every tensor of the exported model."""
    return list(_gpt2_rows(model) if model.family == "gpt2" else _llama_rows(model))


def _llama_rows(model: Model) -> Iterator[Row]:
    yield Row("model.embed_tokens.weight", ("embedding.weight",), trimmed=True)
    names = {
        "input_layernorm": "attention_norm",
        "self_attn.q_proj": "attention.query",
        "self_attn.k_proj": "attention.key",
        "self_attn.v_proj": "attention.value",
        "self_attn.o_proj": "attention.output",
        "post_attention_layernorm": "feed_forward_norm",
        "mlp.gate_proj": "feed_forward.gate",
        "mlp.up_proj": "feed_forward.up",
        "mlp.down_proj": "feed_forward.down",
    }
    if model.qk_norm:
        names |= {"self_attn.q_norm": "attention.query_norm", "self_attn.k_norm": "attention.key_norm"}
    for layer in range(model.layers):
        for theirs, ours in names.items():
            yield Row(f"model.layers.{layer}.{theirs}.weight", (f"blocks.{layer}.{ours}.weight",))
    yield Row("model.norm.weight", ("norm.weight",))
    if not model.tied_head:
        yield Row("lm_head.weight", ("head.weight",), trimmed=True)


def _gpt2_rows(model: Model) -> Iterator[Row]:
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
            for kind in ("weight", "bias"):
                sources = tuple(f"blocks.{layer}.{source}.{kind}" for source in ours)
                is_matrix = kind == "weight" and not theirs.startswith("ln_")
                yield Row(f"transformer.h.{layer}.{theirs}.{kind}", sources, transposed=is_matrix)
    yield Row("transformer.ln_f.weight", ("norm.weight",))
    yield Row("transformer.ln_f.bias", ("norm.bias",))
    if not model.tied_head:
        yield Row("lm_head.weight", ("head.weight",), trimmed=True)


def token_ids() -> dict[str, int]:
    """The separator begins and ends a document."""
    separator = SPECIAL_TOKENS.index(SEPARATOR)
    return {"bos_token_id": separator, "eos_token_id": separator, "pad_token_id": SPECIAL_TOKENS.index(PAD)}


def hugging_face_config(model: Model, hugging_face_class: str, vocabulary_tokens: int, dtype: str) -> dict[str, Any]:
    """Content of config.json; `dtype` by torch's name."""
    common = {
        "architectures": [hugging_face_class],
        "vocab_size": vocabulary_tokens,
        "tie_word_embeddings": model.tied_head,
        "dtype": dtype,
        "use_cache": True,
    } | token_ids()
    return common | (_gpt2_keys(model) if model.family == "gpt2" else _llama_keys(model))


def _llama_keys(model: Model) -> dict[str, Any]:
    return {
        "model_type": "qwen3" if model.qk_norm else "llama",
        "hidden_size": model.d_model,
        "intermediate_size": model.width_ff,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.d_head,
        "max_position_embeddings": model.max_sequence_tokens,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        # Readers older than `rope_parameters` look for the base here.
        "rope_theta": model.rope_theta,
        "attention_bias": False,
        "attention_dropout": 0.0,
    } | ({"use_sliding_window": False} if model.qk_norm else {"mlp_bias": False})


def _gpt2_keys(model: Model) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "n_embd": model.d_model,
        "n_inner": model.width_ff,
        "n_layer": model.layers,
        "n_head": model.heads,
        "n_positions": model.max_sequence_tokens,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": model.norm_eps,
        "embd_pdrop": model.dropout,
        "resid_pdrop": model.dropout,
        "attn_pdrop": 0.0,
    }
