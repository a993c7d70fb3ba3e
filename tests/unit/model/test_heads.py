from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llm_dist.batch import NOT_SCORED
from llm_dist.config import Model
from llm_dist.model import heads
from llm_dist.model.heads import LanguageHead

WIDTH, VOCABULARY, ROWS = 24, 101, 128


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks, the last of them short."""
    monkeypatch.setattr(heads, "head_chunk_rows", lambda _rows: 7)


def example(dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(3)
    head = LanguageHead(Model(layers=1, d_model=WIDTH, heads=1), VOCABULARY, ROWS)
    with torch.no_grad():
        head.weight.normal_(0, 0.3, generator=generator)
    hidden = (torch.randn(3, 11, WIDTH, generator=generator) * scale).to(dtype).requires_grad_()
    labels = torch.randint(0, VOCABULARY, (3, 11), generator=generator)
    labels[0, :4] = labels[2, 5] = NOT_SCORED
    return head, hidden, labels


def reference(head, hidden, labels, z_loss=0.0):
    """The same loss by torch's own pieces, in fp64 where that is exact enough to judge by."""
    wide = hidden.detach().double().requires_grad_()
    weight = head.weight.detach().to(hidden.dtype).double().requires_grad_()
    logits = F.linear(wide, weight[:VOCABULARY]).flatten(0, 1)
    nats = F.cross_entropy(logits, labels.flatten(), reduction="sum", ignore_index=NOT_SCORED)
    scored = labels.flatten() != NOT_SCORED
    penalty = z_loss * logits.logsumexp(1)[scored].square().sum()
    (nats + penalty).backward()
    return nats, penalty, wide.grad, weight.grad


def relative(ours, theirs):
    return ((ours.double() - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize(
    ("dtype", "loss_error", "gradient_error"), [(torch.float32, 1e-6, 1e-6), (torch.bfloat16, 1e-2, 1e-2)]
)
def test_loss_and_gradients_are_cross_entropy_s(dtype, loss_error, gradient_error, z_loss):
    head, hidden, labels = example(dtype)
    nats, penalty, for_hidden, for_weight = reference(head, hidden, labels, z_loss)
    loss = head(hidden, labels, z_loss)
    (loss.total * 0.5).backward()
    assert loss.nats.dtype == torch.float32 and loss.tokens.dtype == torch.int64
    assert loss.tokens.item() == (labels != NOT_SCORED).sum()
    assert relative(loss.nats, nats) <= loss_error
    assert loss.penalty.item() == pytest.approx(penalty.item(), rel=10 * loss_error)
    assert head.weight.grad.dtype == torch.float32 and hidden.grad.dtype == dtype
    assert relative(hidden.grad, for_hidden * 0.5) <= gradient_error
    assert relative(head.weight.grad, for_weight * 0.5) <= gradient_error


def test_positions_without_a_label_and_padded_rows_carry_nothing():
    head, hidden, labels = example()
    head(hidden, labels).total.backward()
    assert torch.all(hidden.grad[labels == NOT_SCORED] == 0)
    assert torch.all(head.weight.grad[VOCABULARY:] == 0)
    with torch.no_grad():
        before = head(hidden, labels).nats.item()
        head.weight[VOCABULARY:] = 1e4
        assert head(hidden, labels).nats.item() == before
    assert head.logits(hidden).shape == (3, 11, VOCABULARY)


def test_nothing_scored_is_a_loss_of_zero():
    head, hidden, labels = example()
    loss = head(hidden, torch.full_like(labels, NOT_SCORED), 1e-2)
    loss.total.backward()
    assert loss.nats.item() == loss.penalty.item() == loss.tokens.item() == 0
    assert torch.all(hidden.grad == 0) and torch.all(head.weight.grad == 0)


def test_huge_logits_stay_finite():
    head, hidden, labels = example(scale=1e4)
    loss = head(hidden, labels)
    loss.total.backward()
    assert torch.isfinite(loss.nats) and torch.isfinite(head.weight.grad).all() and torch.isfinite(hidden.grad).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_evaluation_gives_the_training_loss(dtype):
    head, hidden, labels = example(dtype)
    training = head(hidden, labels, 1e-2)
    with torch.no_grad():
        evaluation = head(hidden, labels, 1e-2)
    assert evaluation.nats.item() == training.nats.item() and evaluation.penalty.item() == training.penalty.item()
    assert training.nats.requires_grad and not evaluation.nats.requires_grad


def test_frozen_weight_gets_no_gradient():
    head, hidden, labels = example()
    head.weight.requires_grad_(False)
    head(hidden, labels).total.backward()
    assert head.weight.grad is None and hidden.grad.abs().sum() > 0


def test_gradient_of_the_nats_alone_is_refused_where_there_is_a_penalty():
    head, hidden, labels = example()
    with pytest.raises(AssertionError, match=r"LossSum\.total"):
        head(hidden, labels, 1e-2).nats.backward()


@pytest.mark.parametrize("frozen", ["weight", "bias", "both"])
def test_a_transformed_head_is_torch_s_own_with_a_bias_and_leaves_out_what_is_frozen(frozen):
    model = Model(family="bert", layers=1, d_model=WIDTH, heads=1)
    head = LanguageHead(model, VOCABULARY, ROWS)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    head.weight.requires_grad_(frozen == "bias")
    head.bias.requires_grad_(frozen == "weight")
    hidden = torch.randn(3, 11, WIDTH, generator=generator, requires_grad=True)
    labels = torch.randint(0, VOCABULARY, (3, 11), generator=generator)
    labels[0, :4] = NOT_SCORED
    loss = head(hidden, labels)
    loss.total.backward()
    found = {name: parameter.grad for name, parameter in head.named_parameters()}, hidden.grad
    head.zero_grad()
    again = hidden.detach().requires_grad_()
    logits = head.logits(again)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=NOT_SCORED)
    expected.backward()
    torch.testing.assert_close(loss.nats, expected)
    torch.testing.assert_close(found[1], again.grad)
    for name, parameter in head.named_parameters():
        if not parameter.requires_grad:
            assert found[0][name] is None
            continue
        torch.testing.assert_close(found[0][name], parameter.grad, msg=name)
