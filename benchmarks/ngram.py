"""A small model against an interpolated Kneser-Ney 5-gram over the same token ids.

Trains on War and Peace and the validation part of WikiText-2, scores the test part of WikiText-2 once per token, both
with the same tokenizer and the same shards. Needs the corpora that LLM_DIST_DATA names.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.kneser_ney import KneserNey
from llm_dist.data.index import ShardSet, open_shards

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "warandpeace.toml"
VOCABULARY = 2048


def measure(overrides: list[str]) -> dict[str, Any]:
    """Train, score and compare; `overrides` go to the run file."""
    corpora = Path(os.environ.get("LLM_DIST_DATA", ROOT.parent / "shared" / "data"))
    folder = Path(tempfile.mkdtemp(prefix="ngram-"))
    train, test = make_shards(corpora, folder)
    result = {"vocabulary_tokens": VOCABULARY, "train_tokens": train.num_tokens, "test_tokens": test.num_tokens}
    result["kneser_ney"] = score_ngram(train, test)
    result["model"] = train_model(folder, overrides)
    result["model_wins"] = result["model"]["bits_per_byte"] < result["kneser_ney"]["bits_per_byte"]
    return result


def make_shards(corpora: Path, folder: Path) -> tuple[ShardSet, ShardSet]:
    """Tokenizer from the training text; shards of both texts, whole."""
    texts = [str(corpora / "warandpeace" / "warandpeace.txt.gz"), str(corpora / "wikitext2" / "valid.txt")]
    _run("llm-dist", "tokenizer", "train", *texts, "--vocab-size", str(VOCABULARY), "--out", str(folder / "tokenizer"))
    opened = []
    for name, inputs in (("train", texts), ("test", [str(corpora / "wikitext2" / "test.txt")])):
        made = folder / "made" / name
        _run(
            *("llm-dist", "tokenize", *inputs, "--tokenizer", str(folder / "tokenizer")),
            *("--out", str(made), "--holdout", "0"),
        )
        (folder / "shards").mkdir(exist_ok=True)
        (made / "train").rename(folder / "shards" / name)
        opened.append(open_shards(folder / "shards" / name))
    return opened[0], opened[1]


def score_ngram(train: ShardSet, test: ShardSet) -> dict[str, float]:
    """Bits per byte of the 5-gram on exactly the targets that the model is scored on."""
    began = time.perf_counter()
    model = KneserNey.fit(train.tokens(0, train.num_tokens), order=5, vocabulary=train.vocabulary_tokens)
    closed = np.append(test.tokens(0, test.num_tokens), 0)  # the separator that ends the last document
    nats = float(model.nats_per_token(closed)[1:].sum())
    return {
        "loss_nats": nats / test.num_tokens,
        "bits_per_byte": nats / math.log(2) / test.num_bytes,
        "seconds": round(time.perf_counter() - began, 1),
    }


def train_model(folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Train configs/warandpeace.toml on two ranks and score the test text once per token."""
    began = time.perf_counter()
    shards, runs = folder / "shards", folder / "runs"
    keys = [f"data.train={shards}/train", f"data.holdout={shards}/test", f"run.dir={runs}", *overrides]
    _run("llm-launch", "local", str(CONFIG), "--ranks", "2", *keys)
    seconds = time.perf_counter() - began
    scored = json.loads(_run("llm-dist", "eval", str(runs / "warandpeace"), "--data", str(shards / "test"), "--json"))
    return {**scored, "training_minutes": round(seconds / 60, 1), "run": str(runs / "warandpeace")}


def _run(program: str, *words: str) -> str:
    command = [str(Path(sys.executable).parent / program), *words]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip().splitlines()[-1]
