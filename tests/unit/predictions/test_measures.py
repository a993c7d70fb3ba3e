"""Validation counts what scikit-learn and seqeval count afterwards; what is wrong is found, sorted and escaped."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_dist.data.examples import Example
from llm_dist.objectives.confusion import confusion, scores_of
from llm_dist.objectives.entities import count_found
from llm_dist.predictions.cases import cases, write_table
from llm_dist.predictions.lines import line_of
from llm_dist.predictions.measures import measure
from llm_dist.predictions.page import page_of
from llm_dist.predictions.predict import Prediction

TAGS = ["O", "B-a", "I-a", "E-a", "S-a", "B-b", "I-b"]


def said(true, predicted, names, sure=0.7, texts=None, where="f.tsv: line 1", is_tagged=False):
    """A prediction of these ids, each with probability `sure`."""
    probabilities = np.full((len(true), len(names)), (1 - sure) / max(1, len(names) - 1))
    probabilities[np.arange(len(true)), predicted] = sure
    texts = texts or tuple(f"w{place}" for place in range(len(true)))
    labels = tuple(names[id_] for id_ in true)
    return Prediction(Example(texts, labels, where), np.array(true), np.log(probabilities).astype(np.float32))


sentences = st.lists(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=8), min_size=1, max_size=6
)


@settings(max_examples=80, deadline=None)
@given(sentences)
def test_validation_agrees_with_scikit_learn_and_seqeval(pairs):
    predictions = [said(*map(list, zip(*sentence, strict=True)), TAGS) for sentence in pairs]
    scores = measure(predictions, TAGS, are_tags=True)
    true, predicted = (
        torch.tensor(np.concatenate([getattr(each, name) for each in predictions])) for name in ("true", "predicted")
    )
    counts = confusion(true, predicted, len(TAGS)).view(len(TAGS), -1).numpy()
    assert scores.confusion == counts.tolist()
    expected = scores_of(counts)
    assert scores.accuracy == pytest.approx(expected["accuracy"]) and scores.f1.macro == pytest.approx(
        expected["macro_f1"]
    )
    assert [each.support for each in scores.classes] == counts.sum(axis=1).tolist()
    assert scores.f1.micro == scores.precision.micro == pytest.approx(scores.accuracy)
    found = count_found([([TAGS[i] for i in each.true], [TAGS[i] for i in each.predicted]) for each in predictions])
    entities = scores.entities
    assert entities.support == found.there == sum(kind.support for kind in entities.kinds)
    f1 = 2 * found.right / (found.found + found.there) if found.found + found.there else 0
    assert entities.f1.micro == pytest.approx(f1)


def test_the_loss_is_the_mean_over_labels():
    scores = measure([said([0], [0], ["a", "b"]), said([0], [1], ["a", "b"])], ["a", "b"], are_tags=False)
    assert scores.loss_nats == pytest.approx(-(np.log(0.7) + np.log(0.3)) / 2) and scores.entities is None
    assert (scores.examples, scores.scored, scores.not_read) == (2, 2, 0)


def test_the_worst_come_first_and_html_is_escaped(tmp_path):
    names = ["<b>", "good"]
    predictions = [
        said([1], [1], names, 0.6, ("fine\tor not",), "f: line 1"),
        said([1], [0], names, 0.8, ("<script>alert(1)</script>", "second\ntext"), "f: line 2"),
        said([0], [1], names, 0.9, ("sure & wrong",), "f: line 3"),
        said([0], [0], names, 0.99, ("sure",), "f: line 4"),
    ]
    chosen = cases(predictions, names, most_uncertain=1)
    assert [(case.verdict, case.where[-1]) for case in chosen] == [("wrong", "3"), ("wrong", "2"), ("uncertain", "1")]
    write_table(tmp_path / "errors.tsv", chosen)
    with (tmp_path / "errors.tsv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, dialect="excel-tab"))
    assert [row["text"] for row in rows] == ["sure & wrong", "<script>alert(1)</script>\nsecond\ntext", "fine\tor not"]
    assert float(rows[0]["true_probability"]) == pytest.approx(0.1)
    page = page_of("<title>", measure(predictions, names, are_tags=False), chosen, most_wrong=1)
    assert "<script" not in page and "<b>" not in page and "the surest 1 of 2" in page
    assert "sure &amp; wrong" in page and "alert" not in page


def test_wrong_words_are_marked(tmp_path):
    prediction = said([1, 2, 0], [1, 0, 0], TAGS, texts=("New", "York", "is"))
    chosen = cases([prediction], TAGS, 1)
    write_table(tmp_path / "errors.tsv", chosen)
    assert "New York[I-a > O] is" in (tmp_path / "errors.tsv").read_text(encoding="utf-8")
    page = page_of("t", measure([prediction], TAGS, are_tags=True), chosen, 5)
    assert '<span class="bad">York <small>I-a &rarr; O 0.70</small></span>' in page
    assert '<span class="tag">New <small>B-a</small></span>' in page


def test_lines_say_what_was_found():
    of_words = line_of(said([0, 0], [1, 2], TAGS, texts=("New", "York", "unread")), "tag", TAGS)
    assert of_words["labels"] == ["B-a", "I-a", None] and of_words["probabilities"][2] is None
    assert of_words["entities"] == [{"kind": "a", "first": 0, "end": 2, "text": "New York"}]
    of_pair = line_of(said([0], [1], ["no", "yes"], texts=("one", "two")), "classify", ["no", "yes"])
    assert (of_pair["text"], of_pair["text_pair"], of_pair["label"]) == ("one", "two", "yes")
    assert of_pair["probabilities"]["yes"] == pytest.approx(of_pair["probability"]) == pytest.approx(0.7)


def test_what_is_not_installed_is_named(monkeypatch):
    from llm_dist.errors import UserError

    monkeypatch.setitem(__import__("sys").modules, "sklearn.metrics", None)
    with pytest.raises(UserError, match=r"scikit-learn is not installed.*pip install 'llm_dist\[eval\]'"):
        measure([said([0], [0], ["a"])], ["a"], are_tags=False)
