"""Rows of tokens to a batch, and a batch to a loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm_dist import config
from llm_dist.batch import NOT_SCORED
from llm_dist.model.init import initialize
from llm_dist.model.transformer import Transformer
from llm_dist.objectives.causal import Causal, positions_in_documents
from llm_dist.objectives.instruct import Instruct
from llm_dist.objectives.objective import Trainee
from llm_dist.rows import NOT_LABELLED, Rows

MODEL = config.Model(layers=1, d_model=8, heads=2, d_ff=16, max_sequence_tokens=16, vocabulary_multiple=1)


def model_of(model: config.Model = MODEL) -> Transformer:
    built = Transformer(model, 11, torch.float32)
    initialize(built, model, 0.5, seed=3)
    return built


def rows(count: int, sequence_tokens: int = 5, **more: np.ndarray) -> Rows:
    tokens = np.random.default_rng(2).integers(0, 11, (count, sequence_tokens + 1))
    return Rows(tokens[:, :-1], tokens[:, 1:], **more)


def test_labels_are_what_follows_the_inputs() -> None:
    given_rows = rows(2)
    batch = Causal().make_batch(given_rows, 2)

    assert batch.input_ids.tolist() == given_rows.inputs.tolist()
    assert batch.labels.tolist() == given_rows.following.tolist()
    assert batch.document_ids is None and batch.positions is None


def test_what_follows_need_not_be_the_next_input() -> None:
    """The pieces of a packed row end with the separator that follows them in the text, not with the next piece."""
    inputs, following = np.array([[1, 2, 3, 4]]), np.array([[2, 9, 4, 9]])
    batch = Causal().make_batch(Rows(inputs, following), 1)

    assert (batch.input_ids.tolist(), batch.labels.tolist()) == (inputs.tolist(), following.tolist())


def test_padding_is_not_scored() -> None:
    batch = Causal().make_batch(rows(3, num_scored=np.array([5, 2, 0])), 4)

    assert (batch.labels != NOT_SCORED).sum(dim=1).tolist() == [5, 2, 0, 0]
    assert (batch.labels[1, :2] != NOT_SCORED).all()
    assert batch.num_valid() == 7


def test_a_position_is_scored_where_what_follows_is_marked() -> None:
    targets = np.full((2, 5), NOT_LABELLED)
    targets[0, [0, 2, 3]] = targets[1, 3] = 0
    given_rows = rows(2, num_scored=np.array([5, 4]), targets=targets)
    batch = Causal().make_batch(given_rows, 3)

    scored = batch.labels != NOT_SCORED
    assert scored.tolist() == [
        [False, True, True, False, False],
        [False, False, True, False, False],
        [False] * 5,
    ]
    assert batch.labels[0, 1:3].tolist() == given_rows.inputs[0, 2:4].tolist()


def test_responses_make_batches_as_long_as_they_are() -> None:
    targets = np.full((2, 40), NOT_LABELLED)
    targets[0, :17] = targets[1, :3] = 0
    given_rows = rows(2, 40, num_scored=np.array([17, 3]), targets=targets)
    batch = Instruct().make_batch(given_rows, 2)

    assert batch.input_ids.tolist() == given_rows.inputs[:, :32].tolist()
    assert (batch.labels != NOT_SCORED).sum(1).tolist() == [16, 2]
    assert (Instruct.scores_text, Instruct.has_perplexity) == (False, True)


def test_absent_rows_are_not_scored() -> None:
    batch = Causal().make_batch(rows(1), 3)

    assert batch.input_ids.shape == batch.labels.shape == (3, 5)
    assert (batch.labels[1:] == NOT_SCORED).all()
    assert batch.num_valid() == 5


@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("is_masked", [False, True])
def test_a_batch_without_any_row_has_its_shape_and_no_loss(is_padded: bool, is_masked: bool) -> None:
    nothing = rows(0)
    scored, ids = np.empty(0, np.int64), np.empty((0, 5), np.int32)
    batch = Causal().make_batch(
        nothing._replace(num_scored=scored if is_padded else None, document_ids=ids if is_masked else None), 2
    )
    loss = Causal().loss(model_of(), batch)

    assert batch.input_ids.shape == (2, 5)
    assert (batch.document_ids is not None) == is_masked
    assert batch.num_valid() == 0
    assert loss.nats.item() == 0.0
    assert loss.tokens.item() == 0


def test_absent_rows_and_padding_change_no_gradient() -> None:
    cut = rows(2)
    padded = Rows(*(np.pad(array, ((0, 0), (0, 3)), constant_values=7) for array in cut[:2]), np.array([5, 5]))
    found = []
    for given_rows, num_rows in ((cut, 2), (cut, 4), (padded, 2)):
        model = model_of()
        Causal(z_loss=0.1).loss(model, Causal().make_batch(given_rows, num_rows)).total.backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})

    for other in found[1:]:
        for name in found[0]:
            torch.testing.assert_close(other[name], found[0][name], rtol=1e-5, atol=1e-6)


def test_the_loss_is_the_negative_log_likelihood_of_the_next_tokens() -> None:
    model = model_of()
    batch = Causal(z_loss=0.01).make_batch(rows(3), 3)
    loss = Trainee(model, Causal(z_loss=0.01))(batch)
    logits = model.head.logits(model(batch.input_ids)).double()
    normaliser = logits.logsumexp(-1)
    expected = (normaliser - logits.gather(-1, batch.labels[..., None])[..., 0]).sum()

    assert loss.nats.item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss.penalty.item() == pytest.approx(0.01 * normaliser.square().sum().item(), rel=1e-5)
    assert loss.total.item() == pytest.approx(loss.nats.item() + loss.penalty.item(), rel=1e-6)
    assert loss.tokens.item() == 15


def test_a_document_is_scored_alike_alone_and_behind_another() -> None:
    """Masks stop at borders and positions begin anew there."""
    both = rows(1, sequence_tokens=10, document_ids=np.array([[0] * 4 + [1] * 6]))
    together = Causal().make_batch(both, 1)
    together.labels[:, :4] = NOT_SCORED
    alone = Causal().make_batch(Rows(both.inputs[:, 4:], both.following[:, 4:]), 1)
    model = model_of()

    found, expected = (Causal().loss(model, batch).nats.item() for batch in (together, alone))
    assert found == pytest.approx(expected, rel=1e-5)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=6))
def test_positions_count_from_each_documents_start(lengths: list[int]) -> None:
    ids = torch.tensor([[number for number, length in enumerate(lengths) for _ in range(length)]])
    expected = [position for length in lengths for position in range(length)]

    assert positions_in_documents(ids).tolist() == [expected]
