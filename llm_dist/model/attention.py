"""Attention with grouped key/value heads, rotary or no positions, windows, and a cache for generation.

Shape letters: B batch, T sequence, D model width, H heads, K key/value heads, E head width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_dist import config
from llm_dist.model.layers import Linear, RMSNorm, widened_on
from llm_dist.model.size import SHORT_ATTENTION_TOKENS

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines, fp32 [B or 1, T, 1, E/2]."""


def rotary_tables(positions: Tensor, d_head: int, theta: float, scaling: config.RopeScaling | None = None) -> Rotary:
    """Angles of positions int64 [B or 1, T] (RoPE, arXiv 2104.09864).

    Computed in each forward pass, so that no buffer can be lost on the meta device or rounded by an engine's cast.
    """
    exponents = torch.arange(0, d_head, 2, dtype=torch.float32, device=positions.device) / d_head
    frequencies = 1.0 / torch.pow(theta, exponents)
    if scaling is not None:
        frequencies = stretched(frequencies, scaling)
    angles = positions[..., None, None].float() * frequencies
    return angles.cos(), angles.sin()


def stretched(frequencies: Tensor, scaling: config.RopeScaling) -> Tensor:
    """Rotary frequencies [E/2] as Llama 3.1 slows them down: the slow ones in full, the fast ones not at all."""
    turns = scaling.original_tokens * frequencies / (2 * math.pi)  # in the longest sequence of the first training
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return kept * frequencies + (1.0 - kept) * frequencies / scaling.factor


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Turn the pairs (i, i + E/2) of x [B, T, heads, E] by their position's angles, in fp32."""
    cos, sin = rotary
    first, second = x.float().chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


def sinusoids(positions: Tensor, width: int) -> Tensor:
    """Sines at even and cosines at odd places, fp32 [B or 1, T, D] (arXiv 1706.03762, section 3.5).

    There the embedding is multiplied by sqrt(D); here the table is divided by it, which the first norm cannot tell
    apart and which a Hugging Face position table can hold.
    """
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device=positions.device) / width
    angles = positions[..., None].float() * torch.pow(10_000.0, -exponents)
    table = torch.stack((angles.sin(), angles.cos()), -1).flatten(-2)[..., :width]
    return table / math.sqrt(width)


def visible(num_queries: int, num_keys: int, model: config.Model, *, is_windowed: bool, device: torch.device) -> Tensor:
    """Bool [queries, keys]: which keys a query may see by its place alone, queries being the last of the keys."""
    queries = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    behind = queries - torch.arange(num_keys, device=device)
    if model.is_causal:
        may = behind >= 0
        return may & (behind < model.window_tokens) if is_windowed and model.window_tokens else may
    return behind.abs() <= (model.window_tokens // 2 if is_windowed and model.window_tokens else num_keys)


def visible_by_position(positions: Tensor, num_keys: int, model: config.Model, *, is_windowed: bool) -> Tensor:
    """Bool [B, 1, T, keys]: which keys a causal query at int64 `positions` [B, T] may see; key j is at position j."""
    behind = positions[:, None, :, None] - torch.arange(num_keys, device=positions.device)
    may = behind >= 0
    return may & (behind < model.window_tokens) if is_windowed and model.window_tokens else may


def same_document(document_ids: Tensor) -> Tensor:
    """document_ids int64 [B, T] -> bool [B, 1, T, T]: true where query and key are of one document."""
    return document_ids[:, None, :, None] == document_ids[:, None, None, :]


class LayerCache:
    """Keys and values of the tokens one layer has seen, in memory reserved once: [B, K, max tokens, E] each."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values
        self.num_tokens = 0

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append [B, K, T, E] each and return all there are."""
        end = self.num_tokens + keys.size(2)
        assert end <= self.keys.size(2), f"cache of {self.keys.size(2)} tokens cannot hold {end}"
        self.keys[:, :, self.num_tokens : end] = keys
        self.values[:, :, self.num_tokens : end] = values
        self.num_tokens = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class Cache:
    """The layers' caches of one batch of sequences."""

    def __init__(
        self, model: config.Model, num_sequences: int, max_tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (model.layers, 2, num_sequences, model.num_kv_heads, max_tokens, model.d_head)
        self.layers = [LayerCache(keys, values) for keys, values in torch.empty(shape, dtype=dtype, device=device)]

    @property
    def num_tokens(self) -> int:
        """Tokens seen."""
        return self.layers[0].num_tokens

    def positions(self, num_tokens: int, device: torch.device) -> Tensor:
        """Positions int64 [B or 1, T] of the next `num_tokens`."""
        return torch.arange(self.num_tokens, self.num_tokens + num_tokens, device=device)[None]


class RowsLayerCache(LayerCache):
    """Keys and values of one layer, of rows that have seen different numbers of tokens."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        # Columns that a shorter row has not reached are masked, and nothing times a NaN would still be NaN.
        super().__init__(keys.zero_(), values.zero_())
        self.lengths = [0] * keys.size(0)

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put [B, K, T, E] each behind what each row has seen; return as many columns as the longest row has."""
        num_tokens = keys.size(2)
        end = max(self.lengths) + num_tokens
        assert end <= self.keys.size(2), f"cache of {self.keys.size(2)} tokens cannot hold {end}"
        columns = torch.tensor(self.lengths, device=keys.device)[:, None] + torch.arange(num_tokens, device=keys.device)
        rows = torch.arange(len(self.lengths), device=keys.device)[:, None]
        self.keys[rows, :, columns] = keys.transpose(1, 2)
        self.values[rows, :, columns] = values.transpose(1, 2)
        return self.keys[:, :, :end], self.values[:, :, :end]

    def keep(self, rows: list[int]) -> None:
        """Forget the other rows."""
        for kept in (self.keys, self.values):
            kept[: len(rows)] = kept[rows]
        self.keys, self.values = self.keys[: len(rows)], self.values[: len(rows)]


class RowsCache(Cache):
    """The layers' caches of rows of different lengths. All begin at column 0, so that a column is a position.

    A forward pass may read padding at the end of shorter rows; `advance` then says how much of each row counts, and
    what stands behind it is never seen and written over by the next pass.
    """

    def __init__(
        self, model: config.Model, num_sequences: int, max_tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(model, num_sequences, max_tokens, dtype, device)
        self.rows = [RowsLayerCache(layer.keys, layer.values) for layer in self.layers]
        self.layers = [*self.rows]

    @property
    def num_tokens(self) -> int:
        """Tokens that the longest row has seen."""
        return max(self.rows[0].lengths)

    def positions(self, num_tokens: int, device: torch.device) -> Tensor:
        """Positions int64 [B, T] of each row's next `num_tokens`."""
        seen = torch.tensor(self.rows[0].lengths, device=device)
        return seen[:, None] + torch.arange(num_tokens, device=device)

    def advance(self, num_tokens: list[int]) -> None:
        """Count so many tokens of each row as seen."""
        self._set_lengths([seen + more for seen, more in zip(self.rows[0].lengths, num_tokens, strict=True)])

    def keep(self, rows: list[int]) -> None:
        """Forget the other rows."""
        lengths = [self.rows[0].lengths[row] for row in rows]
        for layer in self.rows:
            layer.keep(rows)
        self._set_lengths(lengths)

    def _set_lengths(self, lengths: list[int]) -> None:
        for layer in self.rows:
            layer.lengths = lengths


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, is_causal: bool = True) -> Tensor:
    """Attention of query [B, H, T, E] to key and value [B, K, S, E] under mask bool [B or 1, 1, T, S].

    Without a mask: `is_causal` says whether a query sees what follows it, and a single query sees every key.
    """
    dtype = query.dtype
    if attention_is_widened(query, key.size(2)):
        query, key, value = query.float(), key.float(), value.float()
    grouped = query.size(1) != key.size(1)
    if grouped and mask is not None and query.device.type == "cuda":
        # torch's fused CUDA kernels take a mask or grouped heads, not both.
        groups = query.size(1) // key.size(1)
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        grouped = False
    causal = is_causal and mask is None and query.size(2) > 1
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, enable_gqa=grouped).to(
        dtype
    )


def attention_weights(query: Tensor, key: Tensor, mask: Tensor | None, *, is_causal: bool = True) -> Tensor:
    """Weights fp32 [B, H, T, S] by which `attend` sums values; for looking at, as it holds all of them."""
    key = key.repeat_interleave(query.size(1) // key.size(1), 1)
    scores = query.float() @ key.float().transpose(-1, -2) / math.sqrt(query.size(-1))
    if mask is None and is_causal and query.size(2) > 1:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    return (scores if mask is None else scores.masked_fill(~mask, float("-inf"))).softmax(-1)


def attention_is_widened(query: Tensor, num_keys: int) -> bool:
    """Whether bf16 attention runs on fp32 copies: on a CPU, where that is the faster backward pass."""
    on_cpu = query.device.type == "cpu" and query.dtype == torch.bfloat16
    return on_cpu and (num_keys < SHORT_ATTENTION_TOKENS or widened_on(query))


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245)."""

    def __init__(self, model: config.Model) -> None:
        super().__init__()
        width, width_kv = model.heads * model.d_head, model.num_kv_heads * model.d_head
        into, out_of = model.biases != "none", model.biases == "all"
        self.d_head, self.is_causal = model.d_head, model.is_causal
        self.query = Linear(model.d_model, width, into)
        self.key = Linear(model.d_model, width_kv, into)
        self.value = Linear(model.d_model, width_kv, into)
        self.output = Linear(width, model.d_model, out_of)
        self.query_norm = RMSNorm(model.d_head, model.norm_eps) if model.qk_norm else None
        self.key_norm = RMSNorm(model.d_head, model.norm_eps) if model.qk_norm else None

    def forward(self, x: Tensor, rotary: Rotary | None, mask: Tensor | None, cache: LayerCache | None) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        query, key, value = self.projected(x, rotary)
        if cache is not None:
            key, value = cache.extend(key, value)
        mixed: Tensor = self.output(
            attend(query, key, value, mask, is_causal=self.is_causal).transpose(1, 2).flatten(2)
        )
        return mixed

    def weights(self, x: Tensor, rotary: Rotary | None, mask: Tensor | None) -> Tensor:
        """Fp32 [B, H, T, T]: how much of each value, last, goes into the output at each place; as `forward` has it."""
        query, key, _ = self.projected(x, rotary)
        return attention_weights(query, key, mask, is_causal=self.is_causal)

    def projected(self, x: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
        """Query [B, H, T, E], key and value [B, K, T, E] of x [B, T, D], normed and turned."""
        split = (*x.shape[:2], -1, self.d_head)
        query, key, value = self.query(x).view(split), self.key(x).view(split), self.value(x).view(split)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if rotary is not None:
            query, key = rotate(query, rotary), rotate(key, rotary)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
