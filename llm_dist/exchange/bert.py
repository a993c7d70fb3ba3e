"""BERT and RoBERTa: names of tensors and keys, both ways."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llm_dist.config import Heads, Model
from llm_dist.exchange.config_keys import ACTIVATION_NAMES, ACTIVATIONS, HuggingFaceConfig
from llm_dist.exchange.rows import SINUSOIDS, ZEROS, Row, linear_rows
from llm_dist.model.hugging_face import model_type

BASE_NAMES = ("embeddings.", "encoder.", "pooler.")
TIED = {
    "cls.predictions.decoder.weight": "head.weight",
    "cls.predictions.decoder.bias": "head.bias",
    "lm_head.decoder.weight": "head.weight",
    "lm_head.decoder.bias": "head.bias",
    # RoBERTa's classes have a layer of their own.
    "roberta.pooler.dense.weight": "",
    "roberta.pooler.dense.bias": "",
}

_BLOCK = {
    "attention.self.query": "attention.query",
    "attention.self.key": "attention.key",
    "attention.self.value": "attention.value",
    "attention.output.dense": "attention.output",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "feed_forward.up",
    "output.dense": "feed_forward.down",
    "output.LayerNorm": "feed_forward_norm",
}


def body_rows(model: Model, kind: str, pad_id: int) -> Iterator[Row]:
    """All but the heads; RoBERTa's positions begin behind the padding's."""
    table = f"{kind}.embeddings"
    yield Row(f"{table}.word_embeddings.weight", ("embedding.weight",), trimmed=True)
    positions = "positions.weight" if model.positions == "learned" else SINUSOIDS
    yield Row(f"{table}.position_embeddings.weight", (positions,), rows_in_front=_rows_in_front(kind, pad_id))
    yield Row(f"{table}.token_type_embeddings.weight", ("segments.weight" if model.segments else ZEROS,))
    yield from linear_rows(f"{table}.LayerNorm", "embedding_norm", has_bias=True)
    for layer in range(model.layers):
        for theirs, ours in _BLOCK.items():
            yield from linear_rows(f"{kind}.encoder.layer.{layer}.{theirs}", f"blocks.{layer}.{ours}", has_bias=True)


def _rows_in_front(kind: str, pad_id: int) -> int:
    return pad_id + 1 if kind == "roberta" else 0


def head_rows(model: Model, heads: Heads, kind: str) -> Iterator[Row]:
    """The heads."""
    yield from _bert_heads(model, heads) if kind == "bert" else _roberta_heads(model, heads)


def _bert_heads(model: Model, heads: Heads) -> Iterator[Row]:
    if heads.has_pooler(model):
        yield from linear_rows("bert.pooler.dense", "pooler.dense", has_bias=True)
    if heads.language:
        yield from linear_rows("cls.predictions.transform.dense", "head.transform.dense", has_bias=True)
        yield from linear_rows("cls.predictions.transform.LayerNorm", "head.transform.norm", has_bias=True)
        yield from _vocabulary_rows(model, "cls.predictions")
    if heads.pair:
        yield from linear_rows("cls.seq_relationship", "pair_head.output", has_bias=True)
    if heads.classes:
        yield from linear_rows("classifier", "class_head.output", has_bias=True)


def _roberta_heads(model: Model, heads: Heads) -> Iterator[Row]:
    if heads.language:
        yield from linear_rows("lm_head.dense", "head.transform.dense", has_bias=True)
        yield from linear_rows("lm_head.layer_norm", "head.transform.norm", has_bias=True)
        yield from _vocabulary_rows(model, "lm_head")
    if heads.classes and heads.per_token:
        yield from linear_rows("classifier", "class_head.output", has_bias=True)
    elif heads.classes:
        yield from linear_rows("classifier.dense", "pooler.dense", has_bias=True)
        yield from linear_rows("classifier.out_proj", "class_head.output", has_bias=True)


def _vocabulary_rows(model: Model, head: str) -> Iterator[Row]:
    """Where the head is not tied, its bias stands twice: `transformers` adds the one beside the weight."""
    yield Row(f"{head}.bias", ("head.bias",), trimmed=True)
    if not model.tied_head:
        yield Row(f"{head}.decoder.weight", ("head.weight",), trimmed=True)
        yield Row(f"{head}.decoder.bias", ("head.bias",), trimmed=True)


def keys(model: Model, heads: Heads, pad_id: int) -> dict[str, Any]:
    """Content of config.json."""
    kind = model_type(model, heads)
    return {
        "model_type": kind,
        "hidden_size": model.d_model,
        "intermediate_size": model.width_ff,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "max_position_embeddings": model.max_sequence_tokens + _rows_in_front(kind, pad_id),
        "type_vocab_size": model.segments or 1,
        "hidden_act": ACTIVATION_NAMES[model.feed_forward],
        "layer_norm_eps": model.norm_eps,
        "hidden_dropout_prob": model.dropout,
        "attention_probs_dropout_prob": 0.0,
        "position_embedding_type": "absolute",
    }


def model_keys(config: HuggingFaceConfig) -> dict[str, Any]:
    """Our `[model]` of a config.json.

    Raises:
        UserError: a key has a value that we do not compute the same.
    """
    config.require("position_embedding_type", "absolute", None)
    kind = config.table["model_type"]
    if kind == "roberta":
        config.require("hidden_act", "gelu")
    in_front = _rows_in_front(kind, pad_id_of(config))
    return {
        "family": "bert",
        "layers": config.number("num_hidden_layers", 12),
        "d_model": config.number("hidden_size", 768),
        "heads": config.number("num_attention_heads", 12),
        "d_ff": config.number("intermediate_size", 3072),
        "max_sequence_tokens": config.number("max_position_embeddings", 512) - in_front,
        "segments": config.number("type_vocab_size", 2),
        "feed_forward": config.chosen("hidden_act", ACTIVATIONS, "gelu"),
        "norm_eps": config.number("layer_norm_eps", 1e-12),
        "tied_head": bool(config.table.get("tie_word_embeddings", True)),
        "dropout": config.number("hidden_dropout_prob", 0.1),
    }


def pad_id_of(config: HuggingFaceConfig) -> int:
    """Id of the padding token, which RoBERTa's positions are counted from."""
    return int(config.number("pad_token_id", 1 if config.table["model_type"] == "roberta" else 0))
