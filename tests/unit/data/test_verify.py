import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from xxhash import xxh3_64_intdigest

from llm_dist.data.folder import BLOCK_TOKENS, INDEX_ROW
from llm_dist.data.verify import Damage, verify
from llm_dist.errors import UserError
from tests.unit.data.tiny_shards import write_shards


@pytest.fixture
def folder(tmp_path: Path, tiny_tokenizer: Path) -> Path:
    documents = [np.random.default_rng(n).integers(8, 280, n).tolist() for n in (20, 30, 40, 200, 7, 60, 50)]
    write_shards(tmp_path / "train", documents, tiny_tokenizer, vocabulary_tokens=280)
    return tmp_path / "train"


def change(folder: Path, **changes: object) -> None:
    dataset = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(dataset | changes))


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 0x10
    path.write_bytes(content)


def row(folder: Path, shard: int, chunk: int) -> np.void:
    rows: np.ndarray = np.load(folder / "index.npy")
    assert rows.dtype == INDEX_ROW
    shards = json.loads((folder / "dataset.json").read_text())["shards"]
    return rows[sum(each["num_chunks"] for each in shards[:shard]) + chunk]


def test_a_whole_folder_has_no_damage(folder: Path) -> None:
    assert verify(folder) == []


def test_all_damage_is_named_at_once(folder: Path) -> None:
    flip(folder / "shard-000000.tar", int(row(folder, 0, 1)["token_offset"]))
    flip(folder / "shard-000001.tar", int(row(folder, 1, 0)["docs_offset"]))
    (folder / "shard-000002.tar").unlink()
    last = int(row(folder, 0, 1)["num_tokens"]) - 1
    assert verify(folder) == [
        Damage("shard-000000.tar", "sha256 differs"),
        Damage("shard-000000.tar", f"checksum of tokens 0-{last} differs", 1),
        Damage("shard-000001.tar", "sha256 differs"),
        Damage("shard-000001.tar", "checksum of the document ends differs", 0),
        Damage("shard-000002.tar", "missing"),
    ]


EXCHANGES = [("index.npy", "spare"), ("checksums.npy", "index.npy"), ("spare", "checksums.npy")]
OTHER = "not the one dataset.json names (sha256)"
TABLES = {
    "index gone": (lambda f: (f / "index.npy").unlink(), [Damage("index.npy", "missing")]),
    "index flipped": (lambda f: flip(f / "index.npy", 150), [Damage("index.npy", OTHER)]),
    "checksums gone": (lambda f: (f / "checksums.npy").unlink(), [Damage("checksums.npy", "missing")]),
    "checksums flipped": (lambda f: flip(f / "checksums.npy", 130), [Damage("checksums.npy", OTHER)]),
    "both gone": (
        lambda f: [(f / name).unlink() for name in ("index.npy", "checksums.npy")],
        [Damage("index.npy", "missing"), Damage("checksums.npy", "missing")],
    ),
    "both exchanged": (
        lambda f: [(f / one).rename(f / other) for one, other in EXCHANGES],
        [Damage("index.npy", OTHER), Damage("checksums.npy", OTHER)],
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_damaged_tables_are_named_beside_damaged_shards(folder: Path, name: str) -> None:
    damage, expected = TABLES[name]
    damage(folder)
    assert verify(folder) == expected
    with (folder / "shard-000001.tar").open("ab") as file:
        file.write(b"x")
    size = (folder / "shard-000001.tar").stat().st_size
    assert verify(folder) == [
        *expected,
        Damage("shard-000001.tar", f"too long: {size} of {size - 1} bytes"),
        Damage("shard-000001.tar", "sha256 differs"),
    ]


def test_without_checksums_the_document_ends_are_still_proved(folder: Path) -> None:
    (folder / "checksums.npy").unlink()
    flip(folder / "shard-000001.tar", int(row(folder, 1, 0)["docs_offset"]))
    assert Damage("shard-000001.tar", "checksum of the document ends differs", 0) in verify(folder)


def test_damage_names_the_range_of_tokens(tmp_path: Path, tiny_tokenizer: Path) -> None:
    folder, block = tmp_path / "large", BLOCK_TOKENS
    texts = [np.random.default_rng(n).integers(8, 280, n).tolist() for n in (9, 6 * block, 2 * block + 3)]
    write_shards(folder, texts, tiny_tokenizer, chunk_tokens=7 * block, vocabulary_tokens=280)
    assert verify(folder) == []
    rows = np.load(folder / "index.npy")
    assert rows["num_tokens"].tolist() == [6 * block + 11, 2 * block + 4]
    for chunk, token in ((0, 5), (0, 2 * block), (0, 3 * block + 1), (0, 6 * block), (1, block), (1, 2 * block + 3)):
        flip(folder / "shard-000000.tar", int(rows["token_offset"][chunk]) + 2 * token)
    flip(folder / "shard-000000.tar", int(rows["docs_offset"][1]))
    assert verify(folder) == [
        Damage("shard-000000.tar", "sha256 differs"),
        Damage("shard-000000.tar", f"checksum of tokens 0-{block - 1} differs", 0),
        Damage("shard-000000.tar", f"checksum of tokens {2 * block}-{4 * block - 1} differs", 0),
        Damage("shard-000000.tar", f"checksum of tokens {6 * block}-{6 * block + 10} differs", 0),
        Damage("shard-000000.tar", f"checksum of tokens {block}-{2 * block + 3} differs", 1),
        Damage("shard-000000.tar", "checksum of the document ends differs", 1),
    ]


def test_a_truncated_shard_still_tells_which_chunks_are_left(folder: Path) -> None:
    path = folder / "shard-000001.tar"
    size = path.stat().st_size
    kept = int(row(folder, 1, 1)["token_offset"]) + 8
    path.write_bytes(path.read_bytes()[:kept])
    assert verify(folder) == [
        Damage("shard-000001.tar", f"truncated: {kept} of {size} bytes"),
        Damage("shard-000001.tar", "sha256 differs"),
        Damage("shard-000001.tar", "cut off", 1),
    ]


def test_an_empty_shard(folder: Path) -> None:
    (folder / "shard-000000.tar").write_bytes(b"")
    assert {damage.what.split(":")[0] for damage in verify(folder)} == {"truncated", "sha256 differs", "cut off"}


def test_damaged_document_ends_and_headers(folder: Path) -> None:
    flip(folder / "shard-000000.tar", int(row(folder, 0, 0)["docs_offset"]))
    header = int(row(folder, 0, 1)["token_offset"]) - 128
    content = (folder / "shard-000000.tar").read_bytes()
    position = content.index(b"<u2", header)
    flip(folder / "shard-000000.tar", position)
    assert [(damage.what, damage.chunk) for damage in verify(folder)] == [
        ("sha256 differs", None),
        ("checksum of the document ends differs", 0),
        ("stored as something unreadable, dataset.json says uint16", 1),
    ]


@pytest.mark.parametrize(
    "changes, file, what",
    [
        ({"dtype": "uint32"}, "dataset.json", "do not give the fingerprint"),
        ({"dtype": "uint32"}, "shard-000000.tar", "stored as uint16, dataset.json says uint32"),
        ({"num_bytes": 1}, "dataset.json", "num_bytes=1 but its shards sum to"),
        ({"vocabulary_tokens": 200}, "shard-000000.tar", "is outside the vocabulary of 200"),
        ({"tokenizer": "0" * 64}, "tokenizer", "the tokens were made with 000000000000"),
    ],
)
def test_what_dataset_json_says_is_proved(folder: Path, changes: dict[str, object], file: str, what: str) -> None:
    change(folder, **changes)
    assert any(damage.file == file and what in damage.what for damage in verify(folder))


def test_a_changed_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text().replace('"ignore_merges":false', '"ignore_merges":true').replace("quick", "quack"))
    definition = json.loads(path.read_text())
    definition["added_tokens"][0]["content"] = "<|changed|>"
    path.write_text(json.dumps(definition))
    assert [damage.file for damage in verify(folder)] == ["tokenizer"]


def rewrite_ends(folder: Path, ends: Callable[[np.ndarray], np.ndarray]) -> None:
    """Document ends that are wrong under right checksums: what a faulty writer would leave."""
    path = folder / "shard-000000.tar"
    rows = np.load(folder / "index.npy")
    content = bytearray(path.read_bytes())
    first = int(rows[0]["docs_offset"])
    stored = np.frombuffer(content, "<u4", int(rows[0]["num_documents"]), first).copy()
    wrong = ends(stored).astype("<u4")
    content[first : first + wrong.nbytes] = wrong.tobytes()
    rows["docs_checksum"][0] = xxh3_64_intdigest(wrong.tobytes())
    path.write_bytes(content)
    np.save(folder / "index.npy", rows)
    dataset = json.loads((folder / "dataset.json").read_text())
    dataset["shards"][0]["sha256"] = hashlib.sha256(content).hexdigest()
    dataset["index_sha256"] = hashlib.sha256((folder / "index.npy").read_bytes()).hexdigest()
    (folder / "dataset.json").write_text(json.dumps(dataset))


@pytest.mark.parametrize(
    "ends", [lambda e: e[::-1], lambda e: e - e[0], lambda e: e + 1, lambda e: np.full_like(e, e[-1])]
)
def test_document_ends_must_rise_to_the_number_of_tokens(folder: Path, ends) -> None:
    assert row(folder, 0, 0)["num_documents"] > 1
    rewrite_ends(folder, ends)
    assert Damage("shard-000000.tar", "document ends do not rise to the number of tokens", 0) in verify(folder)


def test_without_dataset_json_nothing_can_be_proved(folder: Path) -> None:
    (folder / "dataset.json").unlink()
    with pytest.raises(UserError, match="unfinished"):
        verify(folder)
