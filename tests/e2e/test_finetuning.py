"""An encoder learns from labels what it did not know: on the same loop, from the weights of a run before it."""

from __future__ import annotations

import json
import random

import pytest

from llm_dist import config, metrics
from tests.e2e.commands import LAUNCH, TRAIN, assert_same_end, llm_dist, losses, run

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

ENCODER = ("model.family=bert", "model.dropout=0.1", "optim.total_steps=8")
WORDS = ("module", "returns", "string", "object", "function", "value", "list", "number", "file", "called")


def train(*command: object) -> str:
    said = run(command)
    assert said.code == 0, said.err
    return said.err


def texts(path, num, kind="topic", seed=0):
    """Sentences whose label is a word that only some of them hold, or whose tags mark it."""
    draw, lines = random.Random(seed), []
    for _ in range(num):
        words = draw.choices(WORDS, k=draw.randrange(3, 12))
        place, is_positive = draw.randrange(len(words)), draw.random() < 0.5
        words[place] = "exception" if is_positive else "iterator"
        if kind == "topic":
            lines.append(f"{' '.join(words)}\t{'error' if is_positive else 'loop'}\n")
        else:
            tags = ["O"] * len(words)
            tags[place] = "B-error" if is_positive else "O"
            lines += [*(f"{word}\t{tag}\n" for word, tag in zip(words, tags, strict=True)), "\n"]
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, write_run_file):
    """Run file of a small masked language model that was trained for a few steps, and its folder."""
    folder = tmp_path_factory.mktemp("pretrained")
    run_file = write_run_file(folder)
    train(*TRAIN, run_file, *ENCODER, "objective.name=masked")
    return run_file, folder / "runs" / "tiny"


def finetune(pretrained, tmp_path, task, suffix, *words):
    run_file, source = pretrained
    train_file, holdout = (tmp_path / f"{part}.{suffix}" for part in ("train", "dev"))
    kind = "topic" if task == "classify" else "tags"
    texts(train_file, 400, kind), texts(holdout, 60, kind, seed=1)
    data = (f"data.train={train_file}", f"data.holdout={holdout}", f"data.cache={tmp_path / 'cache'}")
    places = (f"run.dir={tmp_path / 'runs'}", f"init.from={source}", *data)
    return (run_file, *ENCODER[:2], f"objective.name={task}", *places, *words)


def test_a_classifier_learns_from_a_pretrained_encoder_and_resumes_bit_for_bit(pretrained, tmp_path):
    size = ("batch.tokens_per_step=1024", "batch.sequences_per_micro_batch=32", "optim.lr=5e-3")
    words = (*size, "optim.total_steps=40", "eval.every_steps=20", "eval.best=accuracy", "checkpoint.every_steps=10")
    command = (*TRAIN, *finetune(pretrained, tmp_path, "classify", "tsv", *words))
    said = train(*command, "run.name=whole", "run.steps=40")
    assert "class_head.output.bias" in said and "start at random" in said and "macro f1" in said
    runs = tmp_path / "runs"
    for steps in (17, 40):
        train(*command, "run.name=resumed", f"run.steps={steps}", "eval.every_steps=20")
    assert_same_end(runs / "resumed", runs / "whole")
    assert config.load(runs / "whole").data.labels == ["error", "loop"]
    [*_, last] = [record for record in metrics.read(runs / "whole" / "metrics.jsonl") if "eval" in record]
    assert last["eval"]["dev.tsv"]["scores"]["accuracy"] > 0.9


def test_other_engines_and_ranks_fine_tune_alike_and_frozen_weights_stay(pretrained, tmp_path):
    words = ("model.dropout=0.0", "optim.total_steps=6", "run.steps=6", "optim.layer_lr_decay=0.7")
    frozen = f"optim.frozen={json.dumps(['embedding.*', 'blocks.0.*'])}"
    command = finetune(pretrained, tmp_path, "tag", "conll", *words, frozen)
    train(*TRAIN, *command, "run.name=plain")
    train(*LAUNCH, "--ranks", 2, *command, "run.name=fsdp", "engine.name=fsdp")
    runs = tmp_path / "runs"
    assert losses(runs / "fsdp") == pytest.approx(losses(runs / "plain"), rel=1e-5)
    for name in ("plain", "fsdp"):
        before, after = parameters(pretrained[1]), parameters(runs / name)
        stayed = {key for key in before.keys() & after.keys() if (before[key] == after[key]).all()}
        assert {key for key in stayed if key.startswith(("embedding.", "blocks.0."))} == {
            key for key in after if key.startswith(("embedding.", "blocks.0."))
        }
        assert not any(key.startswith("blocks.1.") and key.endswith("query.weight") for key in stayed)


def parameters(run_folder):
    from llm_dist.checkpoint import layout, store

    return store.read_parameters(layout.find(run_folder).folder)


@pytest.mark.parametrize(
    ("content", "words", "line"),
    [
        ("module\terror\n\t\n", (), "train.tsv: line 2"),
        ("text\tlabel\nmodule\terror\n", ("data.label_column=stars",), "data.label_column=stars"),
        ("module\terror\n", ('data.labels=["loop"]',), "label 'error' is unknown; the model knows loop"),
        (f"{'module ' * 100}\terror\n", (), 'set data.too_long="cut"'),
        (
            "module\terror\n",
            ("objective.class_weights=[1.0, 2.0]",),
            "class_weights has 2 factors for 1 labels",
        ),
        ("module\terror\n", ("engine.name=zero", 'optim.frozen=["embedding.*"]'), "optim.frozen needs engine.name"),
        ("module\terror\n", ('optim.frozen=["embeddings.*"]',), "no parameter fits 'embeddings.*'"),
        ("module\terror\n", ("init.from=nowhere",), "data.tokenizer"),
    ],
)
def test_what_cannot_be_learnt_from_is_one_line(pretrained, tmp_path, content, words, line):
    command = finetune(pretrained, tmp_path, "classify", "tsv", "data.holdout=[]", *words)
    (tmp_path / "train.tsv").write_text(content)
    assert line in llm_dist("train", *command).mistake
