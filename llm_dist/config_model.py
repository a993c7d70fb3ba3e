"""The `[model]` section: one Transformer, and presets (`family`) of the shapes that people know by name.

The docstring below a field is its help and its line in docs/configuration.md. Reads no file, no environment and no
torch.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from llm_dist.config_fields import Section, from_now, identity

FeedForwardKind = Literal["swiglu", "geglu", "gelu", "gelu_tanh", "relu"]
GATED = ("swiglu", "geglu")


class _Preset(NamedTuple):
    """What a family means."""

    attention: Literal["causal", "bidirectional"]
    norm: Literal["rms", "layer"]
    norm_position: Literal["pre", "post"]
    positions: Literal["rotary", "learned", "sinusoidal"]
    feed_forward: FeedForwardKind
    biases: Literal["none", "qkv", "all"]
    norm_bias: bool
    embedding_norm: bool
    segments: int
    head_transform: bool
    tied_head: bool


_PRESETS = {
    "llama": _Preset("causal", "rms", "pre", "rotary", "swiglu", "none", False, False, 0, False, False),
    "gpt2": _Preset("causal", "layer", "pre", "learned", "gelu_tanh", "all", True, False, 0, False, True),
    "bert": _Preset("bidirectional", "layer", "post", "learned", "gelu", "all", True, True, 2, True, True),
    "modernbert": _Preset("bidirectional", "layer", "pre", "rotary", "geglu", "none", False, True, 0, True, True),
}


class Heads(NamedTuple):
    """What a model ends in: what is made of its hidden states."""

    language: bool = True
    """Tokens of the vocabulary, at the positions that are scored."""
    pair: bool = False
    """Whether two texts belong together, at the first position."""
    classes: int = 0
    """How many classes are told apart; none: 0."""
    per_token: bool = False
    """Whether each token has a class, or the whole sequence."""

    def has_pooler(self, model: Model) -> bool:
        """Whether a dense layer stands before what reads one position for the whole sequence."""
        return not model.is_causal and (self.pair or (self.classes > 0 and not self.per_token))


LANGUAGE = Heads()


class RopeScaling(Section):
    """Rotary frequencies stretched for longer sequences than a model was first trained on, as Llama 3.1 does."""

    factor: float = Field(gt=1)
    """By how much the slow frequencies are slowed down."""
    low_frequency_factor: float = Field(1.0, gt=0)
    """Wavelengths above `original_tokens` / this are stretched in full."""
    high_frequency_factor: float = Field(4.0, gt=0)
    """Wavelengths below `original_tokens` / this stay."""
    original_tokens: int = Field(8192, ge=1)
    """Longest sequence of the first training."""


class Model(Section):
    """The Transformer. `family` sets what the other keys leave open."""

    family: Literal["llama", "gpt2", "bert", "modernbert"] = identity("llama")
    """Decoders: llama (RMSNorm, rotary positions, SwiGLU, no biases), gpt2 (LayerNorm, learned positions, GELU,
    biases). Encoders: bert (post-norm, learned positions, segments, GELU, biases), modernbert (pre-norm, rotary
    positions, GeGLU, no biases)."""
    layers: int = identity(ge=1)
    """Number of blocks."""
    d_model: int = identity(ge=1)
    """Model width D."""
    heads: int = identity(ge=1)
    """Attention heads H."""
    kv_heads: int | None = identity(None, ge=1)
    """Key/value heads K (grouped-query attention); `heads` when absent."""
    d_head: int = identity(None, ge=1)
    """Width E of a head; `d_model` / `heads` when absent."""
    d_ff: int | None = identity(None, ge=1)
    """Feed-forward width F; when absent 4 D, or 8/3 D rounded up to a multiple of 64 where it is gated."""
    dropout: float = from_now(0.0, ge=0, lt=1)
    """Probability of dropping an element after embedding, attention and feed-forward, in training."""
    max_sequence_tokens: int = identity(2048, ge=1)
    """Longest sequence the model is made for (rows of a learned position table; stated at export)."""
    attention: Literal["causal", "bidirectional"] = identity(None)
    """Whether a position sees what follows it; set by `family` when absent."""
    window_tokens: int | None = identity(None, ge=1)
    """A position sees only so many: itself and those before it (causal), or half of them on either side."""
    global_every: int | None = identity(None, ge=1)
    """With `window_tokens`: the first and every so-manieth block sees everything; none does when absent."""
    positions: Literal["rotary", "learned", "sinusoidal"] = identity(None)
    """How positions enter; set by `family` when absent."""
    rope_theta: float = identity(10_000.0, gt=0)
    """Base of the rotary frequencies."""
    window_rope_theta: float | None = identity(None, gt=0)
    """Base in blocks that see only a window; `rope_theta` when absent."""
    rope_scaling: RopeScaling | None = identity(None)
    """Stretching of the rotary frequencies for long sequences; none when absent."""
    segments: int = identity(None, ge=0)
    """Rows of the segment table: which of two texts a token belongs to; set by `family` when absent."""
    feed_forward: FeedForwardKind = identity(None)
    """Activation, gated or not (gelu_tanh: GELU's tanh form); set by `family` when absent."""
    norm: Literal["rms", "layer"] = identity(None)
    """RMSNorm or LayerNorm; set by `family` when absent."""
    norm_position: Literal["pre", "post"] = identity(None)
    """pre: in front of attention and feed-forward, and once at the end. post: behind each, after the residual."""
    norm_eps: float = identity(1e-5, gt=0)
    """Epsilon of the norms."""
    norm_bias: bool = identity(None)
    """Whether LayerNorm has a bias; set by `family` when absent."""
    embedding_norm: bool = identity(None)
    """Normalise the embeddings, too; the first block of a pre-norm model then has no norm before its attention."""
    qk_norm: bool = identity(False)
    """Normalise queries and keys per head (RMSNorm), as Qwen3 does."""
    biases: Literal["none", "qkv", "all"] = identity(None)
    """Which matrix products have biases; set by `family` when absent."""
    tied_head: bool = identity(None)
    """Share the embedding with the output head; set by `family` when absent."""
    head_transform: bool = identity(None)
    """A dense layer, activation and norm before the vocabulary, and biases on its logits; set by `family` when
    absent."""
    vocabulary_multiple: int = identity(64, ge=1)
    """The vocabulary is padded up to a multiple of this (faster matmuls); export trims the padding."""

    @model_validator(mode="before")
    @classmethod
    def _filled_in(cls, given: Any) -> Any:
        """A key that is absent takes the family's value, so that nothing asks for the family later."""
        preset = _PRESETS.get(given.get("family", "llama")) if isinstance(given, dict) else None
        if preset is None:  # the fields' own rules say what is wrong
            return given
        table = given | {key: value for key, value in preset._asdict().items() if given.get(key) is None}
        if table["norm"] == "rms" and given.get("norm_bias") is None:
            table["norm_bias"] = False
        width, heads = given.get("d_model"), given.get("heads")
        if given.get("d_head") is None and isinstance(width, int) and isinstance(heads, int) and heads > 0:
            table["d_head"] = width // heads if width % heads == 0 else None
        return table

    @field_validator("d_head", mode="before")
    @classmethod
    def _heads_divide(cls, d_head: Any, info: ValidationInfo) -> Any:
        if d_head is None and {"d_model", "heads"} <= info.data.keys():
            width, heads = info.data["d_model"], info.data["heads"]
            raise ValueError(f"model.d_model={width} must be a multiple of model.heads={heads}, or give model.d_head")
        return d_head

    @model_validator(mode="after")
    def _shapes_fit(self) -> Self:
        if self.heads % self.num_kv_heads:
            raise ValueError(f"model.heads={self.heads} must be a multiple of model.kv_heads={self.kv_heads}")
        if self.positions == "rotary" and self.d_head % 2:
            raise ValueError(f"rotary positions need an even head width; model.d_head is {self.d_head}")
        if self.norm == "rms" and self.norm_bias:
            raise ValueError('model.norm_bias=true needs model.norm="layer"; RMSNorm has no bias')
        if self.global_every is not None and self.window_tokens is None:
            raise ValueError(f"model.global_every={self.global_every} needs model.window_tokens")
        if self.attention == "bidirectional" and self.window_tokens is not None and self.window_tokens % 2:
            raise ValueError(f"model.window_tokens={self.window_tokens} must be even: half of it lies on either side")
        return self

    @property
    def num_kv_heads(self) -> int:
        """K, resolved."""
        return self.kv_heads or self.heads

    @property
    def is_causal(self) -> bool:
        """Whether a position sees only what stands before it."""
        return self.attention == "causal"

    @property
    def is_gated(self) -> bool:
        """Whether the feed-forward multiplies by a gate."""
        return self.feed_forward in GATED

    @property
    def width_ff(self) -> int:
        """F, resolved."""
        if self.d_ff is not None:
            return self.d_ff
        return -(-8 * self.d_model // (3 * 64)) * 64 if self.is_gated else 4 * self.d_model

    def is_windowed(self, layer: int) -> bool:
        """Whether block `layer` sees a window only."""
        is_global = self.global_every is not None and layer % self.global_every == 0
        return self.window_tokens is not None and not is_global

    def has_attention_norm(self, layer: int) -> bool:
        """Whether block `layer` has a norm of its own for attention: not where the embedding's stands before it."""
        return not (layer == 0 and self.embedding_norm and self.norm_position == "pre")
