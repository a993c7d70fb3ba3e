"""Which class of `transformers` computes the same as a model of ours, known before training.

A mapping of names only: imports neither torch nor transformers, so that a plan on a login node can tell. The keys of
`[model]` decide, never the family that set them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Literal

from llm_dist.config import LANGUAGE, Heads, Model

ModelType = Literal["llama", "qwen2", "qwen3", "mistral", "gpt2", "bert", "roberta", "modernbert"]
"""As config.json has it."""

NAMES: dict[ModelType, str] = {
    "llama": "Llama",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "mistral": "Mistral",
    "gpt2": "GPT2",
    "bert": "Bert",
    "roberta": "Roberta",
    "modernbert": "ModernBert",
}
"""How each type begins the names of its classes."""

_TABLE, _UNGATED = ("learned", "sinusoidal"), ("gelu", "gelu_tanh", "relu")
_EXPORTS_WITH: dict[str, dict[str, tuple[object, ...]]] = {
    "llama": {
        "norm_position": ("pre",),
        "positions": ("rotary",),
        "feed_forward": ("swiglu",),
        "embedding_norm": (False,),
        "segments": (0,),
        "head_transform": (False,),
    },
    "gpt2": {
        "norm_position": ("pre",),
        "positions": _TABLE,
        "feed_forward": _UNGATED,
        "biases": ("all",),
        "norm_bias": (True,),
        "embedding_norm": (False,),
        "segments": (0,),
        "head_transform": (False,),
        "window_tokens": (None,),
        "qk_norm": (False,),
    },
    "bert": {
        "norm": ("layer",),
        "positions": _TABLE,
        "feed_forward": _UNGATED,
        "biases": ("all",),
        "norm_bias": (True,),
        "embedding_norm": (True,),
        "head_transform": (True,),
        "window_tokens": (None,),
        "qk_norm": (False,),
    },
    "modernbert": {
        "norm": ("layer",),
        "positions": ("rotary",),
        "feed_forward": ("geglu", "swiglu"),
        "biases": ("none", "all"),
        "embedding_norm": (True,),
        "segments": (0,),
        "head_transform": (True,),
        "rope_scaling": (None,),
        "qk_norm": (False,),
    },
}
"""Values of the keys that the classes of a kind compute, by what decides the kind."""


def hugging_face_class(model: Model, heads: Heads = LANGUAGE) -> str | None:
    """Class that a checkpoint of this model exports to; None where none computes the same."""
    if why_not_exportable(model, heads):
        return None
    kind = model_type(model, heads)
    if heads.classes:
        return f"{NAMES[kind]}For{'Token' if heads.per_token else 'Sequence'}Classification"
    if heads.pair:
        return f"{NAMES[kind]}ForPreTraining"
    if kind == "gpt2":
        return "GPT2LMHeadModel"
    return f"{NAMES[kind]}For{'CausalLM' if model.is_causal else 'MaskedLM'}"


def model_type(model: Model, heads: Heads = LANGUAGE) -> ModelType:
    """Type of a model that is exportable, or that it is nearest to."""
    match _kind(model):
        case "gpt2":
            return "gpt2"
        case "modernbert":
            return "modernbert"
        case "bert":
            # Roberta's head has GELU whatever its blocks have, and it judges no pairs.
            return "roberta" if model.segments == 1 and model.feed_forward == "gelu" and not heads.pair else "bert"
    if model.qk_norm:
        return "qwen3"
    if model.biases == "qkv":
        return "qwen2"
    return "mistral" if model.biases == "none" and model.window_tokens is not None else "llama"


def why_not_exportable(model: Model, heads: Heads = LANGUAGE) -> str | None:
    """The first key that no class of `transformers` knows beside the others, and what it would have to be."""
    return next(_mistakes(model, heads), None)


def _kind(model: Model) -> str:
    if model.is_causal:
        return "llama" if model.norm == "rms" else "gpt2"
    return "bert" if model.norm_position == "post" else "modernbert"


def _mistakes(model: Model, heads: Heads) -> Iterator[str]:
    kind = _kind(model)
    beside = f"model.norm={model.norm}" if model.is_causal else f"model.norm_position={model.norm_position}"
    for key, allowed in _EXPORTS_WITH[kind].items():
        value = getattr(model, key)
        if value not in allowed and (heads.language or key != "head_transform"):
            choices = " or ".join("none" if choice is None else json.dumps(choice) for choice in allowed)
            yield f"model.{key}={_shown(value)} with {beside}; exports with {choices}"
    if kind == "llama":
        yield from _llama_mistakes(model)
    else:
        yield from _plain_heads(model)
    yield from _head_mistakes(model, heads)


def _shown(value: object) -> str:
    return json.dumps(value) if isinstance(value, bool) else str(value)


def _plain_heads(model: Model) -> Iterator[str]:
    """These classes have as many key/value heads as heads, which fill the width."""
    if model.num_kv_heads != model.heads:
        yield f"model.kv_heads={model.kv_heads}; without RMSNorm exports with model.heads={model.heads} of them"
    if model.d_head * model.heads != model.d_model:
        yield (
            f"model.d_head={model.d_head}; without RMSNorm exports with model.d_model / model.heads, "
            f"{model.d_model} / {model.heads}"
        )


def _llama_mistakes(model: Model) -> Iterator[str]:
    kind = model_type(model)
    if kind == "qwen3" and model.biases != "none":
        yield f'model.biases={model.biases} with model.qk_norm=true; exports with "none"'
    if kind == "llama" and model.window_tokens is not None:
        yield f'model.window_tokens={model.window_tokens} with model.biases=all; exports with "none" or "qkv"'
    if kind == "llama" and model.d_model % model.heads:
        yield f"model.heads={model.heads}; exports where they divide model.d_model={model.d_model}"
    if kind == "mistral" and model.global_every is not None:
        yield (
            f"model.global_every={model.global_every} without biases or model.qk_norm; exports with none, or with "
            'model.biases="qkv"'
        )
    if model.window_tokens is not None and model.window_rope_theta not in (None, model.rope_theta):
        yield f"model.window_rope_theta={model.window_rope_theta}; exports with model.rope_theta={model.rope_theta}"


def _head_mistakes(model: Model, heads: Heads) -> Iterator[str]:
    kind = model_type(model, heads)
    if heads.pair and kind != "bert":
        yield f"a head for pairs of texts; {NAMES[kind]} has none, Bert has (model.norm_position=post)"
    if heads.classes and heads.language:
        yield "a head for classes beside one for tokens; no class has both"
    if heads.classes and not heads.per_token and model.is_causal:
        yield f"classes of whole texts with model.attention=causal: {NAMES[kind]}'s head for them has no bias"
    if heads.classes and kind == "modernbert":
        yield "classes with model.norm_position=pre: ModernBert has another layer in front of them; exports with post"
