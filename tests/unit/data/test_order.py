from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_dist.data.index import open_shards
from llm_dist.data.order import Order, keys, order_hash, permute, rank_rows, sequence_ids
from llm_dist.errors import UserError
from tests.unit.data.tiny_shards import write_shards

SIZES = st.one_of(st.integers(1, 40), st.integers(41, 5000), st.sampled_from([255, 256, 257, 1023, 1024, 1025]))


def one(secret: int) -> np.ndarray:
    return np.array([secret], np.uint64)


@given(size=SIZES, secret=st.integers(0, 2**64 - 1))
def test_permutation_is_a_bijection(size: int, secret: int) -> None:
    assert sorted(permute(np.arange(size), size, one(secret)).tolist()) == list(range(size))


@given(size=st.integers(1, 2**48), secret=st.integers(0, 2**64 - 1), data=st.data())
def test_permutation_of_a_large_range_stays_inside_and_is_random_access(size, secret, data) -> None:
    positions = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20, unique=True)))
    images = permute(positions, size, one(secret))
    assert images.min() >= 0
    assert images.max() < size
    assert len(set(images.tolist())) == len(positions)
    assert [int(permute(positions[i : i + 1], size, one(secret))[0]) for i in range(len(positions))] == images.tolist()


def test_the_order_never_changes_silently() -> None:
    """Golden values: a run that is resumed by a later version must read what it would have read."""
    assert keys(1, 2, 3).tolist() == [GOLDEN_KEY]
    assert permute(np.arange(10), 10, one(7)).tolist() == GOLDEN_TEN
    assert permute(np.arange(5), 1_000_003, one(2**63)).tolist() == GOLDEN_MILLION
    epochs, starts = Order(1000, 64, seed=3).starts(np.arange(12, 20))
    assert epochs.tolist() == [0, 0, 0, 1, 1, 1, 1, 1]
    assert starts.tolist() == GOLDEN_STARTS


GOLDEN_KEY = 2689273366532758856
GOLDEN_TEN = [9, 7, 2, 4, 8, 1, 6, 0, 3, 5]
GOLDEN_MILLION = [420454, 582094, 842126, 648121, 92624]
GOLDEN_STARTS = [873, 745, 193, 716, 588, 884, 460, 12]


def test_every_position_reaches_every_window_alike() -> None:
    images = permute(np.tile(np.arange(12), 3000), 12, keys(np.arange(3000, dtype=np.uint64)).repeat(12))
    counts = np.zeros((12, 12))
    np.add.at(counts, (np.tile(np.arange(12), 3000), images), 1)
    chi_squared = ((counts - 250) ** 2 / 250).sum()
    assert 70 < chi_squared < 185, "121 degrees of freedom: mean 121, deviation 15.6"


def test_neighbours_are_torn_apart() -> None:
    images = permute(np.arange(50_000), 50_000, keys(1)).astype(float)
    assert abs(np.corrcoef(images[:-1], images[1:])[0, 1]) < 0.02
    batch_means = images.reshape(-1, 50).mean(axis=1)
    assert 0.85 < batch_means.var() * 50 / images.var() < 1.15


@given(
    num_tokens=st.integers(5, 3000),
    sequence_tokens=st.integers(1, 60),
    ranks=st.integers(1, 16),
    sequences_per_step=st.integers(1, 40),
    seed=st.integers(0, 2**63 - 1),
)
def test_each_window_once_per_epoch_for_any_ranks(num_tokens, sequence_tokens, ranks, sequences_per_step, seed) -> None:
    if num_tokens < sequence_tokens:
        return
    order = Order(num_tokens, sequence_tokens, seed)
    size = order.sequences_per_epoch
    steps = -(-3 * size // sequences_per_step)
    ids = np.concatenate(
        [
            sequence_ids(step, sequences_per_step)[list(rank_rows(sequences_per_step, ranks, rank))]
            for step in range(steps)
            for rank in range(ranks)
        ]
    )
    assert ids.tolist() == list(range(steps * sequences_per_step)), "the ranks' slices make up each step's set"
    epochs, starts = order.starts(ids)
    for epoch in range(3):
        covered = np.zeros(num_tokens, np.int64)
        for start in starts[epochs == epoch].tolist():
            covered[(start + np.arange(sequence_tokens)) % num_tokens] += 1
        assert covered.max() == 1, "no token is read twice in an epoch"
        assert covered.sum() == size * sequence_tokens
        assert (covered == 0).sum() < sequence_tokens, "what is left out is shorter than a sequence"


@given(ids=st.lists(st.integers(0, 10**12), min_size=1, max_size=30), seed=st.integers(0, 2**63 - 1))
def test_random_access_equals_sequence(ids: list[int], seed: int) -> None:
    order = Order(10**6 + 7, 100, seed)
    epochs, starts = order.starts(np.array(ids))
    singly = [order.starts(np.array([g])) for g in ids]
    assert epochs.tolist() == [int(epoch[0]) for epoch, _ in singly] == [g // order.sequences_per_epoch for g in ids]
    assert starts.tolist() == [int(start[0]) for _, start in singly]


def test_left_out_tokens_move_over_the_whole_stream() -> None:
    order = Order(1000, 300, seed=1)
    left_out = np.zeros(1000, np.int64)
    for phase in order.phases(np.arange(2000)).tolist():
        left_out[(phase + 900 + np.arange(100)) % 1000] += 1
    assert left_out.min() > 140
    assert left_out.max() < 260


def test_seeds_and_epochs_differ() -> None:
    ids = np.arange(3 * 97)
    orders = [Order(97 * 10, 10, seed).starts(ids)[1] for seed in (0, 1, 2**62)]
    epochs = [starts[97 * e : 97 * (e + 1)].tolist() for starts in orders for e in range(3)]
    assert len({tuple(epoch) for epoch in epochs}) == 9


@given(num_rows=st.integers(0, 1000), ranks=st.integers(1, 64))
def test_rank_rows_are_dealt_evenly(num_rows: int, ranks: int) -> None:
    rows = [rank_rows(num_rows, ranks, rank) for rank in range(ranks)]
    assert [row for part in rows for row in part] == list(range(num_rows))
    assert max(map(len, rows)) - min(map(len, rows)) <= 1


def test_too_little_text_is_one_line() -> None:
    with pytest.raises(UserError, match=r"data.train has 9 tokens, fewer than data.sequence_tokens=10; "):
        Order(9, 10, seed=0)
    assert Order(10, 10, seed=0).sequences_per_epoch == 1


@settings(max_examples=10)
@given(steps=st.integers(1, 4), first=st.integers(0, 10**6), sequences_per_step=st.integers(1, 20))
def test_order_hash_is_the_same_for_any_ranks(order_shards, steps, first, sequences_per_step) -> None:
    shards, order = order_shards
    wanted = range(first, first + steps)
    hashes = {order_hash(shards, order, wanted, sequences_per_step, ranks) for ranks in range(1, 17)}
    assert len(hashes) == 1
    other = Order(order.num_tokens, order.sequence_tokens, order.seed + 1)
    assert order_hash(shards, other, wanted, sequences_per_step, 1) not in hashes


@pytest.fixture(scope="module")
def order_shards(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path):
    folder = tmp_path_factory.mktemp("order")
    ids = np.random.default_rng(0).integers(8, 280, (40, 50)).tolist()
    write_shards(folder, ids, tiny_tokenizer, chunk_tokens=128)
    shards = open_shards(folder)
    yield shards, Order(shards.num_tokens, 16, seed=5)
    shards.close()
