from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_dist.data.index import ShardSet, open_shards
from llm_dist.data.loader import Loader, Rows
from llm_dist.data.order import Order, sequence_ids
from llm_dist.errors import UserError
from tests.unit.data.tiny_shards import write_shards

SEQUENCE_TOKENS = 20
SEQUENCES_PER_STEP = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    folder = tmp_path_factory.mktemp("loader") / "train"
    generator = np.random.default_rng(0)
    documents = [generator.integers(0, 280, n).tolist() for n in generator.integers(0, 60, 60)]
    write_shards(folder, documents, tiny_tokenizer)
    return folder


@pytest.fixture(scope="module")
def shards(folder: Path):
    shards = open_shards(folder)
    yield shards
    shards.close()


def loader_of(shards: ShardSet, *, ranks: int = 1, rank: int = 0, workers: int = 0, first_step: int = 0) -> Loader:
    order = Order(shards.num_tokens, SEQUENCE_TOKENS, seed=4)
    return Loader(
        shards,
        order,
        SEQUENCES_PER_STEP,
        ranks,
        rank,
        document_mask=True,
        workers=workers,
        first_step=first_step,
    )


def assert_same(rows: Rows, other: Rows) -> None:
    assert rows.first_row == other.first_row
    np.testing.assert_array_equal(rows.tokens, other.tokens)
    np.testing.assert_array_equal(rows.document_ids, other.document_ids)


def test_rows_are_the_steps_windows(shards: ShardSet) -> None:
    order = Order(shards.num_tokens, SEQUENCE_TOKENS, seed=4)
    with loader_of(shards) as loader:
        for step in (0, 1, 50, 10**9):
            rows = loader.rows(step)
            assert (rows.first_row, rows.tokens.dtype, rows.tokens.shape) == (0, np.int64, (7, SEQUENCE_TOKENS + 1))
            for row, start in zip(rows.tokens, order.starts(sequence_ids(step, 7))[1].tolist(), strict=True):
                np.testing.assert_array_equal(row, shards.tokens(start, SEQUENCE_TOKENS + 1))


def test_document_ids_rise_at_the_separators_of_the_index(shards: ShardSet) -> None:
    order = Order(shards.num_tokens, SEQUENCE_TOKENS, seed=4)
    with loader_of(shards) as loader:
        for step in range(30):
            starts = order.starts(sequence_ids(step, 7))[1].tolist()
            ids = loader.rows(step).document_ids
            assert ids is not None
            for row, start in zip(ids, starts, strict=True):
                begins = shards.document_starts(start, SEQUENCE_TOKENS + 1).tolist()
                assert row[0] == (0 in begins)
                assert (np.flatnonzero(np.diff(row)) + 1).tolist() == [begin for begin in begins if begin]


def test_no_mask_no_document_ids(shards: ShardSet) -> None:
    order = Order(shards.num_tokens, SEQUENCE_TOKENS, seed=4)
    with Loader(shards, order, 3, 1, 0, document_mask=False, workers=0, first_step=0) as loader:
        assert loader.rows(0).document_ids is None


@settings(max_examples=20)
@given(ranks=st.integers(1, 16), workers=st.integers(0, 3), first_step=st.integers(0, 1000))
def test_any_ranks_and_workers_read_the_same_step(shards: ShardSet, ranks: int, workers: int, first_step: int) -> None:
    with loader_of(shards) as oracle:
        expected = oracle.rows(first_step)
    parts = []
    for rank in range(ranks):
        with loader_of(shards, ranks=ranks, rank=rank, workers=workers, first_step=first_step) as loader:
            parts.append(loader.rows(first_step))
    assert [part.first_row for part in parts] == np.cumsum([0, *(len(part.tokens) for part in parts[:-1])]).tolist()
    np.testing.assert_array_equal(np.concatenate([part.tokens for part in parts]), expected.tokens)
    np.testing.assert_array_equal(np.concatenate([part.document_ids for part in parts]), expected.document_ids)


@pytest.mark.parametrize("workers", [1, 3])
def test_steps_may_be_asked_in_any_order(shards: ShardSet, workers: int) -> None:
    with loader_of(shards) as oracle, loader_of(shards, workers=workers, first_step=3) as loader:
        for step in [0, 1, 2, 2, 40, 41, 5000, 4999, 10**9, 0]:
            assert_same(loader.rows(step), oracle.rows(step))


def test_the_following_steps_are_prepared_meanwhile(shards: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    with loader_of(shards, workers=1, first_step=8) as loader:
        first = loader.rows(8)
        prepared = loader._prepared[9].result(timeout=60)
        assert loader.rows(9) is prepared
        assert first is not prepared


def test_a_threads_error_comes_out_as_itself(folder: Path, tmp_path: Path, tiny_tokenizer: Path) -> None:
    write_shards(tmp_path / "train", [[9] * 40] * 10, tiny_tokenizer)
    shards = open_shards(tmp_path / "train")
    for path in (tmp_path / "train").glob("*.tar"):
        content = bytearray(path.read_bytes())
        content[600:700] = bytes(100)  # inside the first chunk's .npy header and tokens
        path.write_bytes(content)
    with loader_of(shards, workers=2) as loader:
        for _ in range(2):
            with pytest.raises(UserError, match=r"shard-00000\d.tar: chunk \d is damaged"):
                loader.rows(0)


def test_close_joins_the_threads(shards: ShardSet) -> None:
    loader = loader_of(shards, workers=2)
    threads = loader._threads
    assert threads is not None
    loader.rows(0)
    loader.close()
    loader.close()
    assert not any(thread.is_alive() for thread in threads._threads)
