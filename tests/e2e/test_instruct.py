"""A pretrained model learns to answer: from prompts and responses, on the same loop, and says what it learnt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llm_dist import metrics
from tests.e2e.commands import assert_same_end, llm_dist, losses

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

ANSWERS = {"Name a module.": "It is csv.", "Which one sorts?": "Use heapq.", "And at random?": "Take random."}


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    records = [{"instruction": prompt, "output": response} for prompt, response in ANSWERS.items()]
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Sorted?"}]
    messages = [*chat, {"role": "assistant", "content": "No."}]
    path.write_text("".join(json.dumps(record) + "\n" for record in (*records, {"messages": messages})))
    return path


def test_a_pretrained_model_learns_to_answer(tmp_path, write_run_file, finished, pairs, tokenizer):
    words = (
        "objective.name=instruct",
        f"init.from={finished}",
        f"data.train={pairs}",
        f"data.holdout={pairs}",
        f"data.tokenizer={tokenizer}",
        f"data.cache={tmp_path / 'cache'}",
        "data.sequence_tokens=64",
        "eval.every_steps=30",
        "optim.lr=1e-2",
        "optim.total_steps=60",
    )
    run_file, runs = write_run_file(tmp_path), tmp_path / "runs"
    said = llm_dist("train", run_file, *words, "run.steps=60")
    assert said.code == 0, said.err
    assert "perplexity" in said.err and "bits per byte" not in said.err
    found = losses(runs / "tiny")
    assert found[60] < 0.2 < 2 < found[1]

    for steps in (30, 60):
        assert llm_dist("train", run_file, *words, "run.name=resumed", f"run.steps={steps}").code == 0
    assert_same_end(runs / "resumed", runs / "tiny")

    answer = ("generate", runs / "tiny", "--chat", "--temperature", "0", "--json", "--prompt")
    for prompt, response in ANSWERS.items():
        assert llm_dist(*answer, prompt).json["text"] == response
    assert llm_dist(*answer, "Sorted?", "--system", "Be brief.").json["text"] == "No."
    scored = llm_dist("eval", runs / "tiny", "--data", _shards(tmp_path), "--json").json
    assert llm_dist("eval", runs / "tiny", "--data", pairs, "--json").json == scored, (
        "the file is as good as its shards"
    )
    records = [record["eval"] for record in metrics.read(runs / "tiny" / "metrics.jsonl") if "eval" in record]
    assert scored["loss_nats"] == pytest.approx(records[-1][pairs.name]["loss_nats"], rel=1e-6)
    assert scored["perplexity"] is not None and scored["bits_per_byte"] is None


def _shards(tmp_path: Path) -> Path:
    (dataset,) = (tmp_path / "cache").glob("labelled/*/train")
    return dataset


def test_what_cannot_be_answered_is_one_line(finished):
    chat = ("generate", finished, "--chat")
    assert llm_dist(*chat).mistake == "--chat answers a prompt; give one with --prompt"
    assert "add --chat" in llm_dist("generate", finished, "--prompt", "a", "--system", "b").mistake
    assert "with the form of conversations around it" in llm_dist(*chat, "--prompt", "a " * 90).mistake
