"""Low-rank updates: nothing at the start, the same beside the weights as inside them, and only they are trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llm_dist import config, plan
from llm_dist.config import Heads, Lora
from llm_dist.config_lora import ADAPTER
from llm_dist.engine.select import freeze
from llm_dist.errors import UserError
from llm_dist.model.adapters import merged
from llm_dist.model.init import initialize
from llm_dist.model.size import parameter_shapes
from llm_dist.model.transformer import Transformer
from llm_dist.objectives.causal import Causal
from llm_dist.objectives.objective import Trainee
from tests.unit.model.shapes import KINDS, VOCABULARY_TOKENS, small, some_ids

EVERY = Lora(rank=3, alpha=5.0, targets=["*.attention.*", "*.feed_forward.*"])


def built(kind: str, lora: Lora | None, heads: Heads = config.LANGUAGE) -> Transformer:
    model = small(kind)
    transformer = Transformer(model, VOCABULARY_TOKENS, torch.float32, heads, lora)
    initialize(transformer, model, 0.2, 0)
    return transformer.eval()


def with_updates(kind: str, lora: Lora) -> Transformer:
    transformer = built(kind, lora)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if ADAPTER in name:
                parameter.normal_(0.0, 0.1, generator=generator)
    return transformer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lora", [Lora(rank=2), EVERY, Lora(rank=2, targets=["blocks.1.feed_forward.up"]), Lora()])
def test_shapes_are_the_module_s(kind: str, lora: Lora) -> None:
    model = small(kind)
    with torch.device("meta"):
        transformer = Transformer(model, VOCABULARY_TOKENS, torch.float32, lora=lora)
    registered = {name: tuple(parameter.shape) for name, parameter in transformer.named_parameters()}
    shapes = parameter_shapes(model, VOCABULARY_TOKENS, lora=lora)
    assert list(shapes.items()) == list(registered.items())
    assert any(ADAPTER in name for name in shapes) == (lora.rank is not None)


@pytest.mark.parametrize("kind", ["llama-grouped", "gpt2", "bert", "modernbert"])
def test_at_the_start_nothing_changes(kind: str) -> None:
    with torch.no_grad():
        assert torch.equal(built(kind, EVERY)(some_ids()), built(kind, None)(some_ids()))


@pytest.mark.parametrize("kind", ["llama-grouped", "qwen2", "gpt2", "bert", "modernbert"])
def test_beside_the_weights_or_inside_them_is_the_same(kind: str) -> None:
    beside, inside = with_updates(kind, EVERY), built(kind, None)
    weights = dict(beside.named_parameters())
    inside.load_state_dict(merged({name: value.detach() for name, value in weights.items()}, EVERY), strict=False)
    with torch.no_grad():
        expected, base = beside(some_ids()), built(kind, None)(some_ids())
        torch.testing.assert_close(inside(some_ids()), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(base, expected, atol=1e-2), "updates matter"


def test_an_update_is_scaled_by_alpha_over_rank() -> None:
    weights = {
        "a.weight": torch.ones(2, 3),
        f"a{ADAPTER}down": torch.tensor([[1.0, 0.0, 2.0]]),
        f"a{ADAPTER}up": torch.tensor([[1.0], [3.0]]),
    }
    [(name, weight)] = merged(weights, Lora(rank=1, alpha=0.5)).items()
    assert (name, weight.tolist()) == ("a.weight", [[1.5, 1, 2], [2.5, 1, 4]])


def run_file(*overrides: str, **sections: dict[str, Any]) -> config.Config:
    table: dict[str, Any] = {
        "run": {"name": "x", "steps": 1},
        "model": {"layers": 2, "d_model": 32, "heads": 4, "max_sequence_tokens": 64},
        "data": {"train": "nowhere", "sequence_tokens": 32},
        "batch": {"tokens_per_step": 64},
        "init": {"from": "runs/base"},
        "lora": {"rank": 4},
    }
    return config.parse(table | sections, overrides)


def test_updates_and_new_heads_are_trained_and_nothing_else() -> None:
    run = run_file('data.labels=["a", "b"]', "objective.name=classify", "model.family=bert")
    trainee = Trainee(Transformer(run.model, VOCABULARY_TOKENS, torch.float32, run.heads, run.lora), Causal())
    freeze(trainee, run)
    trained = {name.removeprefix("model.") for name, each in trainee.named_parameters() if each.requires_grad}
    assert trained == {
        *(f"blocks.{n}.attention.{k}.adapter.{p}" for n in (0, 1) for k in ("query", "value") for p in ("down", "up")),
        *(f"{head}.{part}" for head in ("pooler.dense", "class_head.output") for part in ("weight", "bias")),
    }
    fewer = run_file("optim.frozen=['blocks.0.*']")
    trainee = Trainee(Transformer(fewer.model, VOCABULARY_TOKENS, torch.float32, fewer.heads, fewer.lora), Causal())
    freeze(trainee, fewer)
    assert {name.split(".")[2] for name, each in trainee.named_parameters() if each.requires_grad} == {"1"}


@pytest.mark.parametrize("engine", ["plain", "fsdp"])
def test_plans_know_what_is_trained(engine: str) -> None:
    lora = run_file(f"engine.name={engine}")
    whole = run_file(f"engine.name={engine}", lora={})
    planned, full = (plan.make_plan(each, VOCABULARY_TOKENS, 2) for each in (lora, whole))
    updates = 2 * 2 * 4 * (32 + 32)
    assert (planned.num_trained, planned.num_parameters) == (updates, full.num_parameters + updates)
    assert full.num_trained == full.num_parameters
    assert planned.memory.optimizer < full.memory.optimizer / 10
    assert planned.memory.weights > full.memory.weights
    assert planned.memory.peak < full.memory.peak
    assert planned.traffic_bytes_per_step < full.traffic_bytes_per_step


MISTAKES = [
    (("engine.name=zero",), 'lora.rank needs engine.name="plain" or "fsdp"'),
    (("lora.rank=0",), "lora.rank=0"),
    (("lora.targets=[]",), "lora.targets"),
]


@pytest.mark.parametrize(("overrides", "words"), MISTAKES)
def test_what_does_not_fit_is_one_line(overrides: tuple[str, ...], words: str) -> None:
    with pytest.raises(UserError) as caught:
        run_file(*overrides)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_updates_need_a_model_that_has_learnt() -> None:
    with pytest.raises(UserError, match=r"lora\.rank needs init\.from"):
        run_file(init={})


def test_a_pattern_that_fits_no_layer_is_named() -> None:
    with pytest.raises(UserError, match=r"no layer fits '\*\.attn'; the first block has blocks\.0\.attention\.query, "):
        parameter_shapes(small("llama"), VOCABULARY_TOKENS, lora=Lora(rank=1, targets=["*.value", "*.attn"]))
