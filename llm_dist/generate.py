"""Lets a model write: from the separator and a prompt, one token at a time, until one that ends a text or a limit.

Knows a model and a tokenizer; nothing of runs, checkpoints or engines.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llm_dist.errors import UserError
from llm_dist.model.attention import Cache
from llm_dist.model.transformer import Transformer
from llm_dist.tokenizer import Tokenizer

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer shows for the first bytes of a character whose last are yet to come."""


@dataclass(frozen=True)
class Generated:
    """What was written after the prompt."""

    text: str
    tokens: int
    tokens_per_second: float
    """Reading the prompt included."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn."""

    temperature: float = 0.8
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int = 0
    """Draw among the K likeliest; 0: all."""
    top_p: float = 1.0
    """Draw among the likeliest that make up this probability (arXiv 1904.09751)."""

    def check(self) -> None:
        """Refuse values that mean nothing.

        Raises:
            UserError: one line for each.
        """
        mistakes = []
        if not self.temperature >= 0 or self.temperature == float("inf"):
            mistakes.append(f"temperature={self.temperature} must be 0 (take the likeliest token) or more, and finite")
        if self.top_k < 0:
            mistakes.append(f"top_k={self.top_k} must be 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            mistakes.append(f"top_p={self.top_p} must be above 0 and at most 1 (all tokens)")
        if mistakes:
            raise UserError("\n".join(mistakes))


def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    on_text: Callable[[str], object] | None = None,
) -> Generated:
    """Continue `prompt`; `on_text` gets the text in pieces as it comes.

    Ends before `max_tokens` at a token that ends a text, or where prompt and text fill `model.max_sequence_tokens`.

    Raises:
        UserError: a value means nothing, or the prompt leaves no room.
    """
    sampling = Sampling(temperature, top_k, top_p)
    sampling.check()
    if max_tokens < 1:
        raise UserError(f"max_tokens={max_tokens} must be 1 or more")
    prompt_ids = tokenizer.encode(prompt)
    ids = [tokenizer.separator_id, *prompt_ids]
    room = model.config.max_sequence_tokens - len(ids)
    if room < 1:
        raise UserError(
            f"the prompt is {len(prompt_ids)} tokens long; with the separator before it and one token after it, "
            f"it must fit model.max_sequence_tokens={model.config.max_sequence_tokens}; shorten it"
        )
    text = _Text(tokenizer, prompt_ids, on_text)
    start = time.perf_counter()
    for next_id in continuation(model, ids, min(max_tokens, room), sampling, seed):
        if next_id in tokenizer.end_ids:
            break
        text.append(next_id)
    seconds = time.perf_counter() - start
    return Generated(text.finish(), len(text.ids), len(text.ids) / seconds)


def continuation(
    model: Transformer, ids: list[int], max_tokens: int, sampling: Sampling, seed: int = 0
) -> Iterator[int]:
    """Ids that follow `ids`, at most `max_tokens`; keys and values of what was read are kept, not recomputed."""
    device = model.language.weight.device
    cache = Cache(model.config, 1, len(ids) + max_tokens, model.compute_dtype, device)
    generator = torch.Generator().manual_seed(seed)
    was_training = model.training
    model.eval()
    unread = ids
    try:
        for _ in range(max_tokens):
            with torch.inference_mode():
                hidden = model(torch.tensor([unread], device=device), cache=cache)
                logits = model.language.logits(hidden[:, -1:])[0, 0].cpu()
            unread = [next_token(logits, sampling, generator)]
            yield unread[0]
    finally:
        model.train(was_training)


def next_token(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Draw an id from fp32 logits [V]."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    # Relative to the largest, so that a tiny temperature cannot overflow.
    ordered, ids = ((logits - logits.max()) / sampling.temperature).sort(descending=True, stable=True)
    if sampling.top_k:
        ordered, ids = ordered[: sampling.top_k], ids[: sampling.top_k]
    probabilities = ordered.softmax(0)
    likelier = probabilities.cumsum(0) - probabilities
    # The likeliest stays whatever rounding does.
    likelier[0] = 0.0
    kept = torch.where(likelier < sampling.top_p, probabilities, 0.0)
    return int(ids[torch.multinomial(kept, 1, generator=generator)])


class _Text:
    """Text of the ids so far, handed on as soon as it can no longer change."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: list[int], on_text: Callable[[str], object] | None) -> None:
        self.ids: list[int] = []
        self._tokenizer = tokenizer
        self._prompt_ids = prompt_ids
        self._prompt = tokenizer.decode(prompt_ids)
        self._on_text = on_text
        self._said = ""

    def append(self, next_id: int) -> None:
        """Add an id and hand on what it finishes."""
        self.ids.append(next_id)
        if self._on_text:
            self._say(self._decoded().rstrip(UNFINISHED))

    def finish(self) -> str:
        """All of the text; hands on the rest of it."""
        text = self._decoded()
        self._say(text)
        return text

    def _decoded(self) -> str:
        # Behind the prompt, not alone: how a word begins depends on what stands before it.
        whole = self._tokenizer.decode([*self._prompt_ids, *self.ids])
        return whole[len(self._prompt) :] if whole.startswith(self._prompt) else self._tokenizer.decode(self.ids)

    def _say(self, text: str) -> None:
        if self._on_text and text != self._said and text.startswith(self._said):
            self._on_text(text[len(self._said) :])
            self._said = text
