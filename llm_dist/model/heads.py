"""What is made of hidden states: logits over the vocabulary, and their loss without ever holding all of them; classes.

Shape letters: B batch, T sequence, N = B T positions, D model width, V vocabulary (padded).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_dist import config
from llm_dist.batch import NOT_SCORED, LossSum
from llm_dist.model.layers import ACTIVATIONS, Linear, linear, norm_of, product
from llm_dist.model.size import head_chunk_rows


class Transform(nn.Module):
    """norm(activation(dense(x))), as BERT has it before the vocabulary."""

    def __init__(self, model: config.Model) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[model.feed_forward]
        self.dense = Linear(model.d_model, model.d_model, model.biases == "all")
        self.norm = norm_of(model)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        y: Tensor = self.norm(self.activation(self.dense(hidden)))
        return y


class LanguageHead(nn.Module):
    """Projects hidden states onto the vocabulary.

    Rows of the weight beyond `vocabulary_tokens` are padding for faster products: their logits are minus infinity, so
    that the trained distribution is the one an export without them has.
    """

    def __init__(self, model: config.Model, vocabulary_tokens: int, rows: int) -> None:
        super().__init__()
        self.vocabulary_tokens = vocabulary_tokens
        self.weight = nn.Parameter(torch.empty(rows, model.d_model, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(rows, dtype=torch.float32)) if model.head_transform else None
        self.transform = Transform(model) if model.head_transform else None

    def forward(self, hidden: Tensor, labels: Tensor, z_loss: float = 0.0) -> LossSum:
        """Cross-entropy of `labels` int64 [B, T] given `hidden` [B, T, D], summed over the scored positions.

        `z_loss` weighs the squared log-normaliser (PaLM, arXiv 2204.02311, section 5), reported as the penalty.
        The gradient is taken of `LossSum.total`, once.
        """
        rows, flat = self._transformed(hidden).flatten(0, 1), labels.flatten()
        num_scored = (flat != NOT_SCORED).sum()
        if torch.is_grad_enabled() and (rows.requires_grad or self.weight.requires_grad):
            nats, penalty = LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
                rows, self.weight, self.bias, flat, (self.vocabulary_tokens, z_loss)
            )
            return LossSum(nats, num_scored, penalty)
        weight = self.weight.to(rows.dtype)
        nats, penalty, predicted = _sums(rows, weight, self.bias, flat, self.vocabulary_tokens, z_loss)
        return LossSum(nats, num_scored, penalty, predicted.view_as(labels))

    def logits(self, hidden: Tensor) -> Tensor:
        """[B, T, D] -> fp32 [B, T, `vocabulary_tokens`]; call it where the weight is whole."""
        return linear(self._transformed(hidden), self.weight, self.bias)[..., : self.vocabulary_tokens].float()

    def _transformed(self, hidden: Tensor) -> Tensor:
        return hidden if self.transform is None else self.transform(hidden)


class Pooler(nn.Module):
    """tanh(dense(x)) of the position that stands for the whole sequence, as BERT has it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = Linear(width, width, bias=True)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return torch.tanh(self.dense(hidden))


class ClassHead(nn.Module):
    """A few classes, of sequences or of tokens."""

    def __init__(self, width: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.output = Linear(width, num_classes, bias=True)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor, labels: Tensor, weights: Tensor | None = None) -> LossSum:
        """Cross-entropy of `labels` int64 [...] given `hidden` [..., D], summed over what is scored.

        `weights` fp32 [classes] multiply the loss of each class, for the gradient only.
        """
        logits, flat = self.logits(hidden), labels.flatten()
        rows = logits.flatten(0, -2)
        nats = F.cross_entropy(rows, flat, ignore_index=NOT_SCORED, reduction="sum")
        penalty = torch.zeros_like(nats)
        if weights is not None:
            penalty = F.cross_entropy(rows, flat, weights, ignore_index=NOT_SCORED, reduction="sum") - nats
        return LossSum(nats, (flat != NOT_SCORED).sum(), penalty, logits.detach().argmax(-1))

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> fp32 [..., classes]."""
        return self.output(self.dropout(hidden)).float()  # type: ignore[no-any-return]


def _chunks(rows: Tensor, weight: Tensor) -> Iterator[slice]:
    size = head_chunk_rows(weight.size(0))
    return (slice(start, start + size) for start in range(0, rows.size(0), size))


def _chunk_logits(rows: Tensor, weight: Tensor, bias: Tensor | None, vocabulary_tokens: int) -> Tensor:
    logits = product(rows, weight.t()).float()
    if bias is not None:
        logits += bias.float()
    logits[:, vocabulary_tokens:] = float("-inf")
    return logits


def _add_sums(sums: Tensor, logits: Tensor, labels: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    """Add nats and penalty of a chunk to `sums` fp32 [2]; returns log-normalisers and what is scored, [rows, 1]."""
    scored = (labels != NOT_SCORED)[:, None]
    normaliser = logits.logsumexp(1, keepdim=True)
    right = logits.gather(1, labels.clamp(min=0)[:, None])
    sums[0] += torch.where(scored, normaliser - right, 0.0).sum()
    if z_loss:
        sums[1] += z_loss * torch.where(scored, normaliser.square(), 0.0).sum()
    return normaliser, scored


def _sums(
    rows: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, vocabulary_tokens: int, z_loss: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Nats, penalty, and the likeliest token of each row."""
    sums = torch.zeros(2, dtype=torch.float32, device=rows.device)
    predicted = torch.empty_like(labels)
    for chunk in _chunks(rows, weight):
        logits = _chunk_logits(rows[chunk], weight, bias, vocabulary_tokens)
        predicted[chunk] = logits.argmax(1)
        _add_sums(sums, logits, labels[chunk], z_loss)
    return sums[0], sums[1], predicted


class LinearCrossEntropy(torch.autograd.Function):
    """Cross-entropy of a linear layer, chunk by chunk of positions.

    A chunk's gradients are computed while its logits exist, so that the backward pass only scales what the forward
    pass kept: [N, D] in the dtype of the hidden states and [V, D] in fp32. Softmax and sums are fp32, products are in
    the dtype of the hidden states.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, options: tuple[int, float]
    ) -> tuple[Tensor, Tensor]:
        """Nats and penalty of rows [N, D] and labels [N]; `options` are vocabulary size and z-loss weight."""
        vocabulary_tokens, z_loss = options
        cast = weight.to(rows.dtype)
        sums = torch.zeros(2, dtype=torch.float32, device=rows.device)
        for_rows = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        for_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for_bias = None
        if bias is not None and ctx.needs_input_grad[2]:
            for_bias = torch.zeros_like(bias, dtype=torch.float32)
        for chunk in _chunks(rows, weight):
            logits = _chunk_logits(rows[chunk], cast, bias, vocabulary_tokens)
            normaliser, scored = _add_sums(sums, logits, labels[chunk], z_loss)
            exact = _logit_gradient(logits, normaliser, scored, labels[chunk], z_loss)
            if for_bias is not None:
                for_bias += exact.sum(0)
            gradient = exact.to(rows.dtype)
            if for_rows is not None:
                for_rows[chunk] = product(gradient, cast)
            if for_weight is not None:
                for_weight += product(gradient.t(), rows[chunk])
        # Not save_for_backward: the backward pass takes them over, so that the weight's gradient exists only once.
        ctx.kept = (for_rows, for_weight, for_bias)
        ctx.weight_dtype, ctx.has_penalty = weight.dtype, z_loss > 0
        ctx.set_materialize_grads(False)
        return sums[0].clone(), sums[1].clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        """Scale what the forward pass kept."""
        scale = gradients[0]
        assert scale is not None and (gradients[1] is not None or not ctx.has_penalty), "take it of LossSum.total"
        assert ctx.kept is not None, "the backward pass of a loss runs once"
        for_rows, for_weight, for_bias = ctx.kept
        ctx.kept = None
        if for_rows is not None:
            for_rows.mul_(scale)
        if for_weight is not None:
            for_weight = for_weight.mul_(scale).to(ctx.weight_dtype)
        if for_bias is not None:
            for_bias = for_bias.mul_(scale).to(ctx.weight_dtype)
        return for_rows, for_weight, for_bias, None, None


def _logit_gradient(logits: Tensor, normaliser: Tensor, scored: Tensor, labels: Tensor, z_loss: float) -> Tensor:
    """d(nats + penalty)/d(logits), written over `logits`; nothing where a position is not scored."""
    probabilities = logits.sub_(normaliser).exp_()
    if z_loss:
        probabilities *= 1.0 + 2.0 * z_loss * normaliser
    target = labels.clamp(min=0)[:, None]
    probabilities.scatter_(1, target, probabilities.gather(1, target) - 1.0)
    return probabilities.masked_fill_(~scored, 0.0)
