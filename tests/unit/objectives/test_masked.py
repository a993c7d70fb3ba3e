"""Rows become [cls] text [sep] with hidden tokens, and the loss is of those alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llm_dist.batch import NOT_SCORED
from llm_dist.model.init import initialize
from llm_dist.model.transformer import Transformer
from llm_dist.objectives.masked import Masked
from llm_dist.objectives.objective import Trainee
from llm_dist.rows import Rows
from llm_dist.tokenizer import CLS, MASK, PAD, SEP

T, TEXT = 32, 30


def rows(tokenizer, count=3, **more):
    tokens = np.random.default_rng(2).integers(8, tokenizer.vocabulary_tokens, (count, TEXT + 1))
    return Rows(tokens[:, :-1], tokens[:, 1:], **{"step": 5, **more})


def unhidden(batch):
    """Input ids with the labels put back."""
    ids = batch.input_ids.clone()
    for row in range(len(ids)):
        scored = batch.labels[row] != NOT_SCORED
        ids[row, batch.scored[row, scored]] = batch.labels[row, scored]
    return ids


def test_a_row_is_framed_and_hidden(run_of, wordpiece):
    given = rows(wordpiece)
    batch = Masked(run_of(), wordpiece).make_batch(given, 4)
    special = wordpiece.special_ids
    assert batch.input_ids.shape == (4, T) and batch.labels.shape == batch.scored.shape == (4, 4)
    assert (batch.input_ids[:3, 0] == special[CLS]).all() and (batch.input_ids[:3, -1] == special[SEP]).all()
    assert unhidden(batch)[:3, 1:-1].tolist() == given.inputs.tolist()
    assert (batch.input_ids == special[MASK]).any() and batch.num_valid() == 3 * round(0.15 * TEXT)
    assert (batch.labels[3] == NOT_SCORED).all() and (batch.input_ids[3] == special[PAD]).all()
    assert batch.document_ids is None and batch.positions is None


def test_padding_lies_behind_the_frame_and_is_not_seen(run_of, wordpiece):
    batch = Masked(run_of(), wordpiece).make_batch(rows(wordpiece, num_scored=np.array([30, 7, 0])), 3)
    special = wordpiece.special_ids
    assert batch.input_ids[1, 8] == special[SEP] and (batch.input_ids[1, 9:] == special[PAD]).all()
    assert batch.input_ids[2, :2].tolist() == [special[CLS], special[SEP]]
    documents = batch.document_ids
    assert (documents[1, :9] == documents[1, 0]).all() and (documents[1, 9:] != documents[1, 0]).all()
    assert [int((row != NOT_SCORED).sum()) for row in batch.labels] == [4, 1, 0]


def test_documents_keep_to_themselves_with_their_part_of_the_frame(run_of, wordpiece):
    ids = np.repeat([[0] * 10 + [1] * 20], 3, axis=0)
    batch = Masked(run_of(), wordpiece).make_batch(rows(wordpiece, document_ids=ids), 3)
    assert batch.document_ids[0].tolist() == [0] * 11 + [1] * 21
    assert batch.positions[0].tolist() == [*range(11), *range(21)]


def test_held_out_rows_are_hidden_alike_each_time_and_differ(run_of, wordpiece):
    objective = Masked(run_of(), wordpiece)
    held_out = rows(wordpiece)._replace(step=-1, first_row=4, row_stride=2)
    first, again = objective.make_batch(held_out, 3), objective.make_batch(held_out, 3)
    assert torch.equal(first.input_ids, again.input_ids)
    one = objective.make_batch(held_out.part(1, 1, 6), 1)
    assert torch.equal(one.scored[0], first.scored[1])


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_the_loss_is_the_cross_entropy_of_what_is_hidden(run_of, wordpiece, family):
    run = run_of(model__family=family)
    objective = Masked(run, wordpiece)
    model = Transformer(run.model, wordpiece.vocabulary_tokens, torch.float32, run.heads)
    initialize(model, run.model, 0.3, 1)
    batch = objective.make_batch(rows(wordpiece), 3)
    loss = Trainee(model, objective)(batch)
    logits = model.language.logits(model(batch.input_ids))
    at_hidden = torch.stack([logits[row, batch.scored[row]] for row in range(3)])
    expected = F.cross_entropy(at_hidden.flatten(0, 1), batch.labels.flatten(), reduction="sum")
    torch.testing.assert_close(loss.nats, expected)
    assert loss.tokens == batch.num_valid()
    loss.total.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_accuracy_is_the_share_that_was_found(run_of, wordpiece):
    run = run_of()
    objective = Masked(run, wordpiece)
    model = Transformer(run.model, wordpiece.vocabulary_tokens, torch.float32)
    initialize(model, run.model, 0.3, 1)
    batch = objective.make_batch(rows(wordpiece, 50), 64)
    with torch.no_grad():
        loss = Trainee(model, objective)(batch)
        logits = model.language.logits(model(batch.input_ids))
    likeliest = torch.gather(logits.argmax(-1), 1, batch.scored)
    right = int(((likeliest == batch.labels) & (batch.labels != NOT_SCORED)).sum())
    counts = objective.count(batch, loss)
    assert counts.tolist() == [right, 200]
    assert objective.scores(counts) == {"accuracy": right / 200}
