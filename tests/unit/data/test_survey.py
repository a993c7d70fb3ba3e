from pathlib import Path

import numpy as np
import pytest

from llm_dist import tokenizer
from llm_dist.data.survey import survey
from llm_dist.errors import UserError
from tests.unit.data.tiny_shards import write_shards


def test_counts_lengths_and_samples(tmp_path: Path, tiny_tokenizer: Path) -> None:
    texts = ["the lazy dog", "fox", "", "jumps " * 60, "the quick brown fox " * 3]
    ids = tokenizer.load(tiny_tokenizer).encode_batch(texts)
    stream = write_shards(tmp_path / "train", ids, tiny_tokenizer, chunk_tokens=32)
    found = survey(tmp_path / "train", num_samples=2, sample_tokens=1000)
    lengths = np.array([len(document) + 1 for document in ids])
    assert (found.num_documents, found.num_tokens) == (5, len(stream))
    assert found.mean_tokens == lengths.mean()
    assert found.median_tokens == np.median(lengths)
    assert sum(found.length_histogram.values()) == 5
    for edge, count in found.length_histogram.items():
        assert count == ((lengths >= edge) & (lengths < 2 * edge)).sum()
    assert found.bytes_per_token == found.num_bytes / len(stream)
    assert found.samples[0] == texts[0]
    assert set(found.samples) < set(texts)
    assert found.shuffle_ratio is None, "too few documents to say"
    assert sum(shard["num_tokens"] for shard in found.shards) == len(stream)


def test_shuffle_ratio_tells_sorted_from_shuffled(tmp_path: Path, tiny_tokenizer: Path) -> None:
    lengths = np.random.default_rng(0).lognormal(2, 1, 64 * 60).astype(int) + 1
    ratios = {}
    for name, order in {"shuffled": lengths, "sorted": np.sort(lengths)}.items():
        write_shards(tmp_path / name, [[9] * n for n in order.tolist()], tiny_tokenizer, chunk_tokens=4096)
        ratios[name] = survey(tmp_path / name, num_samples=0).shuffle_ratio
    assert 0.6 < ratios["shuffled"] < 1.5
    assert ratios["sorted"] > 30


def test_no_shard_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a shard folder"):
        survey(tmp_path)
