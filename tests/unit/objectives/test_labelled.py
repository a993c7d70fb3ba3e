"""Classes of texts and of words: what is read, where a label is predicted, and what is counted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_dist.batch import NOT_SCORED
from llm_dist.model.init import initialize
from llm_dist.model.transformer import Transformer
from llm_dist.objectives.classify import Classify
from llm_dist.objectives.confusion import scores_of
from llm_dist.objectives.entities import Entity, count_found, entities
from llm_dist.objectives.objective import Trainee
from llm_dist.objectives.tag import Tag
from llm_dist.rows import Rows
from llm_dist.tokenizer import CLS, PAD, SEP

CLASSES, TAGS = ["bad", "good", "so-so"], ["O", "B-x", "I-x"]
FAMILIES = ("bert", "modernbert", "llama")


def run_file(run_of, name, family="bert", **more):
    return run_of(
        objective__name=name, model__family=family, data__labels=CLASSES if name == "classify" else TAGS, **more
    )


def rows(tokenizer, lengths, targets, width=32):
    """[cls] text [sep] of so many tokens in all."""
    draw = np.random.default_rng(0)
    ids = draw.integers(8, tokenizer.vocabulary_tokens, (len(lengths), width))
    ids[:, 0] = tokenizer.special_ids[CLS]
    for row, length in enumerate(lengths):
        ids[row, length - 1] = tokenizer.special_ids[SEP]
        ids[row, length:] = 0
    return Rows(ids, ids, np.array(lengths), step=2, targets=np.asarray(targets))


def built(run, tokenizer):
    model = Transformer(run.model, tokenizer.vocabulary_tokens, torch.float32, run.heads)
    initialize(model, run.model, 0.3, 1)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_s_label_is_read_off_one_position(run_of, wordpiece, family):
    run = run_file(run_of, "classify", family)
    objective = Classify(run, wordpiece, None)
    batch = objective.make_batch(rows(wordpiece, [9, 4, 13], [1, 0, 2]), 4)
    assert batch.input_ids.shape == (4, 16), "as long as the longest row, rounded up"
    assert batch.labels.tolist() == [[1], [0], [2], [NOT_SCORED]]
    assert batch.scored.tolist() == ([[8], [3], [12], [0]] if family == "llama" else [[0]] * 4)
    assert (batch.input_ids[1, 4:] == wordpiece.special_ids[PAD]).all()
    model = built(run, wordpiece)
    alone = objective.make_batch(rows(wordpiece, [9, 4, 13], [1, 0, 2]).part(1, 1, 1), 1)
    assert alone.input_ids.shape == (1, 16)
    with torch.no_grad():
        together, by_itself = Trainee(model, objective)(batch), Trainee(model, objective)(alone)
        short = model(alone.input_ids[:, :4])
        position = 3 if family == "llama" else 0
        pooled = short[:, position] if model.pooler is None else model.pooler(short[:, position])
        logits = model.class_head.logits(pooled)
    assert int(together.tokens) == 3
    torch.testing.assert_close(by_itself.nats, F.cross_entropy(logits, torch.tensor([0]))), "padding is not seen"


@pytest.mark.parametrize("family", FAMILIES)
def test_words_labels_are_read_off_their_first_tokens(run_of, wordpiece, family):
    run = run_file(run_of, "tag", family)
    objective, model = Tag(run, wordpiece, None), built(run_file(run_of, "tag", family), wordpiece)
    targets = np.full((2, 32), NOT_SCORED)
    targets[0, [1, 3]], targets[1, 1:3] = [1, 2], [0, 1]
    batch = objective.make_batch(rows(wordpiece, [6, 4], targets), 3)
    assert batch.labels.shape == batch.input_ids.shape == (3, 16) and batch.num_valid() == 4
    loss = Trainee(model, objective)(batch)
    logits = model.class_head.logits(model(batch.input_ids, None, batch.document_ids))
    expected = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="sum")
    torch.testing.assert_close(loss.nats, expected)


def test_the_second_text_is_the_second_segment(run_of, wordpiece):
    objective = Classify(run_file(run_of, "classify"), wordpiece, None)
    given = rows(wordpiece, [10], [0])
    given.inputs[0, 4] = wordpiece.special_ids[SEP]
    assert objective.make_batch(given, 1).segment_ids.tolist() == [[0] * 5 + [1] * 5 + [0] * 6]


def test_weights_of_labels_change_the_gradient_and_not_the_loss(run_of, wordpiece):
    run = run_file(run_of, "classify")
    model, given = built(run, wordpiece), rows(wordpiece, [9, 4, 13], [1, 0, 2])
    plain, weighed = Classify(run, wordpiece, None), Classify(run, wordpiece, [2.0, 1.0, 0.5])
    one, other = (Trainee(model, objective)(objective.make_batch(given, 3)) for objective in (plain, weighed))
    torch.testing.assert_close(one.nats, other.nats)
    hidden = model.pooler(
        model(plain.make_batch(given, 3).input_ids, None, plain.make_batch(given, 3).document_ids)[:, 0]
    )
    each = F.cross_entropy(model.class_head.logits(hidden), torch.tensor([1, 0, 2]), reduction="none")
    torch.testing.assert_close(other.total, (each * torch.tensor([1.0, 2.0, 0.5])).sum())


@settings(max_examples=60, deadline=None)
@given(pairs=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=30))
def test_scores_are_scikit_learn_s(run_of, wordpiece, pairs):
    metrics = pytest.importorskip("sklearn.metrics")
    true, predicted = zip(*pairs, strict=True)
    counts = np.zeros((3, 3))
    np.add.at(counts, (list(true), list(predicted)), 1)
    found = scores_of(counts)
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(true, predicted))
    assert found["macro_f1"] == pytest.approx(metrics.f1_score(true, predicted, average="macro"))


@settings(max_examples=300, deadline=None)
@given(
    tags=st.lists(st.sampled_from(["O", "B-a", "I-a", "E-a", "S-a", "B-b", "I-b", "E-b", "S-b"]), max_size=12),
)
def test_entities_are_seqeval_s(tags):
    labeling = pytest.importorskip("seqeval.metrics.sequence_labeling")
    expected = [Entity(kind, first, last + 1) for kind, first, last in labeling.get_entities(tags)]
    assert entities(tags) == expected


def test_found_entities_are_counted():
    true, predicted = ["B-x", "I-x", "O", "B-y", "O"], ["B-x", "I-x", "O", "O", "B-y"]
    assert count_found([(true, predicted), (["O"], ["B-x"])]) == (1, 3, 2)


def test_validation_counts_entities_and_labels(run_of, wordpiece):
    run = run_file(run_of, "tag")
    objective, model = Tag(run, wordpiece, None), built(run, wordpiece)
    targets = np.full((40, 32), NOT_SCORED)
    targets[:, 1:5] = np.random.default_rng(1).integers(0, 3, (40, 4))
    batch = objective.make_batch(rows(wordpiece, [8] * 40, targets), 48)
    with torch.no_grad():
        loss = Trainee(model, objective)(batch)
    counts = objective.count(batch, loss)
    assert counts.shape == (objective.num_counts,) and counts[:9].sum() == 160
    names = np.array(TAGS)
    sentences = [(names[batch.labels[row, 1:5]], names[loss.predicted[row, 1:5]]) for row in range(40)]
    found = count_found([(list(true), list(predicted)) for true, predicted in sentences])
    assert counts[9:].tolist() == list(found)
    assert objective.scores(counts)["f1"] == pytest.approx(2 * found.right / (found.found + found.there))
