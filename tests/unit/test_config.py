"""The run file: reading, overriding and refusing."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_dist import config
from llm_dist.errors import UserError

SMALLEST = """
[run]
name = "tiny"
steps = 10
[model]
layers = 1
d_model = 8
heads = 2
[data]
train = "shards"
sequence_tokens = 8
[batch]
tokens_per_step = 16
"""


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(SMALLEST)
    return file


def changed(path, *overrides):
    return config.load(path, overrides)


def mistakes(path, *overrides):
    with pytest.raises(UserError) as caught:
        config.load(path, overrides)
    return str(caught.value).splitlines()


def test_defaults_are_resolved(path):
    run = config.load(path)
    assert (run.model.num_kv_heads, run.model.d_head, run.model.width_ff) == (2, 4, 64)
    assert (run.model.positions, run.model.tied_head) == ("rotary", False)
    assert (run.save_every_steps, run.schedule_steps) == (1, 10)
    gpt2 = changed(path, "model.family=gpt2")
    assert (gpt2.model.width_ff, gpt2.model.positions, gpt2.model.tied_head) == (32, "learned", True)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("optim.lr=3e-4", 3e-4),
        ("optim.lr = 1", 1.0),
        ("engine.name=zero", "zero"),
        ('engine.name="zero"', "zero"),
        ("model.qk_norm=true", True),
        ("run.dir=/a/b=c d", "/a/b=c d"),
        ("data.holdout=[]", []),
        ('data.holdout=["a", "b"]', ["a", "b"]),
        ("batch.tokens_per_step=1_024", 1024),
        ("run.name=2024-01-01x", "2024-01-01x"),
        ('data.train={a="x", b="s3://y"}', {"a": "x", "b": "s3://y"}),
    ],
)
def test_overrides_are_toml_values_or_plain_text(path, override, value):
    section, name = override.partition("=")[0].strip().split(".")
    assert getattr(getattr(changed(path, override), section), name) == value


def test_every_mistake_has_its_own_line(path):
    lines = mistakes(path, "model.layers=0", "engine.name=zeus", "optim.speed=3", "eval.every_steps=often")
    assert len(lines) == 4
    assert all(line.startswith(f"{path}: ") for line in lines)
    assert "model.layers=0: input should be greater than or equal to 1" in lines[0]


@pytest.mark.parametrize("key", ["speed=1", "optim=1=2", "a.b.c=1", ".lr=1", "optim.=1", "optim.lr"])
def test_what_is_no_override(path, key):
    assert "section.key=value" in mistakes(path, key)[0] or "is not a key" in mistakes(path, key)[0]


def test_numbers_in_plain_text_are_not_taken_for_text_where_a_number_is_wanted(path):
    (line,) = mistakes(path, "run.steps=ten")
    assert "run.steps='ten': input should be a valid integer" in line


def test_a_folder_is_the_run_it_holds_wherever_it_lies(path, tmp_path, monkeypatch):
    run = config.load(path)
    moved = tmp_path / "deep" / "moved"
    moved.mkdir(parents=True)
    (moved / "config.json").write_text(run.to_json())
    assert config.load(moved).run.folder == moved
    assert config.load(moved, ["run.name=fork"]).run.folder == tmp_path / "deep" / "fork"
    monkeypatch.chdir(moved)
    assert config.load(".").run.folder == moved
    assert config.load(moved / "config.json").run.folder == run.run.folder


def test_json_and_toml_say_the_same(path, tmp_path):
    run = config.load(path, ["init.from=x", "eval.patience=3"])
    (tmp_path / "config.json").write_text(run.to_json())
    assert config.load(tmp_path / "config.json") == run
    assert json.loads(run.to_json())["init"]["from"] == "x"
    assert run.to_json() == config.load(tmp_path / "config.json").to_json()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[run", "Expected"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"run = 3", "run=3"),
    ],
)
def test_what_is_no_run_file(tmp_path, content, words):
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    assert words in mistakes(path)[0]


def test_what_is_not_there(tmp_path):
    assert mistakes(tmp_path / "no.toml") == [f"{tmp_path}/no.toml: no such run file or run folder"]
    assert "it has no config.json" in mistakes(tmp_path)[0]
    (tmp_path / "list.json").write_text("[]")
    assert "not a list" in mistakes(tmp_path / "list.json")[0]


@given(st.integers(1, 300), st.integers(1, 5000))
def test_tokens_per_step_is_a_multiple_and_the_nearest_one_is_named(sequence, tokens):
    table = config.tomllib.loads(SMALLEST)
    table["data"]["sequence_tokens"], table["batch"]["tokens_per_step"] = sequence, tokens
    if tokens % sequence == 0:
        assert config.parse(table).batch.tokens_per_step == tokens
        return
    with pytest.raises(UserError) as caught:
        config.parse(table)
    table["batch"]["tokens_per_step"] = nearest = int(re.search(r"nearest: (\d+)", str(caught.value))[1])
    config.parse(table)
    assert abs(nearest - tokens) <= max(sequence / 2, sequence - tokens)


def test_every_key_has_a_rule_and_a_help():
    for key, rule in config.fields().items():
        assert rule in ("identity", "from_now", "free"), key
    for section in config.Config.model_fields.values():
        for name, field in section.annotation.model_fields.items():
            assert field.description, name


def test_sources_are_a_folder_or_a_table_of_them(path):
    assert config.load(path).data.sources == {"train": "shards"}
    assert changed(path, 'data.train={web="w", code="c"}').data.sources == {"web": "w", "code": "c"}


def segments(*starts_and_weights):
    """`data.mixture` as an override."""
    tables = ", ".join(f"{{from_step={first}, weights={weights}}}" for first, weights in starts_and_weights)
    return f"data.mixture=[{tables}]"


SOURCES = 'data.train={web="w", code="c"}'


def test_a_mixture_is_weights_by_source_from_a_step_on(path):
    run = changed(path, SOURCES, segments((0, "{web=3, code=0.1}"), (70, "{code=1}")))
    assert [(each.from_step, each.weights) for each in run.data.mixture] == [
        (0, {"web": 3.0, "code": 0.1}),
        (70, {"code": 1.0}),
    ]
    assert changed(path, segments((0, "{train=1}"))).data.mixture[0].weights == {"train": 1.0}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.train={}"], "data.train names no source; give a folder, or a table of folders by name"),
        (['data.train={""="x"}'], "data.train names no source; "),
        (
            [SOURCES, segments((1, "{web=1}"))],
            "data.mixture: from_step must begin at 0 and rise from segment to segment",
        ),
        ([SOURCES, segments((0, "{web=1}"), (9, "{web=2}"), (5, "{code=1}"))], "found [0, 9, 5]"),
        ([SOURCES, segments((0, "{web=1}"), (5, "{web=2}"), (5, "{code=1}"))], "found [0, 5, 5]"),
        (
            [SOURCES, segments((0, "{web=1}"), (5, "{wiki=1, book=2}"))],
            "data.mixture[1] weighs book, wiki, which data.train does not name; it names code, web",
        ),
        ([segments((0, "{web=1}"))], "data.mixture[0] weighs web, which data.train does not name; it names train"),
        *(
            (
                [SOURCES, segments((0, "{web=1}"), (5, weights))],
                "data.mixture[1].weights must be at least 0, finite, and ",
            )
            for weights in ("{web=-1, code=2}", "{web=inf}", "{web=nan, code=1}", "{web=0, code=0.0}")
        ),
        (
            [SOURCES, segments((-1, "{web=1}"))],
            "data.mixture.0.from_step=-1: input should be greater than or equal to 0",
        ),
        ([SOURCES, segments((0, "{}"))], "data.mixture.0.weights={}: dictionary should have at least 1 item"),
        ([SOURCES, segments((0, '{web="much"}'))], "data.mixture.0.weights.web='much': input should be a valid number"),
        ([SOURCES, "data.mixture=[{from_step=0}]"], "data.mixture.0.weights is missing"),
        ([SOURCES, "data.mixture=[{from_step=0, weights={web=1}, until=3}]"], "data.mixture.0.until is not a key"),
    ],
)
def test_each_rule_of_mixtures_is_one_line(path, overrides, words):
    (line,) = mistakes(path, *overrides)
    assert line.startswith(f"{path}: ")
    assert words in line


def test_longer_runs_keep_the_schedule_they_froze(path):
    frozen = config.load(path).frozen()
    assert frozen.optim.total_steps == 10
    assert frozen.frozen() == frozen


def test_nothing_of_a_run_file_can_be_changed_in_place(path):
    run = config.load(path)
    with pytest.raises(config.ValidationError):
        run.run.steps = 3
