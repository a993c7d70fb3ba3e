"""metrics.jsonl is the record; sinks mirror it and may fail."""

import csv
import json
import sys
import time

import pytest

from llm_dist import config, metrics
from llm_dist.metrics import Metrics


def run(*sinks):
    table = {
        "run": {"name": "tiny", "steps": 10},
        "model": {"layers": 1, "d_model": 8, "heads": 1},
        "data": {"train": "shards", "sequence_tokens": 8},
        "batch": {"tokens_per_step": 16},
        "log": {"sinks": list(sinks)},
    }
    return config.parse(table)


@pytest.fixture
def said():
    return []


def written(tmp_path, said, records, attempt=1, sinks=()):
    writer = Metrics(run(*sinks), tmp_path, attempt, said.append)
    for step, record in records:
        writer.write(step, record)
    writer.close()
    return metrics.read(tmp_path / "metrics.jsonl")


def test_records_carry_step_and_attempt(tmp_path, said):
    records = written(tmp_path, said, [(1, {"loss_nats": 2.5}), (2, {"loss_nats": 2.0})])
    assert records[0] == {"step": 1, "attempt": 1, "time": pytest.approx(time.time(), abs=60), "loss_nats": 2.5}
    assert [record["step"] for record in records] == [1, 2]


def test_the_last_attempts_word_counts(tmp_path, said):
    written(tmp_path, said, [(1, {"loss_nats": 3.0}), (2, {"loss_nats": 2.0}), (2, {"eval": {"a": {"loss_nats": 9}}})])
    records = written(tmp_path, said, [(2, {"loss_nats": 2.1}), (3, {"loss_nats": 1.0})], attempt=2)
    assert [(r["step"], r["attempt"], r.get("loss_nats")) for r in records] == [
        (1, 1, 3.0),
        (2, 2, 2.1),
        (2, 1, None),
        (3, 2, 1.0),
    ]


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_half_a_line_is_left_out_and_swallows_nothing(tmp_path, said, cut):
    written(tmp_path, said, [(1, {"loss_nats": 3.0}), (2, {"loss_nats": 2.0})])
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    records = written(tmp_path, said, [(2, {"loss_nats": 2.5}), (3, {"loss_nats": 1.0})], attempt=2)
    assert [(record["step"], record["loss_nats"]) for record in records] == [(1, 3.0), (2, 2.5), (3, 1.0)]


def test_nothing_there_yet_is_no_record(tmp_path):
    assert metrics.read(tmp_path / "metrics.jsonl") == []


def test_csv_is_long_and_flat_and_goes_on(tmp_path, said):
    record = {"loss_nats": 2.5, "mfu_convention": "words", "seconds": {"step": 0.5}, "is_odd": True}
    written(tmp_path, said, [(1, record)], sinks=["csv"])
    written(tmp_path, said, [(2, {"loss_nats": 2})], attempt=2, sinks=["csv"])
    rows = list(csv.reader((tmp_path / "metrics.csv").read_text().splitlines()))
    assert rows == [
        ["step", "name", "value"],
        ["1", "loss_nats", "2.5"],
        ["1", "seconds/step", "0.5"],
        ["2", "loss_nats", "2.0"],
    ]
    assert said == []


def test_tensorboard_holds_the_curves(tmp_path, said):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    record = {"loss_nats": 2.5, "eval": {"holdout": {"perplexity": 12.0}}}
    written(tmp_path, said, [(1, record), (2, record)], sinks=["tensorboard"])
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss_nats")] == [1, 2]
    assert events.Scalars("eval/holdout/perplexity")[0].value == 12.0


def test_a_sink_that_cannot_start_is_said_once_and_the_run_goes_on(tmp_path, said, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    (tmp_path / "metrics.csv").mkdir()
    assert len(written(tmp_path, said, [(1, {"a": 1}), (2, {"a": 2})], sinks=["wandb", "csv"])) == 2
    assert len(said) == 2
    assert said[0].startswith("log.sinks: wandb failed and is off for this run: ")
    assert said[1].startswith("log.sinks: csv failed and is off for this run: IsADirectoryError")


def test_a_sink_that_fails_later_is_dropped_and_the_others_stay(tmp_path, said, monkeypatch):
    def broken(self, step, values):
        raise ConnectionError("no network")

    monkeypatch.setattr(metrics.TensorBoardSink, "write", broken)
    written(tmp_path, said, [(1, {"a": 1}), (2, {"a": 2})], sinks=["tensorboard", "csv"])
    assert said == ["log.sinks: tensorboard failed and is off for this run: ConnectionError: no network"]
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 3


def test_the_record_itself_is_durable_line_by_line(tmp_path, said):
    writer = Metrics(run(), tmp_path, 1, said.append)
    writer.write(1, {"a": 1})
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert {name: line[name] for name in line if name != "time"} == {"step": 1, "attempt": 1, "a": 1}
    writer.close()
