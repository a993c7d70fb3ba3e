"""From the run file to labelled examples: whose tokenizer, which labels, how long, and how heavy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llm_dist import config
from llm_dist.data.examples import Columns
from llm_dist.data.labelled import labelled_shards
from llm_dist.data.opening import held_out, open_holdouts, open_reading, settled
from llm_dist.data.opening_labelled import class_weights, open_labelled, tokenizer_of
from llm_dist.errors import UserError

EXAMPLES = "a fox\tgood\na dog\tbad\nthe quick brown fox jumps\tgood\nthe lazy dog\tgood\n"


@pytest.fixture
def run_of(tmp_path: Path, tiny_tokenizer: Path):
    (tmp_path / "train.tsv").write_text(EXAMPLES)

    def make(**more: Any) -> config.Config:
        table: dict[str, dict[str, Any]] = {
            "run": {"name": "x", "steps": 1},
            "model": {"family": "bert", "layers": 1, "d_model": 8, "heads": 1},
            "data": {
                "train": str(tmp_path / "train.tsv"),
                "tokenizer": str(tiny_tokenizer),
                "sequence_tokens": 64,
                "cache": str(tmp_path / "cache"),
            },
            "batch": {"tokens_per_step": 128},
            "objective": {"name": "classify"},
            "init": {},
        }
        for name, value in more.items():
            section, key = name.split("__")
            table[section][key] = value
        return config.parse(table)

    return make


def test_labels_come_with_their_rows_and_are_frozen_into_the_run(run_of, tmp_path) -> None:
    run = run_of(data__holdout=str(tmp_path / "train.tsv"))
    reading = open_reading(run)
    assert settled(run, reading).data.labels == ["bad", "good"] and run.heads.classes == 0
    rows = reading.read(*(array[0] for array in reading.places(range(1), range(2))))
    assert rows.targets.shape == (2,) and set(rows.targets.tolist()) <= {0, 1}
    holdouts = open_holdouts(run, reading.sources[0].shards)
    windows = held_out(run, holdouts["train.tsv"])
    assert windows.rows(range(4)).targets.tolist() == [1, 0, 1, 1], "in the order of the file"


def test_a_held_out_label_that_training_lacks_is_unknown(run_of, tmp_path) -> None:
    (tmp_path / "dev.tsv").write_text("a fox\tugly\n")
    run = run_of(data__holdout=str(tmp_path / "dev.tsv"))
    with pytest.raises(UserError, match=r"dev.tsv: line 1: label 'ugly' is unknown; the model knows bad, good"):
        open_holdouts(run, open_reading(run).sources[0].shards)


def test_shards_whose_labels_are_numbered_otherwise_are_refused(run_of, tmp_path, tiny_tokenizer) -> None:
    columns = Columns()
    made = labelled_shards(
        str(tmp_path / "train.tsv"), columns, "classify", tiny_tokenizer, tmp_path / "cache", ["good", "bad"]
    )
    with pytest.raises(UserError, match="its labels are good, bad, the model's are bad, good: ids differ"):
        open_labelled(run_of(), "data.holdout", str(made), ["bad", "good"])
    assert open_labelled(run_of(), "data.train", str(made), ["good", "bad"]).labels.names == ("good", "bad")


def test_what_is_too_long_is_refused_or_cut(run_of) -> None:
    with pytest.raises(UserError, match=r"the longest example has \d+ tokens, more than data.sequence_tokens=8"):
        open_reading(run_of(data__sequence_tokens=8, batch__tokens_per_step=16))
    reading = open_reading(run_of(data__sequence_tokens=8, batch__tokens_per_step=16, data__too_long="cut"))
    assert reading.sources[0].packing.num_windows == 4, "a window each, not a window per piece"


@pytest.mark.parametrize(
    ("weights", "expected"), [("none", None), ("balanced", [2.0, 4 / 6]), ([3.0, 0.5], [3.0, 0.5])]
)
def test_balanced_labels_weigh_the_same_together(run_of, weights, expected) -> None:
    run = run_of(objective__class_weights=weights)
    reading = open_reading(run)
    found = class_weights(settled(run, reading), reading.sources[0].shards)
    assert found == (expected if expected is None else pytest.approx(expected))


def test_the_tokenizer_is_that_of_the_run_it_starts_from(run_of, tmp_path) -> None:
    folder = tmp_path / "before"
    (folder / "tokenizer").mkdir(parents=True)
    for source in (folder, folder / "checkpoints" / "step_00000004"):
        assert tokenizer_of(run_of(data__tokenizer=None, init__from=str(source))) == str(folder / "tokenizer")
    assert tokenizer_of(run_of(data__tokenizer="mine", init__from=str(folder))) == "mine"
    assert tokenizer_of(run_of(data__tokenizer=None)) is None
