"""The Transformer: embedding, blocks, final norm, heads; one set of layers for every family.

Knows no parallelism and no engine. Weights are garbage until `init.initialize` or a checkpoint has filled them.

Shape letters: B batch, T sequence, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from llm_dist import config
from llm_dist.config import LANGUAGE, Heads, Lora
from llm_dist.model.adapters import add_adapters
from llm_dist.model.attention import (
    Attention,
    Cache,
    LayerCache,
    Rotary,
    RowsCache,
    rotary_tables,
    same_document,
    sinusoids,
    visible,
    visible_by_position,
)
from llm_dist.model.heads import ClassHead, LanguageHead, Pooler
from llm_dist.model.layers import Embedding, FeedForward, GatedFeedForward, norm_of
from llm_dist.model.size import padded_vocabulary


class Sight(NamedTuple):
    """What the attention of a block depends on besides the hidden states."""

    rotary: Rotary | None
    mask: Tensor | None
    """As `attention.attend` takes it."""


class Block(nn.Module):
    """Attention and feed-forward, each beside the residual, with a norm in front of it or behind both."""

    def __init__(self, model: config.Model, layer: int = 1) -> None:
        super().__init__()
        feed_forward = GatedFeedForward if model.is_gated else FeedForward
        self.is_pre_norm = model.norm_position == "pre"
        self.attention_norm = norm_of(model) if model.has_attention_norm(layer) else None
        self.attention = Attention(model)
        self.feed_forward_norm = norm_of(model)
        self.feed_forward = feed_forward(model.d_model, model.width_ff, model.feed_forward, model.biases == "all")
        self.dropout = nn.Dropout(model.dropout)

    def forward(
        self, x: Tensor, rotary: Rotary | None = None, mask: Tensor | None = None, cache: LayerCache | None = None
    ) -> Tensor:
        """[B, T, D] -> [B, T, D]; `mask` as `attention.attend` takes it."""
        y: Tensor
        if not self.is_pre_norm:
            assert self.attention_norm is not None
            x = self.attention_norm(x + self.dropout(self.attention(x, rotary, mask, cache)))
            y = self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))
            return y
        normed = x if self.attention_norm is None else self.attention_norm(x)
        x = x + self.dropout(self.attention(normed, rotary, mask, cache))
        y = x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        return y


class Transformer(nn.Module):
    """Token ids to hidden states; the heads turn these into logits or losses."""

    def __init__(
        self,
        model: config.Model,
        vocabulary_tokens: int,
        compute_dtype: torch.dtype,
        heads: Heads = LANGUAGE,
        lora: Lora | None = None,
    ) -> None:
        """`vocabulary_tokens` is the tokenizer's; embedding and head are padded, their padding is never predicted."""
        super().__init__()
        self.config = model
        self.vocabulary_tokens = vocabulary_tokens
        self.compute_dtype = compute_dtype
        rows = padded_vocabulary(model, vocabulary_tokens)
        table = Embedding(rows, model.d_model, compute_dtype)
        self.embedding = table
        self.positions = (
            Embedding(model.max_sequence_tokens, model.d_model, compute_dtype) if model.positions == "learned" else None
        )
        self.segments = Embedding(model.segments, model.d_model, compute_dtype) if model.segments else None
        self.embedding_norm = norm_of(model) if model.embedding_norm else None
        self.dropout = nn.Dropout(model.dropout)
        self.blocks = nn.ModuleList(Block(model, layer) for layer in range(model.layers))
        self.norm = norm_of(model) if model.norm_position == "pre" else None
        self.head = LanguageHead(model, vocabulary_tokens, rows) if heads.language else None
        self.pooler = Pooler(model.d_model) if heads.has_pooler(model) else None
        self.pair_head = ClassHead(model.d_model, 2, model.dropout) if heads.pair else None
        self.class_head = ClassHead(model.d_model, heads.classes, model.dropout) if heads.classes else None
        if self.head is not None and model.tied_head:
            self.head.weight = self.embedding.weight
        if lora is not None:
            add_adapters(self, lora)

    @property
    def language(self) -> LanguageHead:
        """The head that predicts tokens; there is none in a classifier."""
        assert self.head is not None, "this model has no language head"
        return self.head

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: Cache | None = None,
        segment_ids: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [B, T, D] after the last norm, in `compute_dtype`.

        Args:
            input_ids: int64 [B, T].
            positions: int64 [B, T]; when None, 0..T-1 after what `cache` has seen of the row.
            document_ids: int64 [B, T]; attention stays among equal ids. None: the row is one document.
            cache: keys and values of the tokens before; extended by these.
            segment_ids: int64 [B, T]; None: all of the first segment.
        """
        assert cache is None or document_ids is None, "a cache holds one document per row"
        seen, num_tokens = (cache.num_tokens if cache else 0), input_ids.size(1)
        if positions is None:
            device = input_ids.device
            positions = cache.positions(num_tokens, device) if cache else torch.arange(num_tokens, device=device)[None]
        x = self._embed(input_ids, positions, segment_ids)
        if isinstance(cache, RowsCache):
            everywhere, windowed = self._sights_by_row(positions, seen)
        else:
            everywhere, windowed = self._sights(positions, document_ids, seen)
        for layer, block in enumerate(self.blocks):
            sight = windowed if self.config.is_windowed(layer) else everywhere
            x = block(x, sight.rotary, sight.mask, cache.layers[layer] if cache else None)
        return x if self.norm is None else self.norm(x)

    def _embed(self, input_ids: Tensor, positions: Tensor, segment_ids: Tensor | None) -> Tensor:
        x: Tensor = self.embedding(input_ids)
        if self.positions is not None:
            x = x + self.positions(positions)
        elif self.config.positions == "sinusoidal":
            x = x + sinusoids(positions, self.config.d_model).to(x.dtype)
        if self.segments is not None:
            x = x + self.segments(torch.zeros_like(input_ids[:1, :1]) if segment_ids is None else segment_ids)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        embedded: Tensor = self.dropout(x)
        return embedded

    def _sights(self, positions: Tensor, document_ids: Tensor | None, seen: int) -> tuple[Sight, Sight]:
        """Of blocks that see everything, and of those that see a window."""
        same = None if document_ids is None else same_document(document_ids)
        everywhere = self._mask(positions, same, seen, False)
        is_windowed = self.config.window_tokens is not None
        return self._sights_under(
            positions, everywhere, self._mask(positions, same, seen, True) if is_windowed else None
        )

    def _sights_by_row(self, positions: Tensor, seen: int) -> tuple[Sight, Sight]:
        """As `_sights`, of rows of different lengths, the longest of which has seen `seen` tokens."""
        num_keys = seen + positions.size(1)
        everywhere, windowed = (
            visible_by_position(positions, num_keys, self.config, is_windowed=is_windowed)
            for is_windowed in (False, True)
        )
        return self._sights_under(positions, everywhere, windowed)

    def _sights_under(
        self, positions: Tensor, everywhere_mask: Tensor | None, windowed_mask: Tensor | None
    ) -> tuple[Sight, Sight]:
        model = self.config
        everywhere = Sight(self._rotary(positions, model.rope_theta), everywhere_mask)
        if model.window_tokens is None:
            return everywhere, everywhere
        theta = model.window_rope_theta or model.rope_theta
        rotary = everywhere.rotary if theta == model.rope_theta else self._rotary(positions, theta)
        return everywhere, Sight(rotary, windowed_mask)

    def _mask(self, positions: Tensor, same: Tensor | None, seen: int, is_windowed: bool) -> Tensor | None:
        """None where attention needs none, or can tell by itself."""
        model, num_tokens = self.config, positions.size(1)
        reach = model.window_tokens if model.is_causal else (model.window_tokens or 0) // 2 + 1
        is_cut = is_windowed and seen + num_tokens > (reach or 0)
        if not is_cut and (not model.is_causal or (same is None and (not seen or num_tokens == 1))):
            return same
        place = visible(num_tokens, seen + num_tokens, model, is_windowed=is_windowed, device=positions.device)
        return place if same is None else same & place

    def _rotary(self, positions: Tensor, theta: float) -> Rotary | None:
        if self.config.positions != "rotary":
            return None
        return rotary_tables(positions, self.config.d_head, theta, self.config.rope_scaling)
