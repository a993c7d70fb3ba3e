"""Plans: the dealing of rows, bytes by kind, traffic, and what is refused or advised."""

from math import ceil, prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_dist import config, plan, plan_memory
from llm_dist.errors import UserError
from llm_dist.model import size

sizes = st.integers(1, 300)


def make(*overrides: str) -> config.Config:
    table = {
        "run": {"name": "x", "steps": 100},
        "model": {"layers": 2, "d_model": 64, "heads": 4},
        "data": {"train": "shards", "sequence_tokens": 128},
        "batch": {"tokens_per_step": 128 * 24, "sequences_per_micro_batch": 4},
    }
    return config.parse(table, overrides)


@given(sizes, sizes)
def test_every_row_has_one_rank_and_ranks_differ_by_one(rows, ranks):
    dealt = [plan.rows_per_rank(rows, ranks, rank) for rank in range(ranks)]
    assert sum(dealt) == rows
    assert max(dealt) - min(dealt) <= 1


@given(sizes, sizes, sizes)
def test_micro_batches_hold_the_fullest_rank_and_no_fewer_would(rows, ranks, micro_batch):
    most = max(plan.rows_per_rank(rows, ranks, rank) for rank in range(ranks))
    count = plan.num_micro_batches(rows, ranks, micro_batch)
    assert (count - 1) * micro_batch < most <= count * micro_batch


@given(sizes, sizes, sizes)
def test_micro_batches_are_dealt_evenly(rows, ranks, micro_batch):
    """At most one absent row in each micro-batch of the fullest rank, wherever there are more rows than that."""
    most = max(plan.rows_per_rank(rows, ranks, rank) for rank in range(ranks))
    count = plan.num_micro_batches(rows, ranks, micro_batch)
    at_once = plan.rows_per_micro_batch(rows, ranks, micro_batch)
    assert at_once <= micro_batch
    assert most <= count * at_once < most + count
    assert plan.waste(rows, ranks, micro_batch) == pytest.approx(1 - rows / (ranks * count * at_once))


def test_an_uneven_dealing_wastes_little():
    assert plan.waste(32, 3, 8) == pytest.approx(1 / 9)


@given(st.integers(1, 64), st.integers(1, 16), st.integers(1, 16))
def test_nearest_settings_waste_nothing(rows, ranks, micro_batch):
    wanted = make(f"batch.tokens_per_step={128 * rows}", f"batch.sequences_per_micro_batch={micro_batch}")
    dealt = plan.make_rows(wanted, ranks)
    assert (dealt.waste == 0) == (not dealt.nearest)
    for setting in dealt.nearest:
        changed, ranks_then = (wanted, int(setting.split()[0])) if " ranks" in setting else (wanted, ranks)
        if " ranks" not in setting:
            table = wanted.model_dump(by_alias=True)
            changed = config.parse(table, [setting])
        assert plan.make_rows(changed, ranks_then).waste == 0, setting


def test_golden_waste():
    dealt = plan.make_rows(make("batch.tokens_per_step=1280"), 2)
    assert (dealt.num_micro_batches, round(dealt.waste, 3)) == (2, 0.167)
    assert dealt.rows_per_micro_batch == 3
    assert dealt.nearest == (
        "batch.sequences_per_micro_batch=5",
        "5 ranks",
        "batch.tokens_per_step=1024",
    )


def test_waste_is_refused_at_submission_with_the_way_out():
    dealt = plan.make_rows(make("batch.tokens_per_step=1280"), 2)
    with pytest.raises(UserError, match=r"17% .*plan\.max_waste=0\.1.*sequences_per_micro_batch=5 or 5 ranks or"):
        plan.require_little_waste(dealt, 0.1)
    plan.require_little_waste(dealt, 0.4)


def test_state_bytes_by_engine():
    """Stages 1 and 2 fill their buffers up to multiples of the ranks; `tests/dist/test_memory.py` has the byte."""
    shapes = size.parameter_shapes(make().model, 1000)
    total = sum(map(prod, shapes.values()))

    def of(ranks, *overrides):
        memory = plan.memory_of(make(*overrides), 1000, ranks)
        return memory.weights, memory.gradients, memory.optimizer

    by_parameter = sum(ceil(prod(shape) / 4) for shape in shapes.values())
    whole_step_at_once = "batch.sequences_per_micro_batch=6"
    assert of(4, whole_step_at_once) == (4 * total, 4 * total, 8 * total)
    assert of(4) == (4 * total, 8 * total, 8 * total)  # DDP accumulates beside its buckets
    assert of(1, "optim.name=sgd") == (4 * total, 4 * total, 0)
    assert total % 64 == 0
    assert of(4, "engine.name=zero", "engine.zero_stage=0") == (2 * total, 2 * total, 12 * total)
    assert of(4, "engine.name=zero", "engine.zero_stage=1") == (2 * total, 4 * total, 3 * total)
    assert of(4, "engine.name=zero", "engine.zero_stage=2") == (2 * total, total, 3 * total)
    stage_3 = ["engine.name=zero", "engine.zero_stage=3"]
    assert of(4, *stage_3) == (2 * by_parameter, 4 * by_parameter, 12 * by_parameter)
    assert of(4, *stage_3, "engine.precision=fp32") == (4 * by_parameter, 4 * by_parameter, 12 * by_parameter)
    own = sum(ceil(shape[0] / 2) * prod(shape[1:]) for shape in shapes.values())
    assert of(4, "engine.name=fsdp", "engine.shard_ranks=2", whole_step_at_once) == (4 * own, 4 * own, 8 * own)


def test_recompute_trades_activations():
    none, selective, full = (
        plan.memory_of(make("model.layers=8", f"engine.recompute={kind}"), 1000, 1)
        for kind in ("none", "selective", "full")
    )
    assert none.activations > selective.activations > full.activations
    assert none.state == full.state
    assert none.peak > full.peak


def test_gradients_come_as_activations_go_in_a_single_micro_batch():
    """Several micro-batches keep the gradients of the earlier ones beside the activations of the later ones."""
    overrides = ("model.layers=24", "engine.precision=fp32")
    single = plan.memory_of(make("batch.tokens_per_step=512", *overrides), 1000, 1)
    several = plan.memory_of(make("batch.tokens_per_step=1024", *overrides), 1000, 1)
    assert single.state == several.state
    assert several.peak == single.peak + several.gradients
    assert single.peak < single.state + single.gradients + single.activations + single.head


def test_fsdp_accumulates_shards():
    once, often = (
        plan.memory_of(make("engine.name=fsdp", f"batch.tokens_per_step={128 * rows}"), 1000, 4) for rows in (16, 64)
    )
    assert often.gradients == once.gradients
    assert often.peak <= once.peak + often.gradients


def test_a_cpu_without_bf16_units_needs_more():
    widening = size.Machine(is_cpu=True, multiplies_bf16=False)
    here, there = (plan.memory_of(make("engine.precision=bf16"), 1000, 1, machine) for machine in (widening, size.GPU))
    assert here.peak > there.peak
    assert here.between_steps == there.between_steps


@pytest.mark.parametrize("stage", range(1, 4))
def test_deepspeed_reserves_whole_buckets_on_a_gpu(stage):
    small = make("engine.name=zero", f"engine.zero_stage={stage}", "engine.precision=fp32")
    assert plan.memory_of(small, 1000, 2).peak > 4 * plan_memory.ZERO_BUCKET_ELEMENTS


def test_traffic_in_theory():
    total = size.num_parameters(make().model, 1000).total
    once = "batch.sequences_per_micro_batch=6"

    def of(*overrides, ranks=4):
        return plan.traffic_bytes(make(once, *overrides), 1000, ranks) / total

    assert of(ranks=1) == 0
    assert of() == pytest.approx(2 * 4 * 3 / 4, abs=1e-3)
    assert of("engine.name=zero", "engine.precision=fp32") == pytest.approx(2 * 4 * 3 / 4, abs=1e-3)
    assert of("engine.name=fsdp", "engine.precision=fp32") == pytest.approx(3 * 4 * 3 / 4, abs=1e-3)
    assert of("engine.name=fsdp") == pytest.approx((2 + 2 + 4) * 3 / 4, abs=1e-3)
    hybrid = of("engine.name=fsdp", "engine.shard_ranks=2")
    assert hybrid == pytest.approx((2 + 2 + 4) / 2 + 2 * 4 / 2 * 1 / 2, abs=1e-3)
    thrice = of("engine.name=fsdp", "engine.shard_ranks=2", "batch.sequences_per_micro_batch=2")
    assert thrice == pytest.approx(3 * (2 + 2 + 4) / 2 + 2 * 4 / 2 * 1 / 2, abs=1e-3)


def test_time_and_cost_follow_from_flops():
    made = plan.make_plan(make(), 1000, 2, num_tokens=1_000_000, gpu="H100", price_per_hour=2.0)
    flops = made.flops_per_token * 128 * 24
    assert made.pace is not None
    assert made.pace.seconds_per_step == pytest.approx(flops / (2 * 989e12 * plan.ASSUMED_UTILISATION))
    assert made.pace.cost == pytest.approx(made.pace.gpu_hours * 2.0)
    assert made.pace.gpu_hours == pytest.approx(made.pace.days * 24 * 2)
    assert made.epochs == pytest.approx(100 * 128 * 24 / 1_000_000)
    assert made.flops_per_token_causal < made.flops_per_token
    with pytest.raises(UserError, match="--gpu H1 is not known; choose one of H100"):
        plan.make_plan(make(), 1000, 2, gpu="H1")


def test_warnings():
    made = plan.make_plan(make(), 1000, 32, num_tokens=1000, gpu="H100")
    assert any("8 of 32 ranks have no row" in warning for warning in made.warnings)
    assert any("epochs" in warning for warning in made.warnings)
    assert plan.make_plan(make(), 1000, 2, num_tokens=10**7).warnings == ()


def test_hybrid_groups_fill_the_ranks():
    with pytest.raises(UserError, match=r"engine\.shard_ranks=3 does not divide the 4 ranks"):
        plan.make_plan(make("engine.name=fsdp", "engine.shard_ranks=3"), 1000, 4)


@pytest.mark.parametrize(
    ("overrides", "name", "key"),
    [
        ([], "LlamaForCausalLM", None),
        (["model.qk_norm=true"], "Qwen3ForCausalLM", None),
        (["model.positions=learned"], None, "model.positions"),
        (["model.family=gpt2"], "GPT2LMHeadModel", None),
        (["model.family=gpt2", "model.positions=sinusoidal"], "GPT2LMHeadModel", None),
        (["model.family=gpt2", "model.positions=rotary"], None, "model.positions"),
        (["model.family=gpt2", "model.kv_heads=2"], None, "model.kv_heads"),
        (["model.family=gpt2", "model.qk_norm=true"], None, "model.qk_norm"),
    ],
)
def test_export_is_known_before_training(overrides, name, key):
    made = plan.make_plan(make(*overrides), 1000, 1)
    assert made.hugging_face == name
    assert (made.not_exportable is None) if key is None else made.not_exportable.startswith(key)
