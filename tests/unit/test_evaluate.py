"""Evaluation scores each held-out token once, however many ranks share the windows."""

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from llm_dist import config
from llm_dist.batch import NOT_SCORED, LossSum
from llm_dist.data.holdout import HoldoutWindows
from llm_dist.data.index import open_shards
from llm_dist.evaluate import evaluate
from llm_dist.model.init import initialize
from llm_dist.model.transformer import Transformer
from llm_dist.objectives.causal import Causal
from llm_dist.objectives.instruct import Instruct
from llm_dist.objectives.objective import Trainee
from llm_dist.tokenizer_training import train
from tests.unit.data.tiny_shards import write_shards

DOCUMENTS = [list(range(10, 10 + length)) for length in (5, 40, 1, 90, 17)]
NUM_TOKENS = sum(map(len, DOCUMENTS)) + len(DOCUMENTS)


@dataclass
class OneOf:
    """A rank whose sums are kept, so that the ranks can run one after another."""

    rank: int
    ranks: int
    given: list = field(default_factory=list)
    device = torch.device("cpu")

    def sum(self, values):
        self.given.append(values.clone())
        return values


@pytest.fixture
def shards(tmp_path):
    train(["the quick brown fox jumps over the lazy dog " * 20], "byte-bpe", 280, tmp_path / "tokenizer")
    stream = write_shards(tmp_path / "shards", DOCUMENTS, tmp_path / "tokenizer")
    opened = open_shards(tmp_path / "shards")
    yield opened, stream
    opened.close()


def nats_by_label(batch):
    """A model whose loss at each position is its label plus one: a sum that tells which tokens were scored."""
    scored = batch.labels != NOT_SCORED
    nats = ((batch.labels + 1) * scored).sum().float()
    return LossSum(nats, scored.sum(), torch.zeros(()))


@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("sequence_tokens", [1, 7, 32, NUM_TOKENS, 500])
@pytest.mark.parametrize("ranks", [1, 3])
def test_every_token_is_scored_once_and_every_rank_calls_equally_often(shards, ranks, sequence_tokens, document_mask):
    opened, stream = shards
    calls, sums = [], []
    for rank in range(ranks):
        batches = []
        runtime = OneOf(rank, ranks)
        evaluate(
            lambda batch, batches=batches: (batches.append(batch), nats_by_label(batch))[1],
            Causal(),
            HoldoutWindows(opened, sequence_tokens, document_mask),
            runtime,
            sequences_per_batch=4,
        )
        assert all(batch.input_ids.shape == (4, sequence_tokens) for batch in batches)
        assert all((batch.document_ids is not None) == document_mask for batch in batches)
        calls.append(len(batches))
        sums += runtime.given
    assert len(set(calls)) == 1
    nats, tokens = sum(sums).tolist()
    assert (nats, tokens) == (np.sum(stream.astype(np.int64) + 1), NUM_TOKENS)


def test_the_numbers_follow_from_the_sums(shards):
    opened, stream = shards
    result = evaluate(nats_by_label, Causal(), HoldoutWindows(opened, 16), OneOf(0, 1))
    nats = float(np.sum(stream.astype(np.int64) + 1))
    assert result.tokens == NUM_TOKENS
    assert result.bytes == opened.num_bytes
    assert result.loss_nats == pytest.approx(nats / NUM_TOKENS)
    assert result.perplexity == pytest.approx(math.exp(nats / NUM_TOKENS))
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / opened.num_bytes)


def test_a_part_of_the_windows_is_spread_over_the_text(shards):
    opened, _ = shards
    seen = []
    result = evaluate(
        lambda batch: (seen.append(batch), nats_by_label(batch))[1],
        Causal(),
        HoldoutWindows(opened, 16, max_sequences=3),
        OneOf(0, 1),
    )
    assert result.tokens == 3 * 16
    assert result.bytes == round(opened.num_bytes * 48 / NUM_TOKENS)


def test_a_perplexity_beyond_numbers_is_infinite(shards):
    opened, _ = shards

    def hopeless(batch):
        return LossSum(torch.tensor(1e9), torch.tensor(1), torch.zeros(()))

    assert evaluate(hopeless, Causal(), HoldoutWindows(opened, 16), OneOf(0, 1)).perplexity == math.inf


def test_where_responses_alone_are_scored_bits_of_the_text_are_unknown(shards):
    opened, _ = shards
    windows = HoldoutWindows(opened, 16)
    result = evaluate(nats_by_label, Instruct(), Marked(windows), OneOf(0, 1))
    assert result.perplexity == pytest.approx(math.exp(result.loss_nats)) and result.bits_per_byte is None
    assert result.tokens == 3 * windows.num_windows
    assert result.words().endswith(f"perplexity {result.perplexity:.2f}")


class Marked:
    """Windows in which three tokens are those of a response."""

    def __init__(self, windows):
        self._windows, self.num_windows, self.num_bytes = windows, windows.num_windows, windows.num_bytes

    def rows(self, chosen):
        rows = self._windows.rows(chosen)
        targets = np.full(rows.inputs.shape, -100)
        targets[:, 1:4] = 0
        return rows._replace(num_scored=None, targets=targets)


@pytest.mark.parametrize("stride", [1, 3, 8])
def test_sliding_windows_score_every_token_once_with_so_much_context(shards, stride):
    opened, stream = shards
    tokens = 8
    model_run = config.parse(
        {
            "run": {"name": "x", "steps": 1},
            "model": {"layers": 1, "d_model": 16, "heads": 2, "max_sequence_tokens": 16},
            "data": {"train": "nowhere", "sequence_tokens": tokens},
            "batch": {"tokens_per_step": tokens},
        }
    )
    model = Transformer(model_run.model, opened.vocabulary_tokens, torch.float32)
    initialize(model, model_run.model, 0.5, 1)
    windows = HoldoutWindows(opened, tokens, stride_tokens=stride)
    with torch.no_grad():
        found = evaluate(Trainee(model, Causal()), Causal(), windows, OneOf(0, 1))
        expected = 0.0
        circle = np.concatenate([stream, stream[:1]]).astype(np.int64)
        for target in range(1, len(circle)):
            # The first window that holds the target; every earlier window ends before it.
            window = max(0, -(-(target - tokens) // stride))
            first = window * stride
            assert target - first >= min(target, tokens - stride + 1)
            logits = model.language.logits(model(torch.from_numpy(circle[None, first:target])))[0, -1]
            expected -= logits.log_softmax(0)[circle[target]].item()
    assert found.tokens == NUM_TOKENS and found.bytes == opened.num_bytes
    assert found.loss_nats == pytest.approx(expected / NUM_TOKENS, rel=1e-5)
    if stride == tokens:
        with torch.no_grad():
            assert evaluate(Trainee(model, Causal()), Causal(), HoldoutWindows(opened, tokens), OneOf(0, 1)) == found
