"""The rows of a step: the same for any ranks, in the order of lanes, each source's sequences without gap."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_dist.data.loader import Loader
from llm_dist.data.order import LANES
from llm_dist.data.reading import Reading, segments_by_size
from llm_dist.plan import num_micro_batches, rows_per_micro_batch
from llm_dist.rows import Rows
from tests.unit.data.tiny_reading import Sources, Stream, assert_same, laid_together, write_source

PACKINGS = ("concatenate", "best_fit", "separate")
LENGTHS = {"a": [30, 3, 100, 0, 17, 80, 9] * 3, "b": [5] * 70, "c": [250, 19, 20, 39]}
MIXED = ((0, {"a": 0.5, "b": 0.1, "c": 0.4}), (6, {"b": 1}), (9, {"a": 2, "c": 1}))


@pytest.fixture(scope="module")
def streams(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path):
    folder = tmp_path_factory.mktemp("reading")
    streams = {name: write_source(folder / name, tiny_tokenizer, lengths) for name, lengths in LENGTHS.items()}
    return folder, streams


@pytest.fixture(scope="module")
def sources(streams: tuple[Path, dict[str, Stream]]):
    opened = Sources({name: streams[0] / name for name in LENGTHS})
    yield opened
    opened.close()


def rows_of(reading: Reading, step: int, own: range | None = None) -> Rows:
    own = own or range(reading.sequences_per_step)
    places = reading.places(range(step, step + 1), own)
    return reading.read(*(each[0] for each in places))._replace(first_row=own.start, step=step)


READINGS = {
    "packing": st.sampled_from(PACKINGS),
    "names": st.sampled_from(["a", "abc"]),
    "sequences_per_step": st.integers(1, 40),
    "cell_windows": st.integers(1, 2),
    "first": st.one_of(st.integers(0, 12), st.integers(0, 10**9)),
}


def reading_of(sources: Sources, packing: str, names: str, *, document_mask: bool = True, **more: int) -> Reading:
    segments = MIXED if len(names) > 1 else ((0, {"a": 1}),)
    return sources.reading(packing, segments, names=names, document_mask=document_mask, **more)


@settings(max_examples=25)
@given(**READINGS, steps=st.integers(1, 3), document_mask=st.booleans())
def test_order_hash_is_the_same_for_any_ranks(sources, first, steps, **more) -> None:
    reading = reading_of(sources, **more)
    wanted = range(first, first + steps)
    hashes = {ranks: reading.order_hash(wanted, ranks) for ranks in range(1, 17)}
    assert len(set(hashes.values())) == 1, hashes
    assert reading_of(sources, **more, seed=5).order_hash(wanted) not in hashes.values()
    assert reading.order_hash(range(first + 1, first + 1 + steps)) not in hashes.values()


@settings(max_examples=30)
@given(**READINGS, ranks=st.integers(1, 16), workers=st.integers(0, 3), most_rows=st.integers(1, 9))
def test_any_ranks_workers_and_micro_batches_make_the_same_step(
    sources, first, ranks, workers, most_rows, **more
) -> None:
    reading = reading_of(sources, **more)
    dealing = (reading.sequences_per_step, ranks, most_rows)
    count, size = num_micro_batches(*dealing), rows_per_micro_batch(*dealing)
    for step in (first, first + 1):
        parts = []
        for rank in range(ranks):
            with Loader(reading, ranks, rank, workers=workers, first_step=first) as loader:
                rows = loader.rows(step)
            cut = [rows.part(at, size, rows.first_row + at) for at in range(0, count * size, size)]
            assert all(part.num_rows <= size for part in cut)
            parts += [part for part in cut if part.num_rows]
        assert_same(laid_together(parts), rows_of(reading, step))


@settings(max_examples=40)
@given(**READINGS)
def test_a_step_holds_the_next_sequences_of_each_source_lane_by_lane(sources, first, **more) -> None:
    reading = reading_of(sources, **more)
    places = reading.places(range(first, first + 3), range(reading.sequences_per_step))
    for number, step in enumerate(range(first, first + 3)):
        wanted, lanes = [], []
        before, after = reading.mixture.counts(step), reading.mixture.counts(step + 1)
        for place, (source, low, high) in enumerate(zip(reading.sources, before, after, strict=True)):
            ids = np.arange(low, high)
            epochs, windows = source.order.epochs(ids), source.order.windows(ids)
            each = zip(source.order.lanes(ids), [place] * len(ids), ids, epochs, windows, strict=True)
            lanes += [tuple(int(value) for value in values) for values in each]
        wanted = [(place, epoch, window) for _, place, _, epoch, window in sorted(lanes)]
        assert list(zip(*(array[number].tolist() for array in places), strict=True)) == wanted
        found = rows_of(reading, step)
        assert found.sources.tolist() == [place for place, _, _ in wanted]


@settings(max_examples=40)
@given(**READINGS, steps=st.integers(0, 5), data=st.data())
def test_places_of_some_rows_are_part_of_all(sources, first, steps, data, **more) -> None:
    reading = reading_of(sources, **more)
    all_rows = range(reading.sequences_per_step)
    whole = reading.places(range(first, first + steps), all_rows)
    begin = data.draw(st.integers(0, len(all_rows)))
    own = range(begin, data.draw(st.integers(begin, len(all_rows))))
    for part, array in zip(reading.places(range(first, first + steps), own), whole, strict=True):
        np.testing.assert_array_equal(part, array[:, own.start : own.stop])


@pytest.mark.parametrize("packing", PACKINGS)
def test_every_source_is_read_once_per_epoch_of_its_own(sources: Sources, packing: str) -> None:
    """Windows of each source over many steps: each equally often up to one, and its tokens add up."""
    reading = sources.reading(packing, MIXED)
    num_steps = 200
    read = Counter()
    tokens = np.zeros(3, np.int64)
    for step in range(num_steps):
        sources_, epochs, windows = (array[0] for array in reading.places(range(step, step + 1), range(7)))
        read.update(zip(sources_.tolist(), epochs.tolist(), windows.tolist(), strict=True))
        rows = rows_of(reading, step)
        tokens += np.bincount(rows.sources, rows.scored_tokens(), 3).astype(np.int64)
    assert set(read.values()) == {1}
    for number, (source, count) in enumerate(zip(reading.sources, reading.mixture.counts(num_steps), strict=True)):
        size = source.order.num_windows
        per_epoch = Counter(epoch for place, epoch, _ in read if place == number)
        whole_epochs, rest = divmod(count, size)
        assert per_epoch == Counter(
            {**dict.fromkeys(range(whole_epochs), size), **({whole_epochs: rest} if rest else {})}
        )
        if packing != "concatenate":
            of_rest = source.order.windows(np.arange(whole_epochs * size, count))
            packed = source.packing.rows(np.zeros_like(of_rest), of_rest, document_mask=False)
            assert tokens[number] == whole_epochs * source.shards.num_tokens + packed.num_scored.sum()
        else:
            assert tokens[number] == count * reading.sequence_tokens
    assert reading.epochs(num_steps) == {
        source.name: count / source.order.num_windows
        for source, count in zip(reading.sources, reading.mixture.counts(num_steps), strict=True)
    }


@pytest.mark.parametrize("packing", PACKINGS)
@given(segment=st.integers(1, 12), data=st.data())
@settings(max_examples=15)
def test_a_source_that_joins_changes_no_step_before(sources: Sources, packing: str, segment: int, data) -> None:
    names = data.draw(st.sampled_from(["abc", "acb", "cab"]))
    before = sources.reading(packing, [(0, {"a": 2, "b": 1})], names="ab")
    after = sources.reading(packing, [(0, {"a": 2, "b": 1}), (segment, {"c": 1, "a": 1})], names=names)
    assert after.order_hash(range(segment)) == before.order_hash(range(segment))
    assert after.order_hash(range(segment + 1)) != before.order_hash(range(segment + 1))


@pytest.mark.parametrize("ranks", [1, 2, 4, 8, 32, 64])
@pytest.mark.parametrize("num_lane_rows", [1, 3])
def test_a_cell_is_read_by_one_rank(sources: Sources, ranks: int, num_lane_rows: int) -> None:
    """Where ranks divide the lanes and a step has equally many rows of each: as long as its epoch lasts."""
    reading = sources.reading("concatenate", [(0, {"a": 1})], names="a", sequence_tokens=1, cell_windows=2)
    reading.sequences_per_step = reading.mixture.sequences_per_step = LANES * num_lane_rows
    num_windows = reading.sources[0].order.num_windows
    body = num_windows // (2 * LANES) * 2 * LANES
    assert 4 < body / LANES < num_windows / LANES
    readers: dict[int, set[int]] = {}
    for step in range(body // reading.sequences_per_step):
        for rank in range(ranks):
            own = reading.rank_rows(ranks, rank)
            assert len(own) == reading.sequences_per_step / ranks
            for window in reading.places(range(step, step + 1), own).windows[0].tolist():
                readers.setdefault(window // 2, set()).add(rank)
    assert {len(ranks_) for ranks_ in readers.values()} == {1}
    assert sorted({rank for ranks_ in readers.values() for rank in ranks_}) == list(range(ranks))


def test_by_size_every_source_is_read_at_the_same_rate(sources: Sources) -> None:
    reading = sources.reading("concatenate", MIXED)
    sizes = {source.name: source.packing.num_windows for source in reading.sources}
    by_size = Reading(reading.sources, segments_by_size(sizes), 7, 20)
    epochs = by_size.epochs(1000)
    assert max(epochs.values()) - min(epochs.values()) < 2 / min(sizes.values())


def test_a_single_source_is_the_mixture_of_itself(sources: Sources) -> None:
    alone = sources.reading("concatenate", [(0, {"a": 1})], names="a")
    among = sources.reading("concatenate", [(0, {"a": 0.25})])
    assert alone.order_hash(range(20)) == among.order_hash(range(20))
