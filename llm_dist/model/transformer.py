"""The decoder: embedding, blocks, final norm; one set of layers for every family.

Knows no parallelism and no engine. What a family means is decided in `Block` and `Transformer.__init__` and nowhere
else. Weights are garbage until `init.initialize` or a checkpoint has filled them.

Shape letters: B batch, T sequence, D model width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llm_dist import config
from llm_dist.model.attention import (
    Attention,
    Cache,
    LayerCache,
    Rotary,
    causal_mask,
    document_mask,
    rotary_tables,
    sinusoids,
)
from llm_dist.model.heads import LanguageHead
from llm_dist.model.layers import Embedding, FeedForward, GatedFeedForward, LayerNorm, RMSNorm
from llm_dist.model.size import padded_vocabulary


def _norm(model: config.Model) -> nn.Module:
    return (RMSNorm if model.family == "llama" else LayerNorm)(model.d_model, model.norm_eps)


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm and beside the residual."""

    def __init__(self, model: config.Model) -> None:
        super().__init__()
        bias = model.family == "gpt2"
        feed_forward = GatedFeedForward if model.family == "llama" else FeedForward
        self.attention_norm = _norm(model)
        self.attention = Attention(model, bias)
        self.feed_forward_norm = _norm(model)
        self.feed_forward = feed_forward(model.d_model, model.width_ff, bias)
        self.dropout = nn.Dropout(model.dropout)

    def forward(
        self, x: Tensor, rotary: Rotary | None = None, mask: Tensor | None = None, cache: LayerCache | None = None
    ) -> Tensor:
        """[B, T, D] -> [B, T, D]; `mask` as `attention.attend` takes it."""
        x = x + self.dropout(self.attention(self.attention_norm(x), rotary, mask, cache))
        y: Tensor = x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        return y


class Transformer(nn.Module):
    """Token ids to hidden states; `head` turns these into logits or a loss."""

    def __init__(self, model: config.Model, vocabulary_tokens: int, compute_dtype: torch.dtype) -> None:
        """`vocabulary_tokens` is the tokenizer's; embedding and head are padded, their padding is never predicted."""
        super().__init__()
        self.config = model
        self.vocabulary_tokens = vocabulary_tokens
        self.compute_dtype = compute_dtype
        rows = padded_vocabulary(model, vocabulary_tokens)
        self.embedding = Embedding(rows, model.d_model, compute_dtype)
        self.positions = (
            Embedding(model.max_sequence_tokens, model.d_model, compute_dtype)
            if model.position_kind == "learned"
            else None
        )
        self.dropout = nn.Dropout(model.dropout)
        self.blocks = nn.ModuleList(Block(model) for _ in range(model.layers))
        self.norm = _norm(model)
        self.head = LanguageHead(model.d_model, vocabulary_tokens, rows)
        if model.head_is_tied:
            self.head.weight = self.embedding.weight

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Hidden states [B, T, D] after the final norm, in `compute_dtype`.

        Args:
            input_ids: int64 [B, T].
            positions: int64 [B, T]; when None, 0..T-1 after what `cache` has seen.
            document_ids: int64 [B, T]; attention stays among equal ids. None: the row is one document.
            cache: keys and values of the tokens before; extended by these.
        """
        assert cache is None or document_ids is None, "a cache holds one document per row"
        seen, num_tokens = (cache.num_tokens if cache else 0), input_ids.size(1)
        if positions is None:
            positions = torch.arange(seen, seen + num_tokens, device=input_ids.device)[None]
        x = self.dropout(self._embed(input_ids, positions))
        rotary = self._rotary(positions)
        mask = None
        if document_ids is not None:
            mask = document_mask(document_ids)
        elif seen and num_tokens > 1:
            mask = causal_mask(num_tokens, seen + num_tokens, input_ids.device)
        for layer, block in enumerate(self.blocks):
            x = block(x, rotary, mask, cache.layers[layer] if cache else None)
        hidden: Tensor = self.norm(x)
        return hidden

    def _embed(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        x: Tensor = self.embedding(input_ids)
        if self.positions is not None:
            x = x + self.positions(positions)
        elif self.config.position_kind == "sinusoidal":
            x = x + sinusoids(positions, self.config.d_model).to(x.dtype)
        return x

    def _rotary(self, positions: Tensor) -> Rotary | None:
        if self.config.position_kind != "rotary":
            return None
        return rotary_tables(positions, self.config.d_head, self.config.rope_theta)
