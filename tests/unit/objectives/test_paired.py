"""Two texts in a row: which, in which order, and whether they belong together."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llm_dist.batch import NOT_SCORED
from llm_dist.model.init import initialize
from llm_dist.model.transformer import Transformer
from llm_dist.objectives.objective import Trainee
from llm_dist.objectives.paired import APART, TOGETHER, Paired
from llm_dist.rows import Rows
from llm_dist.tokenizer import CLS, PAD, SEP
from tests.unit.objectives.test_masked import unhidden

T, TEXT, NUM = 32, 29, 200


def run_and_rows(run_of, tokenizer, name, lengths=None, partner_lengths=None):
    """Row r holds tokens of one half of the vocabulary, its partner those of the other."""
    run = run_of(objective__name=name, data__packing="separate")
    draw, half = np.random.default_rng(0), (8 + tokenizer.vocabulary_tokens) // 2
    own, other = draw.integers(8, half, (NUM, TEXT)), draw.integers(half, tokenizer.vocabulary_tokens, (NUM, TEXT))
    own[:, 0] = tokenizer.separator_id
    scored = np.full(NUM, TEXT) if lengths is None else np.resize(lengths, NUM)
    given = np.full(NUM, TEXT) if partner_lengths is None else np.resize(partner_lengths, NUM)
    return run, Rows(own, own, scored, step=9, partners=other, num_partner_tokens=given), half


def texts(batch, tokenizer):
    """First text, second text and label of each row."""
    ids, special = unhidden(batch), tokenizer.special_ids
    for row, segments, label in zip(ids.tolist(), batch.segment_ids.tolist(), batch.pair_labels.tolist(), strict=True):
        assert row[0] == special[CLS]
        middle = row.index(special[SEP])
        rest = row[middle + 1 :]
        end = rest.index(special[SEP])
        assert set(rest[end + 1 :]) <= {special[PAD]}
        assert segments == [0] * (middle + 1) + [1] * (end + 1) + [0] * (len(row) - middle - end - 2)
        yield row[1:middle], rest[:end], label


def test_half_of_the_pairs_belong_together_and_the_others_come_from_elsewhere(run_of, wordpiece):
    run, rows, half = run_and_rows(run_of, wordpiece, "masked_nsp")
    batch = Paired(run, wordpiece).make_batch(rows, NUM)
    labels = batch.pair_labels.tolist()
    assert 0.35 < labels.count(APART) / NUM < 0.65
    for (first, second, label), whole in zip(texts(batch, wordpiece), rows.inputs.tolist(), strict=True):
        assert first and second and first == whole[1 : 1 + len(first)], "behind the separator"
        if label == TOGETHER:
            assert first + second == whole[1:]
        else:
            assert min(second) >= half


def test_order_swaps_the_halves_of_one_text(run_of, wordpiece):
    run, rows, _ = run_and_rows(run_of, wordpiece, "masked_sop")
    batch = Paired(run, wordpiece).make_batch(rows._replace(partners=None, num_partner_tokens=None), NUM)
    for (first, second, label), whole in zip(texts(batch, wordpiece), rows.inputs.tolist(), strict=True):
        assert (first + second if label == TOGETHER else second + first) == whole[1:]
    assert 0.35 < batch.pair_labels.tolist().count(APART) / NUM < 0.65


def test_without_another_document_a_pair_stays_together(run_of, wordpiece):
    run, rows, _ = run_and_rows(run_of, wordpiece, "masked_nsp", partner_lengths=[0, 1])
    assert set(Paired(run, wordpiece).make_batch(rows, NUM).pair_labels.tolist()) == {TOGETHER}


def test_texts_too_short_to_cut_are_not_judged(run_of, wordpiece):
    run, rows, _ = run_and_rows(run_of, wordpiece, "masked_nsp", lengths=[0, 1, 2, 3])
    batch = Paired(run, wordpiece).make_batch(rows, NUM + 2)
    labels = batch.pair_labels.reshape(-1)[:8].tolist()
    assert labels[:3] == [NOT_SCORED] * 3 and labels[3] in (TOGETHER, APART)
    assert batch.pair_labels[NUM:].tolist() == [NOT_SCORED] * 2


def test_a_second_text_is_as_long_as_the_true_one_where_it_can_be(run_of, wordpiece):
    """Were negatives shorter, length would give them away."""
    run, rows, _ = run_and_rows(run_of, wordpiece, "masked_nsp", partner_lengths=[TEXT, TEXT, 6])
    for row, (first, second, label) in enumerate(texts(Paired(run, wordpiece).make_batch(rows, NUM), wordpiece)):
        room = TEXT - 1 - len(first)
        assert len(second) == room or (label == APART and row % 3 == 2 and 1 <= len(second) < 6)


def test_rows_are_paired_alike_whoever_computes_them(run_of, wordpiece):
    run, rows, _ = run_and_rows(run_of, wordpiece, "masked_nsp")
    objective = Paired(run, wordpiece)
    whole, part = objective.make_batch(rows, NUM), objective.make_batch(rows.part(40, 7, 40), 7)
    for name in ("input_ids", "labels", "scored", "segment_ids", "pair_labels", "document_ids"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[40:47]), name


@pytest.mark.parametrize("weight", [0.0, 1.0, 2.5])
def test_a_pair_weighs_as_much_as_the_hidden_tokens_of_a_row(run_of, wordpiece, weight):
    run, rows, _ = run_and_rows(run_of, wordpiece, "masked_nsp")
    run = run.model_copy(update={"objective": run.objective.model_copy(update={"pair_weight": weight})})
    objective = Paired(run, wordpiece)
    model = Transformer(run.model, wordpiece.vocabulary_tokens, torch.float32, run.heads)
    initialize(model, run.model, 0.3, 1)
    batch = objective.make_batch(rows, NUM)
    loss = Trainee(model, objective)(batch)
    hidden = model(batch.input_ids, batch.positions, batch.document_ids, segment_ids=batch.segment_ids)
    verdicts = model.pair_head.logits(model.pooler(hidden[:, 0]))
    of_pairs = torch.nn.functional.cross_entropy(verdicts, batch.pair_labels, reduction="sum")
    torch.testing.assert_close(loss.penalty, weight * round(0.15 * TEXT) * of_pairs)
    counts = objective.count(batch, model_of_eval(model, objective, batch))
    right = int((verdicts.argmax(-1) == batch.pair_labels).sum())
    assert counts[2:].tolist() == [right, NUM]
    assert objective.scores(counts)["pair_accuracy"] == right / NUM


def model_of_eval(model, objective, batch):
    with torch.no_grad():
        return Trainee(model, objective)(batch)
