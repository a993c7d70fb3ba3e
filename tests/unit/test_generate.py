from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_dist.errors import UserError
from llm_dist.exchange.export import export
from llm_dist.generate import (
    Sampling,
    continuation,
    continuations,
    generate,
    generate_all,
    less_repeated,
    next_token,
)
from tests.unit.model.shapes import CAUSAL, VOCABULARY_TOKENS, built, small

GREEDY = Sampling(temperature=0)


class Letters:
    """Id 0 separates; ids from 8 on are characters; two `^` make one character, half of it cannot be shown."""

    separator_id = 0
    end_ids = frozenset({0})

    def encode(self, text: str) -> list[int]:
        return [8 + ord(character) - 32 for character in text]

    def decode(self, ids: list[int]) -> str:
        text = "".join(chr(id_ - 8 + 32) for id_ in ids if id_ >= 8)
        return text.replace("^^", "é").replace("^", "\ufffd")


def writing(*ids: int):
    """A model that writes the given ids one after the other, whatever it reads."""
    model = built(small("gpt2-untied", layers=1, d_model=32, heads=1, max_sequence_tokens=32))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.norm.weight.fill_(1.0)
        for position in range(32):
            model.positions.weight[position, position] = 1.0
        for position, id_ in enumerate(ids):
            model.head.weight[id_, position] = 1.0
    return model


@pytest.mark.parametrize("kind", CAUSAL)
def test_greedy_writes_what_hugging_face_writes(kind, tmp_path: Path):
    transformers = pytest.importorskip("transformers", reason="needs the extra llm_dist[hf]")
    model = built(small(kind))
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    (tmp_path / "tokenizer").mkdir()
    options = {"real_vocabulary_tokens": VOCABULARY_TOKENS, "dtype": "fp32"}
    export(weights, model.config, tmp_path / "tokenizer", tmp_path / "out", **options)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    prompt = [0, 11, 12, 13]
    options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": VOCABULARY_TOKENS}
    expected = theirs.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, 4), **options)[0, 4:]
    assert list(continuation(model, prompt, 40, GREEDY)) == expected.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_changes_nothing(dtype):
    model, prompt = built(small("qwen3"), dtype, std=0.1), [0, 11, 12, 13]
    written = list(continuation(model, prompt, 20, GREEDY))
    with torch.no_grad():
        whole = model.head.logits(model(torch.tensor([prompt + written])))[0, len(prompt) - 1 : -1]
    chosen = whole.gather(1, torch.tensor(written)[:, None])[:, 0]
    assert torch.all(whole.amax(1) - chosen <= (1e-5 if dtype == torch.float32 else 0.05))


def test_same_seed_same_text():
    model = built(small("llama"))
    first, again, other = (generate(model, Letters(), "ab", max_tokens=40, seed=seed).text for seed in (3, 3, 4))
    assert first == again != other


def test_stops_at_the_separator_and_leaves_it_out():
    x, y = Letters().encode("xy")
    result = generate(writing(x, y, 0, x), Letters(), "", temperature=0)
    assert (result.text, result.tokens) == ("xy", 2) and result.tokens_per_second > 0
    assert generate(writing(0), Letters(), "", temperature=0).text == ""


def test_text_comes_in_pieces_and_never_in_half_characters():
    pieces: list[str] = []
    ids = Letters().encode("a^^b^")
    result = generate(writing(*ids, 0), Letters(), "", temperature=0, on_text=pieces.append)
    assert pieces == ["a", "é", "b", "\ufffd"] and "".join(pieces) == result.text


def test_never_longer_than_the_model_s_sequence():
    model = built(small("gpt2", max_sequence_tokens=12))
    result = generate(model, Letters(), "abcd", max_tokens=100, temperature=0)
    assert result.tokens <= 12 - 5
    assert generate(model, Letters(), "a" * 10, temperature=0).tokens <= 1
    with pytest.raises(UserError, match=r"12 tokens long.*model\.max_sequence_tokens=12"):
        generate(model, Letters(), "a" * 11)


def test_mode_of_the_model_is_left_as_it_was():
    model = built(small("llama", dropout=0.5))
    texts = {generate(model, Letters(), "ab", temperature=0).text for _ in range(3)}
    assert len(texts) == 1 and model.training


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("inf")),
        ("max_tokens", 0),
    ],
)
def test_values_that_mean_nothing_are_named(option, value):
    with pytest.raises(UserError, match=f"^{option}={value}"):
        generate(built(small("llama")), Letters(), "a", **{option: value})


@settings(max_examples=100)
@given(
    st.lists(st.integers(-80, 80), min_size=1, max_size=30),
    st.floats(0.05, 5),
    st.integers(0, 40),
    st.floats(0.01, 1.0),
    st.integers(0, 1000),
)
def test_draws_stay_among_the_likeliest(quarters, temperature, top_k, top_p, seed):
    values = torch.tensor(quarters, dtype=torch.float32) / 4
    drawn = next_token(values, Sampling(temperature, top_k, top_p), torch.Generator().manual_seed(seed))
    likelier = values > values[drawn]
    assert not top_k or likelier.sum() < top_k
    kept = values.topk(min(top_k, len(quarters))).values if top_k else values
    mass = (values[likelier].double() / temperature).exp().sum() / (kept.double() / temperature).exp().sum()
    assert mass <= top_p + 1e-4 or drawn == values.argmax()


def test_draws_follow_the_distribution():
    logits, generator = torch.tensor([2.0, 1.0, 0.0, -1.0]), torch.Generator().manual_seed(0)
    sampling = Sampling(temperature=0.5, top_p=0.99)
    counts = torch.bincount(torch.tensor([next_token(logits, sampling, generator) for _ in range(4000)]), minlength=4)
    expected = torch.tensor([4.0, 2.0, 0.0]).softmax(0)
    assert counts[3] == 0
    torch.testing.assert_close(counts[:3] / 4000, expected, atol=0.03, rtol=0)


ROWS = [[0, 11, 12, 13], [0], [0, *range(20, 41)], [0, 50, 51], [0, 11]]
LIMITS = [12, 40, 30, 1, 25]


@pytest.mark.parametrize("kind", CAUSAL)
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.9, top_p=0.9, min_p=0.02, repetition_penalty=1.3)])
def test_rows_written_together_are_those_written_one_by_one(kind, sampling):
    model, seeds = built(small(kind)), range(5)
    alone = [
        list(continuation(model, ids, most, sampling, seed))
        for ids, most, seed in zip(ROWS, LIMITS, seeds, strict=True)
    ]
    assert continuations(model, ROWS, LIMITS, sampling, seeds) == alone
    end_ids = frozenset({alone[1][7], alone[2][3]})
    ended = [ids[: next((place for place, id_ in enumerate(ids) if id_ in end_ids), len(ids))] for ids in alone]
    assert continuations(model, ROWS, LIMITS, sampling, seeds, end_ids) == ended != alone


def test_rows_keep_what_they_have_read_and_finished_rows_are_computed_no_more():
    model, read = built(small("llama")), []
    model.register_forward_pre_hook(lambda _, inputs: read.append(tuple(inputs[0].shape)))
    continuations(model, [[0, 11, 12], [0], [0, 5]], [2, 5, 4], GREEDY, range(3))
    assert read == [(3, 3), (3, 1), (2, 1), (2, 1), (1, 1)]


def test_prompts_of_any_number_at_once_give_what_each_gives_alone():
    model, prompts = built(small("gpt2")), ["ab", "", "a longer prompt", "x"]
    alone = [generate(model, Letters(), p, max_tokens=60, seed=7 + i) for i, p in enumerate(prompts)]
    for num_at_once in (1, 3, 32):
        found = list(generate_all(model, Letters(), prompts, max_tokens=60, seed=7, num_at_once=num_at_once))
        assert [(w.text, w.tokens) for w in found] == [(g.text, g.tokens) for g in alone]
    assert model.training


def test_a_prompt_without_room_is_named_before_anything_is_written():
    model = built(small("gpt2", max_sequence_tokens=12))
    with pytest.raises(UserError, match=r"^prompt 2: the prompt is 12 tokens long"):
        generate_all(model, Letters(), ["a", "a" * 11])


@pytest.mark.parametrize("seed", range(5))
def test_draws_are_among_those_hugging_face_keeps(seed):
    logits_process = pytest.importorskip("transformers.generation.logits_process", reason="needs llm_dist[hf]")
    logits = 3 * torch.randn(50, generator=torch.Generator().manual_seed(seed))
    read = [3, 7, 7, int(logits.argmax()), int(logits.argmin())]
    scores = logits_process.RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([read]), logits[None].clone())
    penalized = Sampling(0, repetition_penalty=1.7)
    assert next_token(logits, penalized, torch.Generator(), read) == int(scores.argmax())
    torch.testing.assert_close(less_repeated(logits, read, 1.7), scores[0], rtol=0, atol=0)
    for warp in (
        logits_process.TemperatureLogitsWarper(1.3),
        logits_process.TopKLogitsWarper(20),
        logits_process.TopPLogitsWarper(0.95),
        logits_process.MinPLogitsWarper(0.1),
    ):
        scores = warp(None, scores)
    sampling, generator = Sampling(1.3, 20, 0.95, 0.1, 1.7), torch.Generator().manual_seed(seed)
    drawn = [next_token(logits, sampling, generator, read) for _ in range(3000)]
    assert set(drawn) <= set(scores[0].isfinite().nonzero()[:, 0].tolist())
    counts = torch.bincount(torch.tensor(drawn), minlength=50) / len(drawn)
    torch.testing.assert_close(counts, scores[0].softmax(0), atol=0.04, rtol=0)
