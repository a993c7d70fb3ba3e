"""Small models of every kind that the tests of this room share."""

from __future__ import annotations

from typing import Any

import torch

from llm_dist.config import Model
from llm_dist.model.init import initialize
from llm_dist.model.transformer import Transformer

VOCABULARY_TOKENS = 101

KINDS: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama"},
    "llama-grouped": {"family": "llama", "kv_heads": 2},
    "llama-tied": {"family": "llama", "tied_head": True},
    "qwen3": {"family": "llama", "kv_heads": 2, "qk_norm": True},
    "gpt2": {"family": "gpt2"},
    "gpt2-untied": {"family": "gpt2", "tied_head": False},
    "gpt2-sinusoidal": {"family": "gpt2", "positions": "sinusoidal"},
    "qwen2": {"family": "llama", "kv_heads": 2, "biases": "qkv"},
    "mistral": {"family": "llama", "kv_heads": 2, "d_head": 16, "window_tokens": 6},
    "bert": {"family": "bert"},
    "bert-rotary-geglu": {"family": "bert", "positions": "rotary", "feed_forward": "geglu", "segments": 0},
    "bert-pre-norm": {"family": "bert", "norm_position": "pre", "embedding_norm": False, "tied_head": False},
    "classic": {"family": "bert", "embedding_norm": False, "segments": 0, "feed_forward": "relu"},
    "modernbert": {"family": "modernbert", "window_tokens": 8, "global_every": 2, "window_rope_theta": 100.0},
}
CAUSAL = [kind for kind, keys in KINDS.items() if keys["family"] in ("llama", "gpt2")]
ENCODERS = [kind for kind in KINDS if kind not in CAUSAL]


def small(kind: str, **changes: Any) -> Model:
    """A model of two layers that runs in milliseconds."""
    return Model(
        **{"layers": 2, "d_model": 32, "heads": 4, "d_ff": 48, "max_sequence_tokens": 64} | KINDS[kind] | changes
    )


def built(model: Model, dtype: torch.dtype = torch.float32, std: float = 0.2, seed: int = 0) -> Transformer:
    """A Transformer with weights large enough for every part to matter."""
    transformer = Transformer(model, VOCABULARY_TOKENS, dtype)
    initialize(transformer, model, std, seed)
    return transformer


def some_ids(num_sequences: int = 2, num_tokens: int = 16, seed: int = 0) -> torch.Tensor:
    """Random token ids [B, T]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY_TOKENS, (num_sequences, num_tokens), generator=generator)
