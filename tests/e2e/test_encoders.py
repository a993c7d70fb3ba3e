"""Encoders train on the same loop, engines and checkpoints: what is hidden and paired follows from the step alone."""

from __future__ import annotations

import pytest

from llm_dist import config, metrics
from tests.e2e.commands import LAUNCH, TRAIN, assert_same_end, llm_dist, losses, run

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

ENCODER = ("model.family=bert", "objective.name=masked_nsp", "data.packing=separate", "eval.every_steps=4")


def train(*command: object) -> str:
    said = run(command)
    assert said.code == 0, said.err
    return said.err


def test_pairs_and_masks_are_the_same_on_other_engines_and_ranks_and_after_a_stop(tmp_path, write_run_file):
    run_file, runs = write_run_file(tmp_path), tmp_path / "runs"
    said = train(*TRAIN, run_file, *ENCODER)
    assert "pair accuracy" in said and "perplexity" not in said
    expected = losses(runs / "tiny")
    assert expected[8] < expected[1]

    for steps in (4, 8):
        train(*TRAIN, run_file, *ENCODER, "run.name=resumed", "optim.total_steps=8", f"run.steps={steps}")
    assert_same_end(runs / "resumed", runs / "tiny")

    spread = (run_file, *ENCODER, "run.name=spread", "optim.total_steps=8", "plan.max_waste=0.5")
    train(*LAUNCH, "--ranks", 2, *spread, "run.steps=4", "engine.name=fsdp")
    train(*LAUNCH, "--ranks", 3, *spread)
    assert losses(runs / "spread") == pytest.approx(expected, rel=1e-5)

    records = metrics.read(runs / "tiny" / "metrics.jsonl")
    evaluated = [record["eval"]["holdout"] for record in records if "eval" in record]
    assert len(evaluated) == 2 and set(evaluated[0]["scores"]) == {"accuracy", "pair_accuracy"}
    holdout = config.load(runs / "tiny").data.holdouts[0]
    said_again = llm_dist("eval", runs / "tiny", "--data", holdout, "--json").json
    assert said_again["loss_nats"] == pytest.approx(evaluated[-1]["loss_nats"], rel=1e-6)
    assert said_again["scores"] == evaluated[-1]["scores"] and said_again["perplexity"] is None


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("objective.name=masked",), 'objective.name="masked" needs model.attention="bidirectional"'),
        (("model.family=bert",), 'objective.name="causal" needs model.attention="causal"'),
        (
            ("model.family=bert", "objective.name=masked_sop"),
            'objective.name="masked_sop" needs data.packing="separate"',
        ),
        ((*ENCODER, "batch.tokens_per_step=32"), "needs at least 2 sequences per step"),
        ((*ENCODER, "objective.mask_fraction=0.7"), "objective.mask_fraction=0.7"),
        (
            (*ENCODER, "eval.best=f1"),
            'eval.best="f1" is no score of objective.name="masked_nsp"; choose one of loss, accuracy',
        ),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path, write_run_file, words, line):
    said = llm_dist("train", write_run_file(tmp_path), *words)
    assert line in said.mistake


def test_next_sentences_need_a_second_document(tmp_path, write_run_file, tokenizer):
    (tmp_path / "book.txt").write_text("One book, and no other. " * 300)
    data = (f"data.train={tmp_path / 'book.txt'}", f"data.tokenizer={tokenizer}", f"data.cache={tmp_path / 'cache'}")
    said = llm_dist("train", write_run_file(tmp_path), *ENCODER, *data, "data.holdout=[]")
    assert "data.train holds a single one" in said.mistake
