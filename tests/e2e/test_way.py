"""The whole way through the commands: text, tokenizer, shards, training, perplexity, a sample, a Hugging Face model."""

from __future__ import annotations

import json
import math
import resource
import subprocess
import sys

import pytest
import torch

from llm_dist import metrics
from tests.e2e.commands import llm_dist, losses, steps_saved

pytestmark = pytest.mark.e2e

COMMANDS = [
    ("llm_dist", words)
    for words in (
        ["tokenizer", "train"],
        ["tokenizer", "import"],
        ["tokenize"],
        ["data", "inspect"],
        ["data", "verify"],
        ["data", "order"],
        ["train"],
        ["eval"],
        ["generate"],
        ["attention"],
        ["export"],
        ["import"],
        ["curve"],
    )
] + [("launcher.cli", words) for words in (["local"], ["status"], ["plan"])]


def test_shards_are_shown_and_whole(shards):
    train = llm_dist("data", "inspect", shards / "train", "--json").json
    holdout = llm_dist("data", "inspect", shards / "holdout", "--json").json
    assert train["num_tokens"] > 10 * holdout["num_tokens"] > 0
    assert llm_dist("data", "verify", shards / "train", "--json").json["damaged"] == []


def test_order_depends_on_neither_ranks_nor_how_the_run_is_named(finished, shards):
    def order(source, *words):
        return llm_dist("data", "order", source, "--steps", "2:6", *words, "--json").json["hash"]

    run_file = finished.parent.parent / "run.toml"
    whole = order(run_file, "--ranks", "1")
    assert whole == order(run_file, "--ranks", "3") == order(finished, "--ranks", "3")
    assert whole == order(run_file, "batch.sequences_per_micro_batch=2", "data.workers=0")
    assert whole != order(run_file, "run.seed=4")


def test_run_folder_holds_what_is_promised(finished):
    config = json.loads((finished / "config.json").read_text())
    assert config["optim"]["total_steps"] == 8
    source = json.loads((finished / "source.json").read_text())
    assert {"commit", "diff", "versions", "host"} <= source.keys()
    assert source["versions"]["torch"] == torch.__version__
    assert list((finished / "tensorboard").glob("events.out.*"))
    assert (finished / "metrics.csv").read_text().startswith("step,name,value\n1,loss_nats,")
    assert steps_saved(finished) == [4, 8]
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "loss_nats" in line]
    assert [line["step"] for line in logged] == list(range(1, 9))
    wanted = {"step", "attempt", "loss_nats", "lr", "grad_norm", "tokens", "tokens_per_second", "mfu", "mfu_convention"}
    for line in logged:
        assert wanted | {"memory_bytes", "seconds"} <= line.keys()
        assert {"data", "step", "other", "all"} <= line["seconds"].keys()
    assert logged[-1]["tokens"] == 8 * 256
    assert logged[-1]["loss_nats"] < logged[0]["loss_nats"] - 0.1


def test_eval_scores_every_token_once_and_agrees_with_training(finished, shards):
    scored = llm_dist("eval", finished, "--data", shards / "holdout", "--json").json
    size = json.loads((shards / "holdout" / "dataset.json").read_text())
    assert (scored["tokens"], scored["bytes"]) == (size["num_tokens"], size["num_bytes"])
    assert scored["perplexity"] == pytest.approx(math.exp(scored["loss_nats"]))
    bits = scored["loss_nats"] * scored["tokens"] / math.log(2) / scored["bytes"]
    assert scored["bits_per_byte"] == pytest.approx(bits)
    in_training = [record["eval"]["holdout"] for record in metrics.read(finished / "metrics.jsonl") if "eval" in record]
    assert len(in_training) == 2
    assert scored.pop("scores") == in_training[-1].pop("scores") == {}
    assert scored == pytest.approx(in_training[-1], rel=1e-6)
    earlier = llm_dist("eval", finished, "--data", shards / "holdout", "--step", "4", "--json").json
    assert earlier["loss_nats"] == pytest.approx(in_training[0]["loss_nats"], rel=1e-6)
    best = llm_dist("eval", finished, "--data", shards / "holdout", "--best", "--json").json
    assert best == {**scored, "scores": {}}


def test_generate_is_reproducible_by_seed(finished):
    def text(*words):
        return llm_dist("generate", finished, "--prompt", "Return the", "--max-tokens", "12", *words, "--json").json

    first, again, other = text("--seed", "1"), text("--seed", "1"), text("--seed", "2")
    assert first["text"] == again["text"] != other["text"]
    assert 0 < first["tokens"] <= 12
    shown = llm_dist("generate", finished, "--prompt", "Return the", "--max-tokens", "12", "--seed", "1")
    assert shown.out == f"Return the{first['text']}\n"


def test_transformers_loads_the_export_and_its_loss_is_ours(finished, tmp_path, corpus, tokenizer):
    transformers = pytest.importorskip("transformers")
    exported = llm_dist("export", finished, "--out", tmp_path / "hf", "--json").json
    assert exported["step"] == 8
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = json.loads(corpus.read_text().splitlines()[3])["text"]
    one = tmp_path / "one.jsonl"
    one.write_text(json.dumps({"text": text}) + "\n")
    shards = tmp_path / "one"
    words = ("--tokenizer", tokenizer, "--out", shards, "--holdout", "0", "--workers", "1")
    assert llm_dist("tokenize", one, *words).code == 0
    scored = llm_dist("eval", finished, "--data", shards / "train", "--json").json
    separator = theirs.convert_tokens_to_ids("<|endoftext|>")
    ids = [separator, *theirs(text, add_special_tokens=False)["input_ids"], separator]
    nats, width = 0.0, 32
    with torch.no_grad():
        for first in range(0, len(ids) - 1, width):
            window = torch.tensor([ids[first : first + width + 1]])
            logits = model(window[:, :-1]).logits
            nats += float(torch.nn.functional.cross_entropy(logits[0], window[0, 1:], reduction="sum"))
    assert scored["tokens"] == len(ids) - 1
    assert scored["loss_nats"] == pytest.approx(nats / scored["tokens"], rel=1e-5)


def test_a_moved_run_goes_on_where_it_lies(run_file, run_folder, tmp_path):
    assert llm_dist("train", run_file, "run.steps=2").code == 0
    moved = tmp_path / "elsewhere" / "renamed"
    moved.parent.mkdir()
    run_folder.rename(moved)
    assert llm_dist("train", moved, "run.steps=4").code == 0
    assert sorted(losses(moved)) == [1, 2, 3, 4]
    assert not run_folder.exists()


def test_weights_of_another_run_can_start_one(finished, run_file, run_folder):
    said = llm_dist("train", run_file, f"init.from={finished}", "run.steps=1", "optim.warmup_steps=0")
    assert said.code == 0, said.err
    assert losses(run_folder)[1] < losses(finished)[1] - 0.1
    refused = llm_dist("train", run_file, f"init.from={finished}", "run.name=wide", "model.d_ff=128")
    assert "init.from=" in refused.mistake
    assert "has shape" in refused.mistake


@pytest.mark.parametrize(
    ("module", "words"), COMMANDS, ids=lambda value: " ".join(value) if type(value) is list else ""
)
def test_help_shows_an_example_and_takes_no_time(module, words):
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-m", module, *words, "--help"], capture_output=True, text=True, check=True
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        if seconds[-1] < 0.5:
            break
    assert "Examples:" in done.stdout
    assert " ".join(words) in done.stdout.split("Examples:")[1]
    assert min(seconds) < 0.8
