"""Every file in configs/ loads, plans and says what it exports to."""

import json
from pathlib import Path

import pytest

from launcher.plan_table import render
from launcher.planning import what_fits
from llm_dist import config
from llm_dist.plan import make_plan

FOLDER = Path(__file__).parents[2] / "configs"
FILES = sorted(FOLDER.glob("*.toml"))
EXPECTED = {  # file: ranks and GPU its head comment names, millions of parameters
    "demo": (2, "4090", 8),
    "30m": (1, "4090", 25),
    "30m-mixture": (1, "4090", 25),
    "125m": (1, "H100", 126),
    "gpt2-124m": (8, "A100-80", 124),
    "encoder-small": (2, "4090", 2),
    "finetune": (2, "4090", 2),
    "bert-110m": (8, "A100-80", 110),
    "modernbert-149m": (8, "H100", 150),
    "1b": (8, "H100", 1382),
    "7b": (64, "H100", 6738),
    "13b": (128, "H100", 13016),
    "warandpeace": (2, "4090", 12),
    "70b": (512, "H100", 70554),
}


def test_the_table_below_names_every_file():
    assert {path.stem for path in FILES} == set(EXPECTED)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_loads_plans_and_fits_where_it_says(path):
    ranks, gpu, millions = EXPECTED[path.stem]
    wanted = config.load(path)
    made = make_plan(wanted, wanted.plan.vocabulary_tokens, ranks, gpu=gpu, price_per_hour=2.0)
    assert round(made.num_parameters / 1e6) == millions
    assert made.pace is not None and made.pace.fits
    assert [warning for warning in made.warnings if "bf16" not in warning] == []
    assert made.rows.waste == 0
    assert made.hugging_face is not None
    assert wanted.run.name == path.stem
    json.dumps(made.as_table())
    assert "peak per rank" in render(wanted, made, None)


def test_what_does_not_fit_is_told_what_would():
    wanted = config.load(FOLDER / "7b.toml", ["engine.name=plain"])
    vocabulary = wanted.plan.vocabulary_tokens
    made = make_plan(wanted, vocabulary, 64, gpu="H100")
    assert made.pace is not None and not made.pace.fits
    suggestion = what_fits(wanted, vocabulary, made)
    assert suggestion is not None and "engine.name=fsdp" in suggestion
    overrides = [word for word in suggestion.split() if "." in word]
    changed = config.load(FOLDER / "7b.toml", ["engine.name=plain", *overrides])
    again = make_plan(changed, vocabulary, 64, gpu="H100")
    assert again.pace is not None and again.pace.fits
    assert what_fits(changed, vocabulary, again) is None
