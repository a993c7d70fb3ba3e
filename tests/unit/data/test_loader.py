"""A rank's rows of any step, the same however they were prepared and whatever was asked before."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_dist.data.index import open_shards
from llm_dist.data.loader import Loader
from llm_dist.data.reading import Reading
from llm_dist.errors import UserError
from tests.unit.data.tiny_reading import Sources, Stream, assert_same, laid_together, write_source
from tests.unit.data.tiny_shards import write_shards

PACKINGS = ("concatenate", "best_fit")
SEQUENCE_TOKENS = 20
SEQUENCES_PER_STEP = 7
MIXED = ((0, {"a": 2, "b": 3, "c": 2}), (11, {"b": 1, "c": 1}), (30, {"a": 1}))


@pytest.fixture(scope="module")
def streams(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> dict[str, tuple[Path, Stream]]:
    folder = tmp_path_factory.mktemp("loader")
    draw = np.random.default_rng(0)
    made = {}
    for name, num_documents in (("a", 60), ("b", 150), ("c", 20)):
        lengths = draw.integers(0, 60, num_documents).tolist()
        made[name] = folder / name, write_source(folder / name, tiny_tokenizer, lengths)
    return made


@pytest.fixture(scope="module")
def sources(streams: dict[str, tuple[Path, Stream]]):
    opened = Sources({name: folder for name, (folder, _) in streams.items()})
    yield opened
    opened.close()


@pytest.fixture(params=PACKINGS)
def reading(sources: Sources, request: pytest.FixtureRequest) -> Reading:
    return sources.reading(request.param, MIXED)


def loader_of(reading: Reading, *, ranks: int = 1, rank: int = 0, workers: int = 0, first_step: int = 0) -> Loader:
    return Loader(reading, ranks, rank, workers=workers, first_step=first_step)


@settings(max_examples=10, deadline=None)
@given(ranks=st.integers(1, 9), workers=st.integers(0, 2), step=st.integers(0, 60))
def test_any_ranks_pair_a_step_s_rows_alike(sources: Sources, ranks: int, workers: int, step: int) -> None:
    reading = sources.reading("separate", MIXED, pair_seed=3, document_mask=False)
    with loader_of(reading) as loader:
        whole = loader.rows(step)
    parts = []
    for rank in range(ranks):
        with loader_of(reading, ranks=ranks, rank=rank, workers=workers, first_step=step) as loader:
            parts.append(loader.rows(step))
    assert_same(laid_together([part for part in parts if part.num_rows]), whole)


def test_partners_hold_text_of_other_documents(sources: Sources) -> None:
    reading = sources.reading("separate", [(0, {"a": 1})], names="a", pair_seed=3, document_mask=False)
    with loader_of(reading) as loader:
        for step in range(50):
            rows = loader.rows(step)
            for row in range(rows.num_rows):
                count, own = int(rows.num_partner_tokens[row]), set(rows.inputs[row, : rows.num_scored[row]].tolist())
                partner = set(rows.partners[row, :count].tolist())
                assert count and not own & partner - {0}, "every token but the separator says where it stands"


def test_rows_are_the_steps_windows(sources: Sources, streams: dict[str, tuple[Path, Stream]]) -> None:
    """Cut from the stream by hand."""
    reading = sources.reading("concatenate", [(0, {"a": 1})], names="a")
    order, packing, stream = reading.sources[0].order, reading.sources[0].packing, streams["a"][1]
    with loader_of(reading) as loader:
        for step in (0, 1, 50, 10**9):
            rows = loader.rows(step)
            assert (rows.first_row, rows.inputs.dtype, rows.inputs.shape) == (0, np.int64, (7, SEQUENCE_TOKENS))
            ids = np.arange(7 * step, 7 * step + 7)
            ids = ids[np.argsort(order.lanes(ids), kind="stable")]
            starts = packing.starts(order.epochs(ids), order.windows(ids))
            places = (starts[:, None] + np.arange(SEQUENCE_TOKENS + 1)) % len(stream.tokens)
            np.testing.assert_array_equal(rows.inputs, stream.tokens[places[:, :-1]])
            np.testing.assert_array_equal(rows.following, stream.tokens[places[:, 1:]])
            np.testing.assert_array_equal(rows.document_ids, np.cumsum(stream.is_start[places[:, :-1]], axis=1))


def test_no_mask_no_document_ids(sources: Sources) -> None:
    for packing in PACKINGS:
        with loader_of(sources.reading(packing, MIXED, document_mask=False)) as loader:
            assert loader.rows(0).document_ids is None


def test_only_packed_rows_are_padded(sources: Sources) -> None:
    for packing, is_padded in (("concatenate", False), ("best_fit", True)):
        with loader_of(sources.reading(packing, MIXED)) as loader:
            assert (loader.rows(0).num_scored is not None) == is_padded


@settings(max_examples=15)
@given(
    packing=st.sampled_from(PACKINGS),
    ranks=st.integers(1, 16),
    workers=st.integers(0, 3),
    first_step=st.one_of(st.integers(0, 40), st.integers(0, 10**9)),
)
def test_any_ranks_and_workers_read_the_same_step(sources, packing, ranks, workers, first_step) -> None:
    reading = sources.reading(packing, MIXED)
    with loader_of(reading, first_step=first_step) as oracle:
        expected = oracle.rows(first_step)
    parts = []
    for rank in range(ranks):
        with loader_of(reading, ranks=ranks, rank=rank, workers=workers, first_step=first_step) as loader:
            parts.append(loader.rows(first_step))
    assert_same(laid_together(parts), expected)


ATTEMPT = st.tuples(st.integers(1, 9), st.integers(0, 3), st.integers(1, 30), st.integers(0, 12))
"""Ranks, workers, steps until it is killed, and how many of them no checkpoint saved."""


@settings(max_examples=20)
@given(
    packing=st.sampled_from(PACKINGS),
    names=st.sampled_from(["a", "abc"]),
    attempts=st.lists(ATTEMPT, min_size=1, max_size=5),
    sequences_per_step=st.integers(1, 40),
)
def test_any_history_of_kills_and_resizes_reads_what_one_attempt_would(
    sources, packing, names, attempts, sequences_per_step
) -> None:
    segments = MIXED if names == "abc" else ((0, {"a": 1}),)
    reading = sources.reading(packing, segments, names=names, sequences_per_step=sequences_per_step)
    with loader_of(reading) as uninterrupted:
        step = 0
        for ranks, workers, num_steps, num_lost in attempts:
            loaders = [
                loader_of(reading, ranks=ranks, rank=rank, workers=workers, first_step=step) for rank in range(ranks)
            ]
            for at in range(step, step + num_steps):
                assert_same(laid_together([loader.rows(at) for loader in loaders]), uninterrupted.rows(at))
            for loader in loaders:
                loader.close()
            step += max(0, num_steps - num_lost)


@pytest.mark.parametrize("workers", [1, 3])
def test_steps_may_be_asked_in_any_order(reading: Reading, workers: int) -> None:
    with loader_of(reading) as oracle, loader_of(reading, workers=workers, first_step=3) as loader:
        for step in [0, 1, 2, 2, 40, 41, 5000, 4999, 10**9, 0]:
            assert_same(loader.rows(step), oracle.rows(step))


def test_rows_handed_out_stay_as_they_are(reading: Reading) -> None:
    with loader_of(reading, workers=1) as loader:
        first = loader.rows(0)
        copy = first.inputs.copy()
        for step in range(1, 100):
            loader.rows(step)
        np.testing.assert_array_equal(first.inputs, copy)


def test_the_following_steps_are_prepared_meanwhile(reading: Reading) -> None:
    """Few rows are read with those of the steps after them, and the next such group in the background."""
    with loader_of(reading, workers=1, first_step=8) as loader:
        first = loader.rows(8)
        following = min(loader._coming)
        assert 8 < following <= 8 + 64 // SEQUENCES_PER_STEP + 1
        assert all(np.shares_memory(loader.rows(step).inputs, first.inputs.base) for step in range(9, following))
        prepared = loader._coming[following].result(timeout=60)
        assert np.shares_memory(loader.rows(following).inputs, prepared.inputs)
        assert min(loader._coming) > following


def test_a_threads_error_comes_out_as_itself(tmp_path: Path, tiny_tokenizer: Path) -> None:
    write_shards(tmp_path / "a", [[9] * 40] * 10, tiny_tokenizer)
    opened = Sources({"a": tmp_path / "a"})
    for path in (tmp_path / "a").glob("*.tar"):
        content = bytearray(path.read_bytes())
        content[600:700] = bytes(100)  # inside the first chunk's .npy header and tokens
        path.write_bytes(content)
    reading = opened.reading("concatenate", [(0, {"a": 1})], names="a", document_mask=False)
    with loader_of(reading, workers=2) as loader:
        for _ in range(2):
            with pytest.raises(UserError, match=r"shard-00000\d.tar: chunk \d is damaged"):
                loader.rows(0)
    opened.close()


def test_close_joins_the_threads(reading: Reading) -> None:
    loader = loader_of(reading, workers=2)
    threads = loader._threads
    assert threads is not None
    loader.rows(0)
    loader.close()
    loader.close()
    assert not any(thread.is_alive() for thread in threads._threads)


def test_shards_opened_twice_read_alike(sources: Sources, streams: dict[str, tuple[Path, Stream]]) -> None:
    again = Sources({name: folder for name, (folder, _) in streams.items()})
    assert {name: shards.fingerprint for name, shards in again.shards.items()} == {
        name: open_shards(folder).fingerprint for name, (folder, _) in streams.items()
    }
    with loader_of(sources.reading("best_fit", MIXED)) as ours, loader_of(again.reading("best_fit", MIXED)) as theirs:
        assert_same(ours.rows(33), theirs.rows(33))
    again.close()
