"""Lets a model write: after a prompt or a conversation, one token at a time, until one that ends it or a limit.

Knows a model and a tokenizer; nothing of runs, checkpoints or engines.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from llm_dist.errors import UserError
from llm_dist.model.attention import Cache, RowsCache
from llm_dist.model.transformer import Transformer
from llm_dist.tokenizer import Tokenizer
from llm_dist.tokenizer_chat import Message
from llm_dist.tokenizer_template import template_of

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
class Written:
    """What was written after one of several prompts."""

    text: str
    tokens: int


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn."""

    temperature: float = 0.8
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int = 0
    """Draw among the K likeliest; 0: all."""
    top_p: float = 1.0
    """Draw among the likeliest that make up this probability (arXiv 1904.09751)."""
    min_p: float = 0.0
    """Draw among those at least this times as likely as the likeliest (arXiv 2407.01082)."""
    repetition_penalty: float = 1.0
    """Divides positive logits of ids already read or written, multiplies negative ones (arXiv 1909.05858)."""

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
        if not 0 <= self.min_p <= 1:
            mistakes.append(f"min_p={self.min_p} must be 0 (all tokens) to 1 (only the likeliest)")
        if not 0 < self.repetition_penalty < float("inf"):
            mistakes.append(f"repetition_penalty={self.repetition_penalty} must be above 0, 1 for none, and finite")
        if mistakes:
            raise UserError("\n".join(mistakes))


def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str | Sequence[Message],
    *,
    max_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    on_text: Callable[[str], object] | None = None,
) -> Generated:
    """Continue `prompt`, or answer it where it is a conversation; `on_text` gets the text in pieces as it comes.

    Ends before `max_tokens` at a token that ends a text or a message, or where prompt and text fill
    `model.max_sequence_tokens`.

    Raises:
        UserError: a value means nothing, the prompt leaves no room, or the tokenizer has no form for conversations.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    _check(sampling, max_tokens)
    ids, end_ids = _opening(tokenizer, prompt)
    room = _room(model, ids, prompt)
    text = _Text(tokenizer, ids, on_text)
    start = time.perf_counter()
    for next_id in continuation(model, ids, min(max_tokens, room), sampling, seed):
        if next_id in end_ids:
            break
        text.append(next_id)
    seconds = time.perf_counter() - start
    return Generated(text.finish(), len(text.ids), len(text.ids) / seconds)


def generate_all(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[Message]],
    *,
    max_tokens: int = 100,
    sampling: Sampling | None = None,
    seed: int = 0,
    num_at_once: int = 32,
) -> Iterator[Written]:
    """What is written after each prompt, in their order; the prompt at place i has the seed `seed` + i.

    Raises:
        UserError: before anything is computed, as `generate` does; a prompt that leaves no room is named by its number.
    """
    sampling = sampling or Sampling()
    _check(sampling, max_tokens)
    openings = [_opening(tokenizer, prompt) for prompt in prompts]
    limits = []
    for number, (prompt, (ids, _)) in enumerate(zip(prompts, openings, strict=True), start=1):
        limits.append(min(max_tokens, _room(model, ids, prompt, f"prompt {number}: ")))
    return _written(model, tokenizer, openings, limits, sampling, seed, num_at_once)


def _written(
    model: Transformer,
    tokenizer: Tokenizer,
    openings: Sequence[tuple[list[int], frozenset[int]]],
    limits: Sequence[int],
    sampling: Sampling,
    seed: int,
    num_at_once: int,
) -> Iterator[Written]:
    for first in range(0, len(openings), num_at_once):
        chosen = slice(first, first + num_at_once)
        rows = [ids for ids, _ in openings[chosen]]
        seeds = range(seed + first, seed + first + len(rows))
        # One tokenizer, and prompts of one kind: one set of ids that end.
        found = continuations(model, rows, limits[chosen], sampling, seeds, openings[first][1])
        for ids, next_ids in zip(rows, found, strict=True):
            text = _Text(tokenizer, ids, None)
            text.ids = next_ids
            yield Written(text.finish(), len(next_ids))


def _check(sampling: Sampling, max_tokens: int) -> None:
    sampling.check()
    if max_tokens < 1:
        raise UserError(f"max_tokens={max_tokens} must be 1 or more")


def _room(model: Transformer, ids: list[int], prompt: str | Sequence[Message], where: str = "") -> int:
    """Tokens that can follow `ids`."""
    room = model.config.max_sequence_tokens - len(ids)
    if room < 1:
        frame = "separator" if isinstance(prompt, str) else "form of conversations"
        raise UserError(
            f"{where}the prompt is {len(ids)} tokens long with the {frame} around it; with one token after it, "
            f"it must fit model.max_sequence_tokens={model.config.max_sequence_tokens}; shorten it"
        )
    return room


def _opening(tokenizer: Tokenizer, prompt: str | Sequence[Message]) -> tuple[list[int], frozenset[int]]:
    """Ids to go on from, and those that end what follows."""
    if isinstance(prompt, str):
        return [tokenizer.separator_id, *tokenizer.encode(prompt)], tokenizer.end_ids
    template = template_of(tokenizer)
    return template.prompt(prompt), tokenizer.end_ids | template.end_ids


def continuation(
    model: Transformer, ids: list[int], max_tokens: int, sampling: Sampling, seed: int = 0
) -> Iterator[int]:
    """Ids that follow `ids`, at most `max_tokens`; keys and values of what was read are kept, not recomputed."""
    device = model.language.weight.device
    cache = Cache(model.config, 1, len(ids) + max_tokens, model.compute_dtype, device)
    generator = torch.Generator().manual_seed(seed)
    read, unread = list(ids), ids
    with _evaluating(model):
        for _ in range(max_tokens):
            with torch.inference_mode():
                hidden = model(torch.tensor([unread], device=device), cache=cache)
                logits = model.language.logits(hidden[:, -1:])[0, 0].cpu()
            unread = [next_token(logits, sampling, generator, read)]
            read += unread
            yield unread[0]


def continuations(
    model: Transformer,
    rows: Sequence[list[int]],
    max_tokens: Sequence[int],
    sampling: Sampling,
    seeds: Sequence[int],
    end_ids: frozenset[int] = frozenset(),
) -> list[list[int]]:
    """Ids that follow each row, computed together; as `continuation` gives them for each with its own seed and limit.

    A row ends before the first of `end_ids`, and is not computed any more. Equal to `continuation` up to the rounding
    of products of other sizes.
    """
    device = model.language.weight.device
    longest = max(len(ids) + more for ids, more in zip(rows, max_tokens, strict=True))
    cache = RowsCache(model.config, len(rows), longest, model.compute_dtype, device)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    read = [list(ids) for ids in rows]
    going, unread = list(range(len(rows))), list(rows)
    with _evaluating(model):
        while going:
            logits, kept = _last_logits(model, unread, cache), []
            for place, row in enumerate(going):
                next_id = next_token(logits[place], sampling, generators[row], read[row])
                if next_id in end_ids:
                    continue
                read[row].append(next_id)
                if len(read[row]) < len(rows[row]) + max_tokens[row]:
                    kept.append(place)
            if 0 < len(kept) < len(going):
                cache.keep(kept)
            going = [going[place] for place in kept]
            unread = [read[row][-1:] for row in going]
    return [ids[len(row) :] for ids, row in zip(read, rows, strict=True)]


@torch.inference_mode()
def _last_logits(model: Transformer, unread: Sequence[list[int]], cache: RowsCache) -> Tensor:
    """Fp32 [rows, V], on the CPU, behind the last id of each row; what fills rows up on the right is never seen."""
    lengths, device = [len(ids) for ids in unread], model.language.weight.device
    ids = torch.tensor([[*each, *[0] * (max(lengths) - len(each))] for each in unread], device=device)
    hidden = model(ids, cache=cache)
    cache.advance(lengths)
    last = hidden[torch.arange(len(lengths)), torch.tensor(lengths) - 1]
    return model.language.logits(last[:, None])[:, 0].cpu()


@contextmanager
def _evaluating(model: Transformer) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def next_token(logits: Tensor, sampling: Sampling, generator: torch.Generator, read: Sequence[int] = ()) -> int:
    """Draw an id from fp32 logits [V] behind the ids `read`."""
    if sampling.repetition_penalty != 1.0 and read:
        logits = less_repeated(logits, read, sampling.repetition_penalty)
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
    if sampling.min_p:
        kept = torch.where(probabilities >= sampling.min_p * probabilities[0], kept, 0.0)
    return int(ids[torch.multinomial(kept, 1, generator=generator)])


def less_repeated(logits: Tensor, read: Sequence[int], penalty: float) -> Tensor:
    """Logits with those of ids `read` made smaller, as `transformers` does it."""
    ids = torch.tensor(sorted(set(read)))
    values = logits[ids]
    return logits.index_copy(0, ids, torch.where(values < 0, values * penalty, values / penalty))


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
