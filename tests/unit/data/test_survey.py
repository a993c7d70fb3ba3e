from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_dist import tokenizer
from llm_dist.data.survey import sources, survey
from llm_dist.data.tokenize import tokenize
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
    assert found.sources == [], "not recorded"
    assert sum(shard["num_tokens"] for shard in found.shards) == len(stream)


def test_shuffle_ratio_tells_sorted_from_shuffled(tmp_path: Path, tiny_tokenizer: Path) -> None:
    lengths = np.random.default_rng(0).lognormal(2, 1, 64 * 60).astype(int) + 1
    ratios = {}
    for name, order in {"shuffled": lengths, "sorted": np.sort(lengths)}.items():
        write_shards(tmp_path / name, [[9] * n for n in order.tolist()], tiny_tokenizer, chunk_tokens=4096)
        ratios[name] = survey(tmp_path / name, num_samples=0).shuffle_ratio
    assert 0.6 < ratios["shuffled"] < 1.5
    assert ratios["sorted"] > 30


def test_sources_are_what_each_file_gave_to_the_part(tmp_path: Path, tiny_tokenizer: Path) -> None:
    texts = {"a": ["the fox"] * 60, "b": ["the dog", "", "jumps"], "c": ["over the lazy dog"] * 150}
    for name, lines in texts.items():
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    inputs = [str(tmp_path / f"{name}.txt") for name in texts]
    tokenize(inputs, tiny_tokenizer, tmp_path / "out", split="line", holdout=0.2, workers=1)
    parts = [survey(tmp_path / "out" / part) for part in ("train", "holdout")]
    for part in parts:
        for key in ("num_documents", "num_tokens", "num_bytes"):
            assert sum(getattr(source, key) for source in part.sources) == getattr(part, key)
        assert [source.num_tokens for source in part.sources] == sorted(
            (source.num_tokens for source in part.sources), reverse=True
        )
    tokenizer_ = tokenizer.load(tiny_tokenizer)
    for name, lines in texts.items():
        given = [source for part in parts for source in part.sources if source.name == f"{name}.txt"]
        kept = [line for line in lines if line]
        assert sum(source.num_documents for source in given) == len(kept)
        assert sum(source.num_bytes for source in given) == len("".join(kept))
        assert sum(source.num_tokens for source in given) == sum(len(tokenizer_.encode(line)) + 1 for line in kept)


def made_from(**files: int) -> dict[str, Any]:
    counts = list(files.values())
    record = dict.fromkeys(("num_documents", "num_tokens", "num_bytes"), counts)
    return {"made_from": {"inputs": [{"name": name} for name in files], "sources": record}}


def test_many_files_are_shown_by_folder_and_the_smallest_summed() -> None:
    folders = {f"corpus/en/{number}.txt": 2 for number in range(20)} | {"corpus/de/sub/a.txt": 3, "corpus/b.txt": 50}
    assert [(source.name, source.num_tokens) for source in sources(made_from(**folders))] == [
        ("corpus/b.txt", 50),
        ("corpus/en", 40),
        ("corpus/de", 3),
    ]
    flat = sources(made_from(**{f"corpus/{number:02d}.txt": number for number in range(30)}))
    assert [source.num_tokens for source in flat] == [*range(29, 9, -1), sum(range(10))]
    assert flat[-1].name == "10 others"
    assert sources({}) == []


def test_no_shard_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a shard folder"):
        survey(tmp_path)
