"""Rows of tokens as they stand in the text, whichever way documents are laid into sequences."""

import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_dist.data import packing as module
from llm_dist.data.index import ShardSet, open_shards
from llm_dist.data.packing import BestFit, Concatenated, Packing
from llm_dist.errors import UserError
from llm_dist.rows import Rows
from tests.unit.data.tiny_reading import Stream, packed, write_source

LENGTHS = [30, 3, 200, 0, 17, 63, 64, 9, 0, 0, 19, 20, 39, 1, 150, 41, 7, 12]
"""Of documents without their separators: over many chunks, of exactly one, of exactly a sequence of 20, empty."""
PACKINGS = ("concatenate", "best_fit", "separate")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packing")


@pytest.fixture(scope="module")
def stream(folder: Path, tiny_tokenizer: Path) -> Stream:
    return write_source(folder / "train", tiny_tokenizer, LENGTHS)


@pytest.fixture(scope="module")
def shards(folder: Path, stream: Stream):
    shards = open_shards(folder / "train")
    yield shards
    shards.close()


def everything(packing: Packing, epoch: int) -> Rows:
    """All rows of an epoch, window by window."""
    windows = np.arange(packing.num_windows)
    return packing.rows(np.full_like(windows, epoch), windows, document_mask=True)


def positions(packing: Packing, epoch: int, window: int, num_tokens: int) -> np.ndarray:
    """Where in the stream each scored token of a row stands, told by its spans."""
    spans = packing.spans(epoch, window)
    assert [span.row_token for span in spans] == np.cumsum([0, *(span.num_tokens for span in spans[:-1])]).tolist()
    return np.concatenate([np.arange(span.start, span.start + span.num_tokens) for span in spans]) % num_tokens


@pytest.mark.parametrize("kind", PACKINGS)
@settings(max_examples=40)
@given(sequence_tokens=st.integers(1, 120), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 50))
def test_what_follows_is_the_next_token_of_the_text(shards, stream, folder, kind, sequence_tokens, seed, epoch) -> None:
    """Inside documents, at their ends, at a piece's border, across chunks, past the circle's end; padding is zeros."""
    packing = packed(shards, kind, sequence_tokens, seed, folder)
    rows = everything(packing, epoch)
    assert rows.inputs.shape == rows.following.shape == (packing.num_windows, sequence_tokens)
    assert rows.inputs.dtype == rows.following.dtype == np.int64
    assert (rows.num_scored is not None) == packing.is_padded
    for window in range(packing.num_windows):
        places = positions(packing, epoch, window, shards.num_tokens)
        end = int(rows.scored_tokens()[window])
        assert end == len(places)
        np.testing.assert_array_equal(rows.inputs[window, :end], stream.tokens[places])
        np.testing.assert_array_equal(rows.following[window, :end], np.roll(stream.tokens, -1)[places])
        assert not rows.inputs[window, end:].any() and not rows.following[window, end:].any()


@pytest.mark.parametrize("kind", PACKINGS)
@settings(max_examples=40)
@given(sequence_tokens=st.integers(1, 120), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 50))
def test_no_token_is_read_twice_in_an_epoch(shards, folder, kind, sequence_tokens, seed, epoch) -> None:
    packing = packed(shards, kind, sequence_tokens, seed, folder)
    read = np.zeros(shards.num_tokens, np.int64)
    for window in range(packing.num_windows):
        np.add.at(read, positions(packing, epoch, window, shards.num_tokens), 1)
    assert read.max() == 1
    left_out = int((read == 0).sum())
    assert left_out == (0 if packing.is_padded else shards.num_tokens % sequence_tokens)


@settings(max_examples=40)
@given(sequence_tokens=st.integers(1, 120), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 50))
def test_document_ids_of_the_stream_count_the_documents_begun(shards, stream, sequence_tokens, seed, epoch) -> None:
    packing = Concatenated(shards, sequence_tokens, seed)
    ids = everything(packing, epoch).document_ids
    for window in range(packing.num_windows):
        begun = np.cumsum(stream.is_start[positions(packing, epoch, window, shards.num_tokens)])
        np.testing.assert_array_equal(ids[window], begun)


@settings(max_examples=40)
@given(sequence_tokens=st.integers(1, 120))
def test_a_separate_window_is_of_one_document_and_says_which(shards, stream, folder, sequence_tokens) -> None:
    packing = packed(shards, "separate", sequence_tokens, 0, folder)
    document_of = np.cumsum(stream.is_start) - 1
    windows = np.arange(packing.num_windows)
    named = packing.documents(windows)
    for window in windows.tolist():
        places = positions(packing, 0, window, shards.num_tokens)
        assert set(document_of[places].tolist()) == {named[window]}
    assert len(windows) == sum(-(-(length + 1) // sequence_tokens) for length in LENGTHS) or stream_is_cut(shards)
    np.testing.assert_array_equal(packing.documents(windows[::-2]), named[::-2])
    assert everything(packing, 0).document_ids is None


def stream_is_cut(shards) -> bool:
    """Whether a document goes on over chunks: each of its parts has windows of its own."""
    return any(shards.chunks.continues(chunk) for chunk in range(len(shards.chunks)))


@settings(max_examples=40)
@given(sequence_tokens=st.integers(1, 120))
def test_a_bins_documents_and_its_padding_are_told_apart(shards, stream, folder, sequence_tokens) -> None:
    packing = BestFit(shards, sequence_tokens, folder)
    rows = everything(packing, 0)
    document_of = np.cumsum(stream.is_start)
    for window in range(packing.num_windows):
        places = positions(packing, 0, window, shards.num_tokens)
        ids, end = rows.document_ids[window], len(places)
        documents = document_of[places]
        assert len(set(documents.tolist())) <= ids[end - 1] + 1
        begins = np.flatnonzero(np.diff(ids[:end])) + 1
        spans = packing.spans(0, window)
        assert begins.tolist() == [span.row_token for span in spans[1:]]
        assert all(
            len(set(documents[first:last].tolist())) == 1 for first, last in itertools.pairwise([0, *begins, end])
        )
        assert set(ids[end:].tolist()) <= {ids[end - 1] + 1}
        assert stream.is_start[[span.start for span in spans if sequence_tokens > max(LENGTHS)]].all()


@pytest.mark.parametrize("kind", PACKINGS)
@settings(max_examples=40)
@given(sequence_tokens=st.integers(1, 60), seed=st.integers(0, 9), data=st.data())
def test_any_windows_of_any_epochs_are_read_together(shards, folder, kind, sequence_tokens, seed, data) -> None:
    packing = packed(shards, kind, sequence_tokens, seed, folder)
    window, epoch = st.integers(0, packing.num_windows - 1), st.integers(0, 3)
    windows = np.array(data.draw(st.lists(window, max_size=12)), np.int64)
    epochs = np.array(data.draw(st.lists(epoch, min_size=len(windows), max_size=len(windows))), np.int64)
    rows = packing.rows(epochs, windows, document_mask=True)
    assert rows.inputs.shape == (len(windows), sequence_tokens)
    for row, place in enumerate(zip(epochs, windows, strict=True)):
        alone = packing.rows(*(np.array([each]) for each in place), document_mask=True)
        for ours, theirs in zip(rows[:4], alone[:4], strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                np.testing.assert_array_equal(ours[row], theirs[0])
    assert packing.rows(epochs, windows, document_mask=False).document_ids is None


@pytest.mark.parametrize("kind", PACKINGS)
@pytest.mark.parametrize("sequence_tokens", [1, 7, 20, 64])
def test_a_cell_holds_all_that_its_windows_read(shards, folder, monkeypatch, kind, sequence_tokens) -> None:
    monkeypatch.setattr(module, "CELL_TOKENS", 100)
    packing = packed(shards, kind, sequence_tokens, 3, folder)
    assert packing.cell_windows == 100 // sequence_tokens
    for epoch in range(3):
        for window in range(packing.num_windows):
            start, count = packing.cell(epoch, window // packing.cell_windows)
            places = positions(packing, epoch, window, shards.num_tokens)
            assert ((places - start) % shards.num_tokens < count - 1).all(), "and the token behind each"


@given(num_tokens=st.integers(1, 3000), sequence_tokens=st.integers(1, 60), seed=st.integers(0, 2**63 - 1))
def test_what_concatenation_leaves_out_is_shorter_than_a_sequence(num_tokens, sequence_tokens, seed) -> None:
    shards = SimpleNamespace(num_tokens=num_tokens, folder="shards/train")
    if num_tokens < sequence_tokens:
        with pytest.raises(UserError, match=r"^shards/train has \d+ tokens, fewer than data\.sequence_tokens=\d+; "):
            Concatenated(shards, sequence_tokens, seed)  # type: ignore[arg-type]
        return
    packing = Concatenated(shards, sequence_tokens, seed)  # type: ignore[arg-type]
    windows = np.arange(packing.num_windows)
    for epoch in range(3):
        starts = packing.starts(np.full_like(windows, epoch), windows)
        places = (starts[:, None] + np.arange(sequence_tokens)) % num_tokens
        assert len(np.unique(places)) == places.size > num_tokens - sequence_tokens


def test_a_source_shorter_than_a_sequence_fits_a_bin(tmp_path: Path, tiny_tokenizer: Path) -> None:
    stream = write_source(tmp_path / "train", tiny_tokenizer, [4, 0])
    packing = BestFit(open_shards(tmp_path / "train"), 20, tmp_path)
    rows = everything(packing, 0)
    assert (packing.num_windows, rows.num_scored.tolist()) == (1, [6])
    np.testing.assert_array_equal(rows.inputs[0, :6], stream.tokens)
    with pytest.raises(UserError, match=r"fewer than data\.sequence_tokens=20"):
        Concatenated(open_shards(tmp_path / "train"), 20, seed=0)


def test_bins_of_many_chunks_are_counted_once(shards: ShardSet, tmp_path: Path, monkeypatch) -> None:
    fresh = everything(BestFit(shards, 20, tmp_path), 0)
    assert not list(tmp_path.iterdir()), "few chunks are not worth it"
    monkeypatch.setattr(module, "_CHUNKS_WORTH_KEEPING", 2)
    counted = BestFit(shards, 20, tmp_path)
    assert [path.name for path in (tmp_path / "bins").iterdir()] == [f"{shards.fingerprint}-20-v1.npy"]
    with monkeypatch.context() as patch:
        patch.setattr(module, "plan_bins", lambda *_: pytest.fail("counted again"))
        kept = BestFit(shards, 20, tmp_path)
    assert kept.num_windows == counted.num_windows
    np.testing.assert_array_equal(everything(kept, 0).inputs, fresh.inputs)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/bins: cannot be written \(.*\); choose another data\.cache"):
        BestFit(shards, 20, tmp_path / "file")


@pytest.mark.parametrize("damage", [lambda content: b"", lambda content: content[:-5]], ids=["empty", "cut"])
def test_a_count_of_bins_that_is_not_whole_is_made_again(shards: ShardSet, tmp_path: Path, monkeypatch, damage) -> None:
    monkeypatch.setattr(module, "_CHUNKS_WORTH_KEEPING", 2)
    num_windows = BestFit(shards, 20, tmp_path).num_windows
    (path,) = (tmp_path / "bins").iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert BestFit(shards, 20, tmp_path).num_windows == num_windows
    assert path.read_bytes() == whole
    np.save(path, np.load(path)[:-1])
    assert BestFit(shards, 20, tmp_path).num_windows == num_windows
