import hashlib
import itertools
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from llm_dist.data import local
from llm_dist.data.chunks import Chunks
from llm_dist.data.folder import BLOCK_TOKENS
from llm_dist.data.index import open_shards
from llm_dist.data.local import LocalTokens
from llm_dist.data.shards import ShardWriter
from llm_dist.errors import UserError
from tests.unit.data.tiny_shards import SEPARATOR, write_shards

LENGTHS = [5, 0, 30, 17, 200, 1, 63, 64, 9, 11, 130, 2, 2, 40]
"""Among them an empty document, one that fills a chunk of 64 exactly and two that go on over several chunks."""


def documents(seed: int = 0) -> list[list[int]]:
    # Ids include the separator's: borders must come from the index.
    return [np.random.default_rng(seed + i).integers(0, 280, n).tolist() for i, n in enumerate(LENGTHS)]


@pytest.fixture(scope="module", params=["uint16", "uint32"])
def written(request, tmp_path_factory, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("shards") / request.param
    stream = write_shards(folder, documents(), tiny_tokenizer, dtype=request.param)
    shards = open_shards(folder)
    yield shards, stream
    shards.close()


@pytest.fixture
def folder(tmp_path: Path, tiny_tokenizer: Path) -> Path:
    write_shards(tmp_path / "train", documents(), tiny_tokenizer)
    return tmp_path / "train"


def circle(stream: np.ndarray, start: int, count: int) -> np.ndarray:
    return stream[(start + np.arange(count)) % len(stream)]


def test_counts(written) -> None:
    shards, stream = written
    assert shards.num_tokens == len(stream) == sum(LENGTHS) + len(LENGTHS)
    assert shards.num_documents == len(LENGTHS)
    assert shards.num_bytes == 3 * len(stream)
    assert len(shards.chunks) > 4
    assert len(shards.dataset["shards"]) > 2
    assert shards.tokenizer_folder.is_dir()


@given(start=st.integers(0, 3000), count=st.integers(0, 1500))
def test_tokens_are_the_circular_stream(written, start: int, count: int) -> None:
    shards, stream = written
    tokens = shards.tokens(start, count)
    assert tokens.dtype == shards.dtype
    np.testing.assert_array_equal(tokens, circle(stream, start, count))


@given(starts=st.lists(st.integers(0, 3000), max_size=20), count=st.integers(1, 1500))
def test_gather_is_many_times_tokens(written, starts: list[int], count: int) -> None:
    shards, stream = written
    out = np.full((len(starts), count), -1, np.int64)
    shards.gather(np.array(starts, np.int64), count, out)
    for row, start in zip(out, starts, strict=True):
        np.testing.assert_array_equal(row, circle(stream, start, count))


@given(start=st.integers(0, 3000), count=st.integers(0, 1500))
def test_document_starts_come_from_the_index(written, start: int, count: int) -> None:
    shards, stream = written
    begins = np.zeros(len(stream), np.bool_)
    begins[np.cumsum([0, *(length + 1 for length in LENGTHS[:-1])])] = True
    assert (stream[begins] == SEPARATOR).all()
    assert (stream == SEPARATOR).sum() > begins.sum(), "some separators must be plain tokens for this test to mean much"
    np.testing.assert_array_equal(shards.document_starts(start, count), np.flatnonzero(circle(begins, start, count)))


def test_a_piece_of_one_chunk_is_mapped_not_copied(written) -> None:
    tokens = written[0].tokens(3, 20)
    assert not tokens.flags.owndata
    assert not tokens.flags.writeable


def test_few_maps_stay_open(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "MAX_OPEN_SHARDS", 2)
    shards = open_shards(folder)
    everything = shards.tokens(0, shards.num_tokens)
    assert isinstance(shards._reader, LocalTokens)
    assert len(shards._reader._maps) == 2
    np.testing.assert_array_equal(everything, shards.tokens(0, shards.num_tokens))


def test_threads_share_a_shard_set(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "MAX_OPEN_SHARDS", 1)
    shards = open_shards(folder)
    stream = np.array(shards.tokens(0, shards.num_tokens))
    starts = np.random.default_rng(0).integers(0, shards.num_tokens, (40, 8))

    def read(rows: np.ndarray) -> np.ndarray:
        out = np.empty((len(rows), 50), np.int64)
        shards.gather(rows, 50, out)
        return out

    with ThreadPoolExecutor(4) as threads:
        for rows, out in zip(starts, threads.map(read, starts), strict=True):
            np.testing.assert_array_equal(out, [circle(stream, start, 50) for start in rows.tolist()])


def test_close_twice_and_arrays_outlive_it(folder: Path) -> None:
    shards = open_shards(folder)
    tokens = shards.tokens(0, 10)
    before = tokens.copy()
    shards.close()
    shards.close()
    np.testing.assert_array_equal(tokens, before)
    with pytest.raises(AssertionError, match="closed"):
        shards.tokens(0, 10)


def change(folder: Path, **changes: object) -> None:
    dataset = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(dataset | changes))


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 0x10
    path.write_bytes(content)


def swap_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer" / "llm_dist_tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fingerprint": "0" * 64}))


def exchange(folder: Path, name: str) -> None:
    """Put another folder's file, as good as this one's, in its place."""
    write_shards(folder.parent / "other", documents(1)[::-1], folder / "tokenizer")
    shutil.copy(folder.parent / "other" / name, folder / name)


def swap_tables(folder: Path) -> None:
    (folder / "index.npy").rename(folder / "index.bak")
    (folder / "checksums.npy").rename(folder / "index.npy")
    (folder / "index.bak").rename(folder / "checksums.npy")


def rewrite(folder: Path, name: str, changed: Callable[[np.ndarray], np.ndarray]) -> None:
    """A table that is wrong under its right sha256: what a faulty writer would leave."""
    np.save(folder / f"{name}.npy", changed(np.load(folder / f"{name}.npy")))
    sha256 = hashlib.sha256((folder / f"{name}.npy").read_bytes()).hexdigest()
    change(folder, **{f"{name}_sha256": sha256})


def moved(field: str, chunk: int, by: int) -> Callable[[np.ndarray], np.ndarray]:
    def move(rows: np.ndarray) -> np.ndarray:
        rows[field][chunk] += by
        return rows

    return move


DAMAGES = {
    "no dataset.json": (lambda f: (f / "dataset.json").unlink(), r"unfinished, .*run the same llm-dist tokenize again"),
    "not JSON": (lambda f: (f / "dataset.json").write_text("{"), r"dataset.json: not JSON"),
    "other format": (lambda f: change(f, format=1), r"format 1, this version reads format 2"),
    "no dtype": (lambda f: change(f, dtype="float32"), r"dtype='float32' must be one of uint16, uint32"),
    "other counts": (lambda f: change(f, num_tokens=7), r"num_tokens=7 but its shards sum to 588"),
    "shard gone": (lambda f: (f / "shard-000001.tar").unlink(), r"shard-000001.tar: the shard is missing"),
    "shard cut": (lambda f: (f / "shard-000001.tar").write_bytes(b"x"), r"shard-000001.tar: truncated, 1 bytes"),
    "index gone": (lambda f: (f / "index.npy").unlink(), r"index.npy: missing"),
    "index flipped": (lambda f: flip(f / "index.npy", 140), r"index.npy: .*sha256"),
    "index of another folder": (lambda f: exchange(f, "index.npy"), r"index.npy: .*sha256"),
    "index cut": (lambda f: (f / "index.npy").write_bytes(b""), r"index.npy: .*sha256"),
    "checksums gone": (lambda f: (f / "checksums.npy").unlink(), r"checksums.npy: missing"),
    "checksums flipped": (lambda f: flip(f / "checksums.npy", 132), r"checksums.npy: .*sha256"),
    "checksums of another folder": (lambda f: exchange(f, "checksums.npy"), r"checksums.npy: .*sha256"),
    "index and checksums exchanged": (swap_tables, r"index.npy: .*sha256"),
    "index too short": (lambda f: rewrite(f, "index", lambda r: r[:-1]), r"index.npy: 13 chunks, dataset.json says 14"),
    "index of format 1": (
        lambda f: rewrite(f, "index", lambda r: np.zeros((len(r), 6), "<u8")),
        r"index.npy: not of format 2",
    ),
    "checksums too short": (
        lambda f: rewrite(f, "checksums", lambda c: c[:-1]),
        r"checksums.npy: 13 blocks, index.npy says 14",
    ),
    "another number of tokens": (
        lambda f: rewrite(f, "index", moved("num_tokens", 3, 1)),
        r"index.npy: num_tokens of shard-000001.tar sums to 129, dataset.json says 128",
    ),
    "another number of bytes": (
        lambda f: rewrite(f, "index", moved("num_bytes", 0, 5)),
        r"index.npy: num_bytes of shard-000000.tar sums to",
    ),
    "tokens elsewhere": (
        lambda f: rewrite(f, "index", moved("token_offset", 3, 8)),
        r"index.npy: chunk 3 does not fit",
    ),
    "ends elsewhere": (lambda f: rewrite(f, "index", moved("docs_offset", 2, 1 << 20)), r"index.npy: chunk 2 does not"),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), r"tokenizer: the shards' tokenizer is missing"),
    "other tokenizer": (swap_tokenizer, r"fingerprint 000000000000, but the tokens were made with"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_opening_names_what_is_wrong(folder: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    open_shards(folder).close()
    damage(folder)
    with pytest.raises(UserError, match=message) as raised:
        open_shards(folder)
    assert "\n" not in str(raised.value)
    assert "; " in str(raised.value), "a way out"


def test_what_is_no_shard_folder(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"folder of two; name {folder}"):
        open_shards(folder.parent)
    with pytest.raises(UserError, match="no such shard folder"):
        open_shards(tmp_path / "nowhere")
    with pytest.raises(UserError, match="a file, not a shard folder"):
        open_shards(folder / "dataset.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"has no dataset\.json"):
        open_shards(tmp_path / "empty")


def test_a_flipped_token_is_named_at_first_touch(folder: Path) -> None:
    chunks = open_shards(folder).chunks
    damaged = 3  # chunk 1 of shard 1
    flip(folder / "shard-000001.tar", int(chunks.rows["token_offset"][damaged]) + 2)
    shards = open_shards(folder)
    first = int(chunks.first_token[damaged])
    shards.tokens(0, first)
    message = r"shard-000001.tar: chunk 1 is damaged \(tokens: checksum differs\)"
    for _ in range(2):
        with pytest.raises(UserError, match=message):
            shards.tokens(first, 1)
        with pytest.raises(UserError, match=message):
            shards.gather(np.array([first - 5]), 10, np.empty((1, 10), np.int64))
    shards.document_starts(first, 10)


B = BLOCK_TOKENS


@pytest.fixture
def large(tmp_path: Path, tiny_tokenizer: Path) -> tuple[Path, np.ndarray]:
    """Two chunks of three blocks each, whose last is partial: 190,053 and 150,001 tokens."""
    draw = np.random.default_rng(0)
    texts = [draw.integers(0, 280, length).tolist() for length in (100_000, 90_000, 50, 150_000)]
    stream = write_shards(tmp_path / "large", texts, tiny_tokenizer, chunk_tokens=200_000)
    return tmp_path / "large", stream


def flip_token(folder: Path, chunk: int, token: int) -> None:
    """Damage a token of the only shard."""
    flip(folder / "shard-000000.tar", int(open_shards(folder).chunks.rows["token_offset"][chunk]) + 2 * token)


@pytest.mark.parametrize(
    ("start", "count", "is_whole"),
    [
        (0, B, True),
        (B - 7, 7, True),
        (B - 7, 8, False),
        (B + 100, 1, False),
        (2 * B - 1, 1, False),
        (2 * B - 1, 2, False),
        (2 * B, 1000, True),
        (2 * B, 190_053 - 2 * B + 150_001 + B, True),  # to the end, and round to the first block
        (B - 1, B + 2, False),
        (340_054 - 1, 2 + B, False),  # round, and one token too far
    ],
)
def test_damage_is_found_in_its_block_alone(
    large: tuple[Path, np.ndarray], start: int, count: int, is_whole: bool
) -> None:
    folder, stream = large
    flip_token(folder, 0, B + 777)
    out = np.empty((2, count), np.int64)
    readers = {
        "tokens": lambda shards: shards.tokens(start, count),
        "gather": lambda shards: shards.gather(np.array([start, start]), count, out),
    }
    for name, read in readers.items():
        shards = open_shards(folder)
        # What is proved already must not vouch for a block between.
        shards.tokens(0, B)
        shards.tokens(2 * B, 5)
        if is_whole:
            found = read(shards) if name == "tokens" else (read(shards), out[1])[1]
            np.testing.assert_array_equal(found, circle(stream, start, count))
        for _ in range(0 if is_whole else 2):
            with pytest.raises(UserError, match=r"shard-000000.tar: chunk 0 is damaged \(tokens: checksum differs"):
                read(shards)


def test_a_block_is_proved_once_and_alone(large: tuple[Path, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    proved: list[tuple[int, int]] = []
    is_whole = Chunks.block_is_whole

    def noting(chunks: Chunks, chunk: int, block: int, tokens: memoryview) -> bool:
        proved.append((chunk, block))
        return is_whole(chunks, chunk, block, tokens)

    monkeypatch.setattr(Chunks, "block_is_whole", noting)
    shards = open_shards(large[0])
    shards.tokens(B + 5, 100)
    shards.gather(np.array([B + 50, 2 * B - 100]), 100, np.empty((2, 100), np.int64))
    assert proved == [(0, 1)]
    shards.gather(np.array([190_053 + 140_000, B]), 100, np.empty((2, 100), np.int64))
    assert proved == [(0, 1), (1, 2)]
    shards.tokens(0, shards.num_tokens)
    assert sorted(proved) == [(chunk, block) for chunk in range(2) for block in range(3)]
    assert len(proved) == 6


@pytest.mark.parametrize("block", range(6))
def test_a_changed_checksum_is_as_bad_as_a_changed_token(large: tuple[Path, np.ndarray], block: int) -> None:
    folder, _ = large
    rewrite(folder, "checksums", lambda checksums: checksums ^ (np.arange(6) == block).astype("<u4"))
    shards = open_shards(folder)
    firsts = [0, B, 2 * B, 190_053, 190_053 + B, 190_053 + 2 * B]
    for number, first in enumerate(firsts):
        if number != block:
            shards.tokens(first, 10)
    with pytest.raises(UserError, match=rf"chunk {block // 3} is damaged \(tokens"):
        shards.tokens(firsts[block], 10)


def test_flipped_document_ends_are_named_at_first_touch(folder: Path) -> None:
    shards = open_shards(folder)
    flip(folder / "shard-000000.tar", int(shards.chunks.rows["docs_offset"][0]))
    shards = open_shards(folder)
    shards.tokens(0, 10)
    with pytest.raises(UserError, match=r"shard-000000.tar: chunk 0 is damaged \(document ends"):
        shards.document_starts(0, 10)


@pytest.mark.parametrize("stored, stated", [("uint32", "uint16"), ("uint16", "uint32")])
def test_another_dtype_is_named_before_use(tmp_path: Path, tiny_tokenizer: Path, stored: str, stated: str) -> None:
    write_shards(tmp_path / "tiny", documents(), tiny_tokenizer, dtype=stored)
    change(tmp_path / "tiny", dtype=stated)
    with pytest.raises(UserError, match=rf"chunk 0 is damaged \(tokens: stored as {stored}, not {stated}\)"):
        open_shards(tmp_path / "tiny").tokens(0, 1)
    write_shards(tmp_path / "large", [[9] * 5000], tiny_tokenizer, dtype=stored, chunk_tokens=8192)
    change(tmp_path / "large", dtype=stated)
    with pytest.raises(UserError, match=rf"index.npy: chunk 0 does not fit .*{stated}"):
        open_shards(tmp_path / "large")


def test_every_byte_of_every_chunk_is_under_a_checksum(written, large: tuple[Path, np.ndarray]) -> None:
    for shards, stream in (written, (open_shards(large[0]), large[1])):
        chunks = shards.chunks
        bounds = chunks.first_token.tolist()
        assert (bounds[0], bounds[-1]) == (0, len(stream))
        blocks = [
            stream[start : min(start + B, end)].astype(shards.dtype)
            for first, end in itertools.pairwise(bounds)
            for start in range(first, end, B)
        ]
        assert chunks.checksums.tolist() == [xxh3_64_intdigest(block.data) for block in blocks]
        for chunk, crc in enumerate(chunks.rows["docs_checksum"].tolist()):
            assert crc == xxh3_64_intdigest(shards.document_ends(chunk).data)


@settings(max_examples=8)
@given(lengths=st.lists(st.integers(0, 150), min_size=1, max_size=12), chunk_tokens=st.sampled_from([16, 64]))
def test_the_writer_writes_what_is_read(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path, lengths: list[int], chunk_tokens: int
) -> None:
    folder = tmp_path_factory.mktemp("written")
    writer = ShardWriter(folder, 280, "f", chunk_tokens=chunk_tokens, shard_bytes=4096)
    texts = [np.array([SEPARATOR, *range(length)], np.int64) for length in lengths]
    for text in texts:
        writer.add(text, 2 * len(text))
    writer.close(sorted(tiny_tokenizer.iterdir()), {})
    fingerprint = json.loads((tiny_tokenizer / "llm_dist_tokenizer.json").read_text())["fingerprint"]
    change(folder, tokenizer=fingerprint)
    shards = open_shards(folder)
    np.testing.assert_array_equal(shards.tokens(0, shards.num_tokens), np.concatenate(texts))
    begins = np.cumsum([0, *(len(text) for text in texts)])
    np.testing.assert_array_equal(shards.document_starts(0, shards.num_tokens), begins[:-1])
    assert (shards.num_documents, shards.num_bytes) == (len(texts), 2 * shards.num_tokens)
    shards.close()
