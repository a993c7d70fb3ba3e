"""A classifier and a tagger, from labelled files to scores, error reports, comparisons and predictions."""

from __future__ import annotations

import csv
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

import pytest

from llm_dist import metrics
from tests.e2e.commands import llm_dist
from tests.e2e.labelled_runs import TOPICS, classified, tagged, trained

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


class Made(NamedTuple):
    classifier: Path
    untrained: Path
    texts: Path
    tagger: Path
    sentences: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("labels")
    texts = classified(folder / "train.tsv", 40), classified(folder / "test.tsv", 15)
    sentences = tagged(folder / "train.conll", 60), tagged(folder / "test.conll", 9)
    return Made(
        trained(folder, tokenizer, texts, "classify", "classifier", 60),
        trained(folder, tokenizer, texts, "classify", "untrained", 1),
        texts[1],
        trained(folder, tokenizer, sentences, "tag", "tagger", 60),
        sentences[1],
    )


class Visible(HTMLParser):
    """Tags that load or run something, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.foreign: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.foreign += [tag] if tag in ("script", "link", "img", "iframe") else []
        self.foreign += [name for name, _ in attrs if name in ("src", "href") or name.startswith("on")]

    def handle_data(self, data):
        self.text += data


def test_a_classifier_is_scored_and_its_errors_are_shown(made, tmp_path):
    report = tmp_path / "errors"
    scores = llm_dist("eval", made.classifier, "--data", made.texts, "--report", report, "--json").json
    assert scores["examples"] == scores["scored"] == 45 and scores["accuracy"] > 0.9
    assert [each["name"] for each in scores["classes"]] == ["food", "law", "sport"]
    assert [sum(row) for row in scores["confusion"]] == [each["support"] for each in scores["classes"]]
    assert scores["f1"]["micro"] == pytest.approx(scores["accuracy"]) and scores["entities"] is None
    wrong = scores["examples"] - sum(scores["confusion"][place][place] for place in range(3))
    with (report / "errors.tsv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, dialect="excel-tab"))
    assert sum(row["verdict"] == "wrong" for row in rows) == wrong >= 3
    assert rows[0]["true"] == "food" and rows[0]["predicted"] == "law" and "test.tsv: line" in rows[0]["where"]
    sure = [float(row["probability"]) for row in rows]
    assert sure[:wrong] == sorted(sure[:wrong], reverse=True) and sure[wrong:] == sorted(sure[wrong:])
    page = Visible((report / "errors.html").read_text(encoding="utf-8"))
    assert not page.foreign and rows[0]["text"] in page.text and rows[0]["where"] in page.text
    shown = llm_dist("eval", made.classifier, "--data", made.texts).out
    assert "macro" in shown and "true / predicted" in shown and "sport" in shown


def test_shards_of_labelled_examples_score_as_their_file_does(made, tmp_path):
    by_file = llm_dist("eval", made.tagger, "--data", made.sentences, "--json").json
    (folder,) = [
        path.parent
        for path in (made.tagger.parent.parent / "cache" / "labelled").glob("*/train/dataset.json")
        if json.loads(path.read_text())["num_documents"] == by_file["examples"]
    ]
    report = tmp_path / "errors"
    by_shards = llm_dist("eval", made.tagger, "--data", folder, "--report", report, "--json").json
    for key in ("accuracy", "loss_nats", "confusion", "entities"):
        assert by_shards[key] == pytest.approx(by_file[key]) if key == "loss_nats" else by_shards[key] == by_file[key]
    assert "went to" in (report / "errors.tsv").read_text(encoding="utf-8")


def test_a_tagger_is_scored_by_entity(made, tmp_path):
    scores = llm_dist("eval", made.tagger, "--data", made.sentences, "--report", tmp_path, "--json").json
    assert scores["entities"]["support"] == 18
    assert {each["name"] for each in scores["entities"]["kinds"]} == {"LOC", "PER"}
    assert 0 < scores["entities"]["f1"]["micro"] <= 1 and scores["not_read"] == 0
    assert "entity" in llm_dist("eval", made.tagger, "--data", made.sentences).out


def test_validation_said_the_same(made):
    for run, data in ((made.classifier, made.texts), (made.tagger, made.sentences)):
        records = metrics.read(run / "metrics.jsonl")
        (validated,) = [record["eval"] for record in records if "eval" in record][-1].values()
        scores = llm_dist("eval", run, "--data", data, "--json").json
        assert scores["loss_nats"] == pytest.approx(validated["loss_nats"], rel=1e-5)
        assert scores["scored"] == validated["tokens"]
        ours = {"accuracy": scores["accuracy"], "macro_f1": scores["f1"]["macro"]}
        if scores["entities"] is not None:
            ours["f1"] = scores["entities"]["f1"]["micro"]
        assert ours == pytest.approx(validated["scores"])


def test_texts_and_words_are_labelled_in_their_order(made, tmp_path):
    texts = [text for texts in zip(*TOPICS.values(), strict=True) for text in texts]
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(texts) + "\n", encoding="utf-8")
    out = tmp_path / "labels.jsonl"
    said = llm_dist("predict", made.classifier, file, "--out", out, "--batch", 5, "--json").json
    assert said["examples"] == 12 and said["out"] == str(out)
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [line["text"] for line in lines] == texts
    assert [line["label"] for line in lines[:3]] == ["sport", "food", "law"]
    for line in lines:
        assert sum(line["probabilities"].values()) == pytest.approx(1)
        assert line["probabilities"][line["label"]] == line["probability"] == max(line["probabilities"].values())

    said = llm_dist("predict", made.tagger, "-", stdin="Anna Bell went to New York .\nJohn went to Paris .\n")
    first, second = map(json.loads, said.out.splitlines())
    assert first["words"] == ["Anna", "Bell", "went", "to", "New", "York", "."] and len(second["labels"]) == 5
    assert {"kind": "PER", "first": 0, "end": 2, "text": "Anna Bell"} in first["entities"]
    bare = tmp_path / "bare.conll"
    bare.write_text("John\nwent\nto\nParis\n.\n\nMary\nwent\n", encoding="utf-8")
    again = llm_dist("predict", made.tagger, bare).out.splitlines()
    first_again = json.loads(again[0])
    assert [first_again[key] for key in ("words", "labels", "entities")] == [
        second[key] for key in ("words", "labels", "entities")
    ]
    assert first_again["probabilities"] == pytest.approx(second["probabilities"], abs=1e-6)


def test_a_hugging_face_folder_with_labels_predicts_and_is_scored(made, tokenizer, tmp_path):
    files = made.texts.with_name("train.tsv"), made.texts
    run, exported = trained(tmp_path, tokenizer, files, "classify", "bert", 2, "bert"), tmp_path / "theirs"
    assert llm_dist("export", run, "--out", exported).code == 0
    ours, theirs = (llm_dist("predict", folder, made.texts).out.splitlines() for folder in (run, exported))
    assert len(ours) == len(theirs) == 45
    for one, other in zip(map(json.loads, ours), map(json.loads, theirs), strict=True):
        assert one["text"] == other["text"]
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-5)
    scores = [llm_dist("eval", folder, "--data", made.texts, "--json").json["loss_nats"] for folder in (run, exported)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)


def test_models_are_compared_on_the_same_examples(made, finished):
    words = ("--data", made.texts, "--samples", 500, "--json")
    found = llm_dist("compare", made.untrained, made.classifier, made.untrained, *words).json
    assert found["metric"] == "accuracy" and found["examples"] == 45
    first, better, same = found["models"]
    assert first["difference"] is None and better["difference"]["low"] > 0
    assert better["difference"]["share_above_0"] == 1
    assert [same["difference"][key] for key in ("value", "low", "high", "share_above_0")] == [0, 0, 0, 0]
    shown = llm_dist("compare", made.tagger, made.tagger, "--data", made.sentences, "--samples", 100).out
    assert "f1 on" in shown and "95 % interval" in shown
    said = llm_dist("compare", finished, finished, "--data", made.texts.with_name("train.tsv"), "--samples", 100)
    assert "unknown type of file" in said.mistake


def test_language_models_are_compared_by_bits_per_byte(finished, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Return the value.\nA list of names, which may be empty.\nRaise an error.\n", encoding="utf-8")
    first = finished / "checkpoints" / "step_00000004"
    words = ("compare", first, finished, "--data", text, "--samples", 200)
    found = llm_dist(*words, "--split", "line", "--json").json
    assert found["metric"] == "bits_per_byte" and found["examples"] == 3 and not found["more_is_better"]
    assert found["models"][1]["difference"]["value"] < 0
    assert "one document" in llm_dist(*words).mistake


def test_windows_of_text_slide(finished, shards):
    plain = llm_dist("eval", finished, "--data", shards / "holdout", "--json").json
    same = llm_dist("eval", finished, "--data", shards / "holdout", "--stride", 32, "--json").json
    finer = llm_dist("eval", finished, "--data", shards / "holdout", "--stride", 8, "--json").json
    assert same == plain and finer["tokens"] == plain["tokens"] and finer["bytes"] == plain["bytes"]
    assert finer["loss_nats"] != plain["loss_nats"]


LONG = "the team won " * 60


@pytest.mark.parametrize(
    ("command", "name", "content", "line"),
    [
        ("eval", "a.tsv", "text\tlabel\nthe team won\tchess\n", "a.tsv: line 2: label 'chess' is unknown; the model"),
        ("eval", "a.tsv", "text\tlabel\n \tsport\n", "a.tsv: line 2: the text (data.text_column) is empty"),
        ("eval", "a.jsonl", '{"text": "x"}\n', "a.jsonl: line 1: no column label"),
        (
            "eval",
            "a.tsv",
            f"text\tlabel\n{LONG}\tsport\n",
            "tokens, more than the model reads, data.sequence_tokens=64",
        ),
        ("eval", "a.conll", "a O\n", "holds words with tags, not examples to classify"),
        ("predict", "a.txt", "one\n\ntwo\n", "a.txt: line 2: the text (data.text_column) is empty"),
        ("predict", "a.jsonl", '{"words": "x"}\n', "a.jsonl: line 1: no column text"),
        ("predict", "a.txt", LONG + "\n", "with --cut"),
        ("predict", "a.pdf", "", "unknown type of file"),
        ("predict", "a.txt", "", "holds no example"),
    ],
)
def test_what_cannot_be_classified_is_one_line(made, tmp_path, command, name, content, line):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    out = tmp_path / "out.jsonl"
    words = ("--data", path) if command == "eval" else (path, "--out", out)
    assert line in llm_dist(command, made.classifier, *words).mistake
    assert not list(tmp_path.glob("*out.jsonl*"))


def test_what_is_too_long_can_be_cut(made, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(LONG + "\n", encoding="utf-8")
    assert json.loads(llm_dist("predict", made.classifier, path, "--cut").out)["text"] == LONG
    labels = json.loads(llm_dist("predict", made.tagger, path, "--cut").out)["labels"]
    assert len(labels) == len(LONG.split()) and labels[0] is not None and labels[-1] is None
    tagged_text = tmp_path / "a.conll"
    tagged_text.write_text("".join(f"{word} O\n" for word in LONG.split()), encoding="utf-8")
    scores = llm_dist("eval", made.tagger, "--data", tagged_text, "--cut", "--json").json
    assert scores["not_read"] == len(LONG.split()) - scores["scored"] > 0


def test_what_does_not_fit_the_run_is_one_line(made, finished, shards, tmp_path, other_tokenizer):
    def mistake(*words: object) -> str:
        return llm_dist(*words).mistake

    assert 'objective.name="causal", no labels' in mistake("predict", finished, made.texts)
    assert "learnt no labels" in mistake("eval", finished, "--data", shards / "holdout", "--report", tmp_path)
    assert "leave the option out" in mistake("eval", made.tagger, "--data", made.sentences, "--stride", 4)
    assert "must be from 1 to" in mistake("eval", finished, "--data", shards / "holdout", "--stride", 33)
    assert "either --data or --tasks" in mistake("eval", finished)
    assert "must read FOLDER:NAME" in mistake("eval", finished, "--tasks", "nowhere:x")
    nowhere = tmp_path / "no" / "labels.jsonl"
    assert "there is no folder" in mistake("predict", made.classifier, made.texts, "--out", nowhere)
    assert "name two runs" in mistake("compare", finished, "--data", made.texts)
    assert "learnt different things" in mistake("compare", made.tagger, finished, "--data", made.texts)
    known = "are compared by accuracy, macro_f1, loss"
    assert known in mistake("compare", made.classifier, made.untrained, "--data", made.texts, "--metric", "f1")
    assert "name a folder" in mistake("eval", made.tagger, "--data", made.sentences, "--report", made.sentences)
    assert "looks like a word and its tag" in llm_dist("predict", made.tagger, "-", stdin="EU B-ORG\n").mistake

    copy = tmp_path / "copy"
    shutil.copytree(made.classifier, copy)
    shutil.rmtree(copy / "tokenizer")
    shutil.copytree(other_tokenizer, copy / "tokenizer")
    assert "put the run's own tokenizer back" in mistake("predict", copy, made.texts)
