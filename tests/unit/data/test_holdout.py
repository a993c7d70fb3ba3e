from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_dist.data.holdout import HoldoutWindows
from llm_dist.data.index import ShardSet, open_shards
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
    targets = []
    for index in range(windows.num_windows):
        window = windows.window(index)
        assert window.tokens.shape == (sequence_tokens + 1,)
        assert window.tokens.dtype == np.int64
        assert 0 < window.num_scored <= sequence_tokens
        targets.extend(window.tokens[1 : window.num_scored + 1].tolist())
    stream = shards.tokens(0, shards.num_tokens).tolist()
    assert targets == [*stream[1:], SEPARATOR]
    assert targets.count(SEPARATOR) == len(LENGTHS), "each document's end"
    assert windows.num_scored_tokens == len(targets) == sum(LENGTHS) + len(LENGTHS) == shards.num_tokens
    assert windows.num_bytes == shards.num_bytes


@given(sequence_tokens=st.integers(1, 400))
def test_padding_is_the_closing_separator(shards: ShardSet, sequence_tokens: int) -> None:
    windows = HoldoutWindows(shards, sequence_tokens, document_mask=True)
    last = windows.window(windows.num_windows - 1)
    assert set(last.tokens[last.num_scored :].tolist()) == {SEPARATOR}
    assert last.document_ids is not None
    assert len(set(last.document_ids[last.num_scored :].tolist())) == 1
    assert last.document_ids[last.num_scored] == last.document_ids[last.num_scored - 1] + 1


@given(sequence_tokens=st.integers(1, 100))
def test_document_ids_follow_the_borders(shards: ShardSet, sequence_tokens: int) -> None:
    windows = HoldoutWindows(shards, sequence_tokens, document_mask=True)
    for index in range(windows.num_windows):
        window = windows.window(index)
        assert window.document_ids is not None
        scored = slice(0, window.num_scored + 1)
        np.testing.assert_array_equal(window.document_ids[scored], np.cumsum(window.tokens[scored] == SEPARATOR))


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
