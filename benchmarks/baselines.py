"""What small encoders have to beat: bags of n-grams with logistic regression, and a conditional random field."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = {
    "sst2": "TF-IDF, logistic regression",
    "wnut17": "conditional random field",
    "novels": "TF-IDF of characters, logistic regression",
}


def score(name: str, train: Path, test: Path) -> float:
    """Of the baseline on the test part: accuracy, or F1 of entities."""
    if name == "wnut17":
        return _random_field(train, test)
    kind = {
        "sst2": {"ngram_range": (1, 2), "sublinear_tf": True},
        "novels": {"analyzer": "char", "ngram_range": (1, 2)},
    }
    return _regression(_texts(train), _texts(test), kind[name])


def _regression(train: list[tuple[str, str]], test: list[tuple[str, str]], kind: dict[str, Any]) -> float:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(TfidfVectorizer(**kind), LogisticRegression(C=10.0, max_iter=1000))
    model.fit(*zip(*train, strict=True))
    return float(model.score(*zip(*test, strict=True)))


def _texts(path: Path) -> list[tuple[str, str]]:
    """Text and label of each line."""
    lines = path.read_text(encoding="utf-8").splitlines()
    if path.suffix == ".jsonl":
        return [(record["text"], record["label"]) for record in map(json.loads, lines)]
    return [(text, label) for text, _, label in (line.rpartition("\t") for line in lines)]


def _random_field(train: Path, test: Path) -> float:
    from seqeval.metrics import f1_score
    from sklearn_crfsuite import CRF

    model = CRF(algorithm="lbfgs", c1=0.1, c2=0.1, max_iterations=100, all_possible_transitions=True)
    given = list(sentences(train))
    model.fit([_features(words) for words, _ in given], [tags for _, tags in given])
    words, tags = zip(*sentences(test), strict=True)
    return float(f1_score(list(tags), model.predict([_features(each) for each in words])))


def sentences(path: Path) -> Iterator[tuple[list[str], list[str]]]:
    """Words and tags of a CoNLL file."""
    for block in path.read_text(encoding="utf-8").split("\n\n"):
        pairs = [line.split("\t") for line in block.splitlines() if line.strip()]
        if pairs:
            yield [pair[0] for pair in pairs], [pair[-1] for pair in pairs]


def _features(words: list[str]) -> list[dict[str, Any]]:
    """The word, its shape and its ends, and the same of its neighbours."""
    shaped = [
        {
            "lower": word.lower(),
            "prefix": word[:3],
            "suffix": word[-3:],
            "is_title": word.istitle(),
            "is_upper": word.isupper(),
            "has_digit": any(map(str.isdigit, word)),
            "first": word[:1] if not word[:1].isalnum() else "",
        }
        for word in words
    ]
    edge = {"edge": True}
    return [
        {
            **{f"0:{key}": value for key, value in here.items()},
            **{f"-1:{key}": value for key, value in (shaped[place - 1] if place else edge).items()},
            **{f"+1:{key}": value for key, value in (shaped[place + 1] if place + 1 < len(words) else edge).items()},
        }
        for place, here in enumerate(shaped)
    ]
