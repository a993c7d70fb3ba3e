from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_dist.data.holdout import HoldoutWindows
from llm_dist.data.index import ShardSet, open_shards
from llm_dist.rows import Rows
from tests.unit.data.tiny_shards import SEPARATOR, write_shards

LENGTHS = [30, 3, 100, 0, 17, 80, 9]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path):
    folder = tmp_path_factory.mktemp("holdout")
    # Every token differs from all others, so that it can be counted.
    ids = iter(range(1, 1000))
    write_shards(folder, [[next(ids) for _ in range(n)] for n in LENGTHS], tiny_tokenizer)
    shards = open_shards(folder)
    yield shards
    shards.close()


@given(sequence_tokens=st.integers(1, 400), document_mask=st.booleans())
def test_every_token_is_scored_once_and_every_document_closed(shards, sequence_tokens, document_mask) -> None:
    windows = HoldoutWindows(shards, sequence_tokens, document_mask)
    rows = windows.rows(range(windows.num_windows))
    assert rows.inputs.shape == rows.following.shape == (windows.num_windows, sequence_tokens)
    assert rows.inputs.dtype == rows.following.dtype == np.int64
    assert rows.num_scored.min() > 0
    assert rows.num_scored.max() <= sequence_tokens
    assert (rows.document_ids is not None) == document_mask
    stream = shards.tokens(0, shards.num_tokens).tolist()
    assert scored(rows, rows.inputs) == stream
    assert (targets := scored(rows, rows.following)) == [*stream[1:], SEPARATOR]
    assert targets.count(SEPARATOR) == len(LENGTHS), "each document's end"
    assert windows.num_scored_tokens == len(targets) == sum(LENGTHS) + len(LENGTHS) == shards.num_tokens
    assert windows.num_bytes == shards.num_bytes


def scored(rows: Rows, tokens: np.ndarray) -> list[int]:
    return tokens[np.arange(tokens.shape[1]) < rows.num_scored[:, None]].tolist()


@given(
    sequence_tokens=st.integers(1, 100), first=st.integers(0, 30), step=st.integers(1, 4), document_mask=st.booleans()
)
def test_any_windows_are_read_alike_alone_and_together(shards, sequence_tokens, first, step, document_mask) -> None:
    windows = HoldoutWindows(shards, sequence_tokens, document_mask)
    everything = windows.rows(range(windows.num_windows))
    chosen = range(windows.num_windows)[first::step]
    rows = windows.rows(chosen)
    assert rows.num_rows == len(chosen)
    for ours, whole in zip(rows[:4], everything[:4], strict=True):
        assert (ours is None) == (whole is None)
        if ours is not None:
            np.testing.assert_array_equal(ours, whole[list(chosen)])


@given(sequence_tokens=st.integers(1, 400))
def test_padding_is_the_closing_separator(shards: ShardSet, sequence_tokens: int) -> None:
    windows = HoldoutWindows(shards, sequence_tokens, document_mask=True)
    last = windows.num_windows - 1
    rows = windows.rows(range(last, last + 1))
    end = int(rows.num_scored[0])
    assert set(rows.following[0, end - 1 :].tolist()) == {SEPARATOR}
    assert set(rows.inputs[0, end:].tolist()) <= {SEPARATOR}
    if end < sequence_tokens:
        assert len(set(rows.document_ids[0, end:].tolist())) == 1
        assert rows.document_ids[0, end] == rows.document_ids[0, end - 1] + 1


@given(sequence_tokens=st.integers(1, 100))
def test_document_ids_follow_the_borders(shards: ShardSet, sequence_tokens: int) -> None:
    windows = HoldoutWindows(shards, sequence_tokens, document_mask=True)
    rows = windows.rows(range(windows.num_windows))
    for ids, inputs, end in zip(rows.document_ids, rows.inputs, (rows.num_scored + 1).tolist(), strict=True):
        np.testing.assert_array_equal(ids[:end], np.cumsum(inputs == SEPARATOR)[:end])


@settings(max_examples=50)
@given(sequence_tokens=st.integers(1, 60), max_sequences=st.integers(1, 40))
def test_fewer_windows_are_spread_evenly(shards: ShardSet, sequence_tokens: int, max_sequences: int) -> None:
    everything = HoldoutWindows(shards, sequence_tokens)
    windows = HoldoutWindows(shards, sequence_tokens, max_sequences=max_sequences)
    assert windows.num_windows == min(max_sequences, everything.num_windows)
    share = windows.num_scored_tokens / shards.num_tokens
    assert windows.num_bytes == round(shards.num_bytes * share)
    starts = (windows._starts // sequence_tokens).tolist()
    assert len(set(starts)) == len(starts)
    gaps = np.diff([*starts, everything.num_windows])
    assert gaps.max() - gaps.min() <= 1
