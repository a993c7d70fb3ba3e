"""Encoders pretrained on the text at hand and fine-tuned, beside the same encoders from scratch and a classic baseline.

sst2     sentiment of sentences; TF-IDF and logistic regression
wnut17   entities in tweets; a conditional random field
novels   which of two Chinese novels a paragraph is from; TF-IDF of characters and logistic regression

Whatever is chosen is chosen on the dev part; the test part is run once per seed. Needs the corpora that LLM_DIST_DATA
names, and scikit-learn, seqeval and sklearn-crfsuite.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import baselines

ROOT = Path(__file__).parents[1]
SEEDS = (1, 2, 3)
TITLES = {"hongloumeng": "Dream of the Red Chamber", "sanguoyanyi": "Romance of the Three Kingdoms"}
LEAST_CHARACTERS = 20


@dataclass(frozen=True)
class Task:
    """Files of a task, and how its run files differ from configs/encoder-small.toml and configs/finetune.toml."""

    train: Path
    dev: Path
    test: Path
    objective: str
    score: str
    texts: Sequence[Path]
    """What the encoder is pretrained on, a document a line."""
    tokenizer: tuple[str, ...]
    pretraining: tuple[str, ...] = ()
    finetuning: tuple[str, ...] = ()


def measure(name: str, overrides: Sequence[str]) -> list[dict[str, Any]]:
    """One row per way of learning: its score on the test part, by seed and in the mean."""
    corpora = Path(os.environ.get("LLM_DIST_DATA", ROOT.parent / "shared" / "data"))
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-"))
    task = {"sst2": sst2, "wnut17": wnut17, "novels": novels}[name](corpora, folder)
    print(f"  in {folder}", flush=True)
    prepare(task, folder)
    rows = [{"way": baselines.NAMES[name], **_by_seed([baselines.score(name, task.train, task.test)] * 1, 0.0)}]
    ways: dict[str, list[float]] = {"from scratch": [], "pretrained": []}
    minutes = dict.fromkeys(ways, 0.0)
    for seed in SEEDS:
        began = time.perf_counter()
        pretrain(task, folder, seed, overrides)
        minutes["pretrained"] += (time.perf_counter() - began) / 60
        for way, scores in ways.items():
            began = time.perf_counter()
            scores.append(finetune(task, folder, seed, way))
            minutes[way] += (time.perf_counter() - began) / 60
            print(f"  seed {seed} {way}: {scores[-1]:.4f}", flush=True)
    rows += [{"way": way, **_by_seed(scores, minutes[way] / len(SEEDS))} for way, scores in ways.items()]
    _compare(task, folder)
    return rows


def _by_seed(scores: list[float], minutes: float) -> dict[str, Any]:
    return {
        "score": float(np.mean(scores)),
        "seeds": " ".join(f"{score:.4f}" for score in scores),
        "minutes_per_seed": round(minutes, 1),
    }


def prepare(task: Task, folder: Path) -> None:
    """A tokenizer of the task's texts, and shards of them."""
    texts = [str(text) for text in task.texts]
    _run("llm-dist", "tokenizer", "train", *texts, "--split", "line", *task.tokenizer, "--out", f"{folder}/tokenizer")
    _run(
        *("llm-dist", "tokenize", *texts, "--split", "line", "--tokenizer", f"{folder}/tokenizer"),
        *("--out", f"{folder}/shards", "--holdout", "0.02"),
    )


def pretrain(task: Task, folder: Path, seed: int, overrides: Sequence[str]) -> None:
    """A masked language model on two ranks."""
    words = (f"run.dir={folder}/runs", f"run.name=encoder-{seed}", f"run.seed={seed}")
    data = (f"data.train={folder}/shards/train", f"data.holdout={folder}/shards/holdout")
    _run(
        "llm-launch",
        "local",
        f"{ROOT}/configs/encoder-small.toml",
        "--ranks",
        "2",
        *words,
        *data,
        *task.pretraining,
        *overrides,
    )


def finetune(task: Task, folder: Path, seed: int, way: str) -> float:
    """Train on labels, keep what is best on dev, and score the test part once."""
    name = f"{way.replace(' ', '-')}-{seed}"
    words = (f"run.dir={folder}/runs", f"run.name={name}", f"run.seed={seed}", f"objective.name={task.objective}")
    data = (f"data.train={task.train}", f"data.holdout={task.dev}", f"data.tokenizer={folder}/tokenizer")
    start = (f"init.from={folder}/runs/encoder-{seed}",) if way == "pretrained" else ()
    more = (f"data.cache={folder}/cache", f"eval.best={task.score}", *start, *task.finetuning)
    _run("llm-launch", "local", f"{ROOT}/configs/finetune.toml", "--ranks", "2", *words, *data, *more)
    return scored(f"{folder}/runs/{name}", task)


def scored(run: str, task: Task) -> float:
    """Of the test part: accuracy of labels, or F1 of entities."""
    said = json.loads(_run("llm-dist", "eval", run, "--best", "--data", str(task.test), "--json"))
    return float(said["accuracy"] if task.score == "accuracy" else said["entities"]["f1"]["micro"])


def _compare(task: Task, folder: Path) -> None:
    """Pretrained against from scratch, by seed: paired bootstrap over the test part."""
    for seed in SEEDS:
        runs = (f"{folder}/runs/from-scratch-{seed}", f"{folder}/runs/pretrained-{seed}")
        _run("llm-dist", "compare", *runs, "--best", "--data", str(task.test), "--metric", task.score, shows=True)


def sst2(corpora: Path, folder: Path) -> Task:
    """Sentences of film reviews; pretrained on those of the training part, on encyclopedia articles and on a novel."""
    reviews = folder / "reviews.txt"
    lines = (corpora / "sst2" / "train.tsv").read_text(encoding="utf-8").splitlines()
    reviews.write_text("\n".join(line.rpartition("\t")[0] for line in lines) + "\n", encoding="utf-8")
    texts = [reviews, *_lines(corpora, folder)]
    parts = (corpora / "sst2" / f"{part}.tsv" for part in ("train", "dev", "test"))
    return Task(*parts, "classify", "accuracy", texts, ("--type", "wordpiece", "--lowercase", "--vocab-size", "8000"))


def wnut17(corpora: Path, folder: Path) -> Task:
    """Tweets; pretrained on those of the training part, on encyclopedia articles and on a novel."""
    tweets = folder / "tweets.txt"
    sentences = baselines.sentences(corpora / "ner_wnut17" / "train.conll")
    tweets.write_text("\n".join(" ".join(words) for words, _ in sentences) + "\n", encoding="utf-8")
    texts = [tweets, *_lines(corpora, folder)]
    parts = (corpora / "ner_wnut17" / f"{part}.conll" for part in ("train", "dev", "test"))
    tuning = ("data.sequence_tokens=128", "batch.tokens_per_step=4096", "data.too_long=cut")
    return Task(*parts, "tag", "f1", texts, ("--type", "wordpiece", "--vocab-size", "8000"), finetuning=tuning)


def novels(corpora: Path, folder: Path) -> Task:
    """Paragraphs of at least LEAST_CHARACTERS; every tenth is of dev, every tenth of the test part."""
    parts: dict[str, list[str]] = {"train": [], "dev": [], "test": []}
    for name in TITLES:
        with gzip.open(corpora / "zh_classics" / f"{name}.txt.gz", "rt", encoding="utf-8") as file:
            paragraphs = [line.strip() for line in file if len(line.strip()) >= LEAST_CHARACTERS]
        for number, paragraph in enumerate(paragraphs):
            part = {0: "test", 1: "dev"}.get(number % 10, "train")
            parts[part].append(json.dumps({"text": paragraph, "label": name}, ensure_ascii=False))
    for part, lines in parts.items():
        (folder / f"{part}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    text = folder / "novels.txt"
    text.write_text("\n".join(json.loads(line)["text"] for line in parts["train"]) + "\n", encoding="utf-8")
    files = (folder / f"{part}.jsonl" for part in parts)
    tuning = ("data.too_long=cut", "run.steps=150", "eval.every_steps=50")
    return Task(
        *files, "classify", "accuracy", [text], ("--type", "bpe", "--vocab-size", "8000"), ("run.steps=400",), tuning
    )


def _lines(corpora: Path, folder: Path) -> list[Path]:
    """Articles and a novel with a paragraph a line."""
    with gzip.open(corpora / "warandpeace" / "warandpeace.txt.gz", "rt", encoding="utf-8") as file:
        novel = re.split(r"\n\s*\n", file.read())
    articles = (corpora / "wikitext2" / "valid.txt").read_text(encoding="utf-8").splitlines()
    made = []
    for name, paragraphs in (("novel", novel), ("articles", articles)):
        lines = [" ".join(paragraph.split()) for paragraph in paragraphs]
        made.append(folder / f"{name}.txt")
        made[-1].write_text("\n".join(line for line in lines if len(line) > LEAST_CHARACTERS) + "\n", encoding="utf-8")
    return made


def _run(program: str, *words: str, shows: bool = False) -> str:
    command = [str(Path(sys.executable).parent / program), *words]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    if shows:
        print(said, flush=True)
    return said.strip().splitlines()[-1] if said.strip() else ""
