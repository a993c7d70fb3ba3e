"""Shards behind a URL are read as the same folder on a disk is, whatever the network and the cache do meanwhile."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from llm_dist.data import fetch, remote
from llm_dist.data.folder import BLOCK_TOKENS
from llm_dist.data.loader import Loader
from llm_dist.data.order import Order
from llm_dist.data.packing import BestFit, Concatenated
from llm_dist.data.places import is_url, open_place
from llm_dist.data.reading import Reading, Source, segments_by_size
from llm_dist.errors import UserError
from llm_dist.rows import Rows
from tests.object_server import Fault, Kind, ObjectServer
from tests.s3_server import S3Server, require_packages
from tests.unit.data.test_cache import bytes_in
from tests.unit.data.tiny_reading import assert_same, laid_together
from tests.unit.data.tiny_shards import write_shards

SEQUENCE_TOKENS, SEQUENCES_PER_STEP, CELL_WINDOWS = 512, 24, 8
BLOCK_BYTES = 2 * BLOCK_TOKENS
AMPLE, TINY = 1.0, 2.5 * BLOCK_BYTES / 1e9
"""Gigabytes: all of it, and two blocks of 34."""
MOST_BYTES_PER_NEEDED = 1.1
WAYS = [("concatenate", False), ("concatenate", True), ("best_fit", True)]
EPOCH_STEPS = 132
STEPS = range(EPOCH_STEPS + 12)

READ = """
import sys
from pathlib import Path
from tests.unit.data.test_remote import reading_of
url, cache, gigabytes, first, end = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]), *map(int, sys.argv[4:])
reading = reading_of([url], "concatenate", True, cache, gigabytes)
print(reading.order_hash(range(first, end)))
reading.close()
"""


def write_corpus(folder: Path, tokenizer: Path, num_tokens: int, seed: int) -> None:
    """Documents of all lengths, one of them longer than two chunks; a chunk has three blocks, a shard two chunks."""
    draw = np.random.default_rng(seed)
    lengths = draw.lognormal(6, 1.2, num_tokens // 800).astype(int) + 1
    lengths[len(lengths) // 2] = 320_000 if num_tokens > 10**6 else 5000
    documents = [draw.integers(1, 60_000, length).tolist() for length in lengths]
    write_shards(folder, documents, tokenizer, chunk_tokens=150_000, vocabulary_tokens=60_000)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    folder = tmp_path_factory.mktemp("remote")
    write_corpus(folder / "train", tiny_tokenizer, 1_300_000, seed=0)
    write_corpus(folder / "other", tiny_tokenizer, 250_000, seed=1)
    return folder


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    require_packages("aiohttp")
    monkeypatch.setattr(fetch, "LONGEST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(remote, "_OPENING_PAUSE_SECONDS", 0.01)


@pytest.fixture
def unhedged(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine asks twice, and these tests count."""
    monkeypatch.setattr(fetch, "_FIRST_PATIENCE_SECONDS", 30.0)
    monkeypatch.setattr(fetch, "_HEDGE_SECONDS", (30.0, 30.0))


@pytest.fixture
def server(corpora: Path) -> Iterator[ObjectServer]:
    with ObjectServer(corpora) as server:
        yield server


@pytest.fixture
def changeable(corpora: Path, tmp_path: Path) -> Iterator[ObjectServer]:
    """Serves a copy of its own."""
    shutil.copytree(corpora / "train", tmp_path / "served" / "train")
    with ObjectServer(tmp_path / "served") as server:
        yield server


def reading_of(
    places: Sequence[object], packing: str, document_mask: bool, cache: Path, gigabytes: float = AMPLE
) -> Reading:
    """A reading in cells so small that there are many."""
    sources = []
    for place in map(str, places):
        shards = open_place(place, cache, gigabytes)
        windows: Any = (
            BestFit(shards, SEQUENCE_TOKENS, cache)
            if packing == "best_fit"
            else Concatenated(shards, SEQUENCE_TOKENS, seed=4)
        )
        windows.cell_windows = CELL_WINDOWS
        sources.append(Source(str(len(sources)), shards, windows, Order(windows.num_windows, CELL_WINDOWS, seed=4)))
    weights = segments_by_size({source.name: source.packing.num_windows for source in sources})
    return Reading(sources, weights, SEQUENCES_PER_STEP, SEQUENCE_TOKENS, document_mask=document_mask)


def rows_of(reading: Reading, steps: range, ranks: int = 1, workers: int = 1) -> list[Rows]:
    """Every step's rows as its ranks read them, laid together."""
    parts: list[list[Rows]] = []
    for rank in range(ranks):
        with Loader(reading, ranks, rank, workers=workers, first_step=steps.start) as loader:
            parts.append([loader.rows(step) for step in steps])
    reading.close()
    return [laid_together(each) for each in zip(*parts, strict=True)]


@pytest.fixture(scope="module")
def local(corpora: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Rows]]:
    """`local(packing, document_mask)`: the rows of STEPS in the folder on this disk."""
    known: dict[tuple[str, bool], list[Rows]] = {}

    def rows(packing: str = "concatenate", document_mask: bool = False) -> list[Rows]:
        way = packing, document_mask
        if way not in known:
            reading = reading_of([corpora / "train"], *way, tmp_path_factory.mktemp("local"))
            known[way] = rows_of(reading, STEPS, workers=0)
        return known[way]

    return rows


def assert_all_same(rows: Sequence[Rows], others: Sequence[Rows]) -> None:
    for ours, theirs in zip(rows, others, strict=True):
        assert_same(ours, theirs)


def shard_requests(server: ObjectServer | S3Server, since: int = 0) -> list[Any]:
    return [asked for asked in server.requests[since:] if asked.path.endswith(".tar")]


@pytest.fixture(params=["http", "s3"])
def remote_folder(
    request: pytest.FixtureRequest, corpora: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, Any]]:
    """URL of the corpus, and its server."""
    if request.param == "http":
        with ObjectServer(corpora) as server:
            yield f"{server.url}/train", server
        return
    require_packages("s3fs", "moto", "flask", "flask_cors")
    with S3Server(corpora / "train") as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server.url, server


@pytest.mark.parametrize(("packing", "document_mask"), WAYS)
def test_rows_are_those_of_the_folder(
    remote_folder: tuple[str, Any],
    local: Callable[..., list[Rows]],
    tmp_path: Path,
    unhedged: None,
    packing: str,
    document_mask: bool,
) -> None:
    """Cold, warm, and with a cache of two blocks; an epoch and more; ranks that share a cache."""
    (url, server), expected = remote_folder, local(packing, document_mask)
    way, cache, small = (packing, document_mask), tmp_path / "cache", tmp_path / "small"
    assert_all_same(rows_of(reading_of([url], *way, cache), STEPS, ranks=2), expected)
    before = len(server.requests)
    assert_all_same(rows_of(reading_of([url], *way, cache), STEPS, ranks=3, workers=2), expected)
    assert [asked.path.rpartition("/")[2] for asked in server.requests[before:]] == ["dataset.json"]
    at_the_end = range(EPOCH_STEPS - 1, EPOCH_STEPS + 1)
    for ranks, workers, steps in ((1, 0, range(3)), (2, 2, at_the_end))[: 1 if url.startswith("s3") else 2]:
        reading = reading_of([url], *way, small, TINY)
        assert_all_same(rows_of(reading, steps, ranks, workers), expected[steps.start : steps.stop])
        assert bytes_in(small / "blocks") <= TINY * 1e9


def test_a_mixture_may_lie_anywhere(
    corpora: Path, server: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_packages("s3fs", "moto", "flask", "flask_cors")
    steps, folders = range(40), [corpora / "other", corpora / "train", corpora / "other"]
    with S3Server(corpora / "other") as s3:
        for name, value in s3.environment.items():
            monkeypatch.setenv(name, value)
        expected = rows_of(reading_of(folders, "concatenate", True, tmp_path), steps, workers=0)
        assert {int(each) for rows in expected for each in rows.sources} == {0, 1, 2}
        for places in ([folders[0], f"{server.url}/train", s3.url], [s3.url, folders[1], f"{server.url}/other/"]):
            reading = reading_of(places, "concatenate", True, tmp_path / "cache")
            assert reading.is_remote == any(is_url(str(place)) for place in places)
            assert_all_same(rows_of(reading, steps, ranks=2, workers=2), expected)


def test_an_epoch_asks_for_ranges_and_hardly_more_than_it_needs(
    corpora: Path, server: ObjectServer, tmp_path: Path, unhedged: None
) -> None:
    """At most 1.1 times: each block comes once, and beside it come the tables."""
    rows_of(reading_of([f"{server.url}/train"], "concatenate", True, tmp_path), range(EPOCH_STEPS))
    asked = shard_requests(server)
    sizes = {f"/train/{path.name}": path.stat().st_size for path in (corpora / "train").glob("*.tar")}
    assert {each.path for each in asked} == sizes.keys()
    assert all(each.method == "GET" and each.end - each.start < sizes[each.path] for each in asked)
    assert max(each.end - each.start for each in asked) <= 3 * BLOCK_BYTES
    needed = EPOCH_STEPS * SEQUENCES_PER_STEP * SEQUENCE_TOKENS * 2
    assert sum(each.end - each.start for each in asked) <= MOST_BYTES_PER_NEEDED * needed
    names = [each.path.rpartition("/")[2] for each in server.requests if each not in asked]
    assert sorted(names) == sorted({*names}) and len(names) == 6  # dataset.json, two tables, the tokenizer's three


def test_tables_are_kept_by_fingerprint_and_a_damaged_one_is_fetched_again(
    server: ObjectServer, tmp_path: Path
) -> None:
    url = f"{server.url}/train"
    fingerprint = open_place(url, tmp_path).fingerprint
    before = len(server.requests)
    shards = open_place(url, tmp_path)
    assert [asked.path for asked in server.requests[before:]] == ["/train/dataset.json"]
    assert shards.tokenizer_folder == tmp_path / "remote" / fingerprint / "tokenizer"
    for name in ("index.npy", "tokenizer/tokenizer.json"):
        before = len(server.requests)
        path = tmp_path / "remote" / fingerprint / name
        content = path.read_bytes()
        path.unlink() if name.startswith("tok") else path.write_bytes(content[:-1])
        open_place(url, tmp_path)
        assert path.read_bytes() == content
        assert [asked.path for asked in server.requests[before:]] == ["/train/dataset.json", f"/train/{name}"]


def test_a_block_that_was_damaged_on_this_disk_is_fetched_again(
    server: ObjectServer, tmp_path: Path, local: Callable[..., list[Rows]]
) -> None:
    def read() -> list[Rows]:
        return rows_of(reading_of([f"{server.url}/train"], "concatenate", True, tmp_path), range(8))

    read()
    for path in (tmp_path / "blocks").rglob("*-*"):
        path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    assert_all_same(read(), local("concatenate", True)[:8])


@pytest.mark.parametrize("gigabytes", [AMPLE, TINY])
def test_processes_share_a_cache(
    corpora: Path, server: ObjectServer, tmp_path: Path, unhedged: None, gigabytes: float
) -> None:
    """Two at a time, then one more that finds all of it there."""
    steps = range(20) if gigabytes == AMPLE else range(2)
    local = reading_of([corpora / "train"], "concatenate", True, tmp_path)
    expected = local.order_hash(steps)

    def start() -> subprocess.Popen[str]:
        words = [server.url + "/train", tmp_path / "cache", gigabytes, steps.start, steps.stop]
        command = [sys.executable, "-c", READ, *map(str, words)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3])

    assert [each.communicate()[0].split() for each in [start(), start()]] == [[expected]] * 2
    before = len(server.requests)
    assert start().communicate()[0].split() == [expected]
    assert bool(shard_requests(server, before)) == (gigabytes == TINY)
    local.close()


def at_first(kind: Kind) -> Callable[..., Fault | None]:
    """The first answer for each range of a shard goes wrong."""
    known, lock = set(), threading.Lock()

    def fault(number: int, path: str, start: int | None, end: int | None) -> Fault | None:
        with lock:
            is_first = path.endswith(".tar") and (path, start, end) not in known
            known.add((path, start, end))
        return Fault(kind) if is_first else None

    return fault


@pytest.mark.parametrize("kind", get_args(Kind))
def test_faults_that_pass_change_nothing(
    server: ObjectServer, tmp_path: Path, local: Callable[..., list[Rows]], monkeypatch: pytest.MonkeyPatch, kind: Kind
) -> None:
    monkeypatch.setattr(fetch, "_FIRST_PATIENCE_SECONDS", 0.2)
    server.faults = at_first(kind)
    monkeypatch.setattr(fetch, "_DEADLINE_PATIENCES", 600)
    began = time.monotonic()
    reading = reading_of([f"{server.url}/train"], "concatenate", True, tmp_path)
    assert_all_same(rows_of(reading, range(20)), local("concatenate", True)[:20])
    assert len(shard_requests(server)) > 20
    assert time.monotonic() - began < fetch.DEADLINE_SECONDS / 2, "a request that hangs was waited for"


@pytest.mark.parametrize("seed", range(4))
def test_a_storm_of_faults_changes_nothing(
    server: ObjectServer, tmp_path: Path, local: Callable[..., list[Rows]], monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """A fifth of all answers is wrong in some way, those to the start's requests too."""
    monkeypatch.setattr(fetch, "_FIRST_PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr(fetch, "_WHOLE_FILE_PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr(fetch, "DEADLINE_SECONDS", 2.0)
    monkeypatch.setattr(remote, "_ARRIVALS", 6)  # three damaged answers in a row do happen in thousands
    draw, lock = random.Random(seed), threading.Lock()

    def fault(number: int, path: str, start: int | None, end: int | None) -> Fault | None:
        with lock:
            kind, is_wrong = draw.choice(get_args(Kind)), draw.random() < 0.2
        if not is_wrong or (kind == "corrupt" and path.endswith("dataset.json")):  # which nothing proves
            return None
        return Fault(kind, seconds=5.0, keep=draw.choice([None, 1]) if kind == "reset" else None)

    server.faults = fault
    gigabytes, steps = (AMPLE, STEPS) if seed % 2 else (TINY, range(4))
    way = WAYS[seed % len(WAYS)]
    reading = reading_of([f"{server.url}/train"], *way, tmp_path, gigabytes)
    assert_all_same(rows_of(reading, steps, ranks=2), local(*way)[: len(steps)])


def test_damage_at_the_source_is_one_line_for_those_who_read_it(
    changeable: ObjectServer, tmp_path: Path, unhedged: None
) -> None:
    """It is asked for three times; what came with it is as good as ever."""
    shards = open_place(f"{changeable.url}/train", tmp_path / "cache")
    row = shards.chunks.rows[3]  # the second of shard 1
    path = changeable.folder / "train" / "shard-000001.tar"
    content = bytearray(path.read_bytes())
    for at in (int(row["token_offset"]) + BLOCK_BYTES + 1000, int(row["docs_offset"]) + 2):
        content[at] ^= 1
    path.write_bytes(content)
    first = int(shards.chunks.first_token[3])
    shards.prefetch(first, 150_000)
    shards.prefetch(first, 150_000)
    for _ in range(2):
        assert len(shards.tokens(first + 100, 50_000)) == len(shards.tokens(first + 140_000, 5000)) * 10
        before = len(changeable.requests)
        said = rf"^{changeable.url}/train/shard-000001\.tar: chunk 1 is damaged \(tokens: checksum differs\); restore"
        with pytest.raises(UserError, match=said) as raised:
            shards.tokens(first + BLOCK_TOKENS - 5, 10)
        assert "\n" not in str(raised.value)
        assert 0 < len(shard_requests(changeable, before)) <= 2 * 3
        with pytest.raises(UserError, match=r"shard-000001\.tar: chunk 1 is damaged \(document ends: checksum diff"):
            shards.document_ends(3)
    shards.close()


def test_a_shard_that_cannot_be_had_is_one_line(changeable: ObjectServer, tmp_path: Path) -> None:
    reading = reading_of([f"{changeable.url}/train"], "concatenate", False, tmp_path / "cache")
    shards = list((changeable.folder / "train").glob("*.tar"))

    def assert_said(said: str) -> None:
        for workers in (0, 2):
            with Loader(reading, 1, 0, workers=workers, first_step=0) as loader:
                for _ in range(2):
                    with pytest.raises(UserError, match=rf"^{changeable.url}/train/shard-00000\d\.tar: {said}"):
                        loader.rows(0)

    changeable.faults = lambda *_: Fault("status", status=403)
    assert_said(r"may not be read \(status 403\); check the URL and the credentials$")
    changeable.faults = lambda *_: None
    for path in shards:
        path.write_bytes(path.read_bytes()[:100])
    assert_said(r"shorter than it should be \(status 416\); upload the file again$")
    for path in shards:
        path.unlink()
    assert_said("not there; check the URL, or upload the file again$")
    reading.close()


def test_a_server_that_goes_in_mid_run_ends_it_with_one_line(
    corpora: Path, tmp_path: Path, local: Callable[..., list[Rows]]
) -> None:
    with ObjectServer(corpora) as server:
        url = f"{server.url}/train"
        reading = reading_of([url], "concatenate", False, tmp_path / "cache", TINY)
        loader = Loader(reading, 1, 0, workers=1, first_step=0)
        assert_same(loader.rows(0), local()[0])
    with pytest.raises(UserError, match=rf"^{url}/shard-00000\d\.tar: {fetch.ATTEMPTS} attempts failed, the last wi"):
        for step in range(1, 50):
            assert_same(loader.rows(step), local()[step])
    loader.close()
    reading.close()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"<html>Welcome</html>", "dataset.json: not JSON"),
        (b"\xff\xfe", "dataset.json: not JSON"),
        (b'{"format": 1}', "dataset.json: format 1, this version reads format 2; tokenize again"),
        (b'{"format": 2, "dtype": "uint16"}', "dataset.json: tokenizer, .*shards is missing"),
        (None, r"dataset.json: not there; .*\(llm-dist tokenize makes shard folders; copy one there as it is\)$"),
    ],
)
def test_what_is_no_shard_folder_is_one_line(
    changeable: ObjectServer, tmp_path: Path, content: bytes | None, said: str
) -> None:
    path = changeable.folder / "train" / "dataset.json"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match=f"^{changeable.url}/train/{said}") as raised:
        open_place(f"{changeable.url}/train", tmp_path / "cache")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["index.npy", "checksums.npy", "tokenizer/tokenizer.json"])
def test_a_table_of_another_folder_is_one_line(changeable: ObjectServer, tmp_path: Path, name: str) -> None:
    path = changeable.folder / "train" / name
    path.write_bytes(path.read_bytes().replace(b"the", b"thy") if name.startswith("tok") else path.read_bytes()[:-8])
    said = rf"^{changeable.url}/train/{name}: not the one that dataset\.json was written with; upload the whole folder"
    with pytest.raises(UserError, match=said):
        open_place(f"{changeable.url}/train", tmp_path / "cache")


def test_another_dataset_under_the_same_url_is_read_as_such(
    changeable: ObjectServer, corpora: Path, tmp_path: Path
) -> None:
    """While a run reads, its blocks no longer fit their checksums; a new start reads what is there now."""
    served, cache = changeable.folder / "train", tmp_path / "cache"
    url, steps = f"{changeable.url}/train", range(6)
    running = open_place(url, cache)
    rows_of(reading_of([url], "concatenate", True, cache), STEPS)
    shutil.rmtree(served)
    shutil.copytree(corpora / "other", served)
    expected = rows_of(reading_of([corpora / "other"], "concatenate", True, tmp_path), steps)
    assert_all_same(rows_of(reading_of([url], "concatenate", True, cache), steps), expected)
    shutil.rmtree(cache / "blocks")
    with pytest.raises(UserError, match=r"chunk \d is damaged|shorter than it should be|bytes instead of|not there"):
        running.tokens(0, running.num_tokens)
    running.close()


def test_what_is_asked_for_overtakes_what_waits(
    server: ObjectServer, tmp_path: Path, unhedged: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "AHEAD_REQUESTS", 1)
    shards = open_place(f"{server.url}/train", tmp_path)
    server.faults = lambda number, path, start, end: Fault("hang") if path == "/train/shard-000000.tar" else None
    shards.prefetch(0, 2 * 150_000)
    shards.prefetch(2 * 150_000, 6 * 150_000)  # waits behind that
    with ThreadPoolExecutor(1) as threads:
        reading = threads.submit(shards.tokens, 5 * 150_000, 1000)
        assert len(reading.result(timeout=30)) == 1000
    shards.close()


def test_a_prefetch_that_fails_is_asked_for_again(changeable: ObjectServer, tmp_path: Path) -> None:
    """Its mistake is nobody's until somebody needs what it was to bring."""
    shards = open_place(f"{changeable.url}/train", tmp_path / "cache")
    path = changeable.folder / "train" / "shard-000002.tar"
    content, first = path.read_bytes(), int(shards.chunks.first_token[4])
    path.unlink()
    shards.prefetch(first, 50_000)
    while not shard_requests(changeable):
        time.sleep(0.01)
    with pytest.raises(UserError, match=r"shard-000002\.tar: not there"):
        shards.tokens(first, 10)
    path.write_bytes(content)
    assert len(shards.tokens(first, 10)) == 10
    shards.close()


def test_prefetching_what_was_read_before(server: ObjectServer, tmp_path: Path, unhedged: None) -> None:
    """It is in use again; if evicted it comes again, else later epochs would be read by one request at a time."""
    shards = open_place(f"{server.url}/train", tmp_path)
    shards.tokens(0, 1000)
    (block,) = (tmp_path / "blocks").rglob("*-*")
    os.utime(block, (5, 5))
    shards.prefetch(0, 1000)
    assert block.stat().st_mtime > 5
    block.unlink()
    shards.prefetch(0, 1000)
    deadline = time.monotonic() + 30
    while not block.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(shard_requests(server)) == 2
    shards.close()


def test_closing_waits_for_no_answer(server: ObjectServer, tmp_path: Path) -> None:
    reading = reading_of([f"{server.url}/train"], "concatenate", True, tmp_path)
    server.faults = lambda *_: Fault("hang")
    before = {thread for thread in threading.enumerate() if thread.name.startswith("data.")}
    loader = Loader(reading, 1, 0, workers=2, first_step=0)
    while not shard_requests(server):
        time.sleep(0.01)
    began = time.monotonic()
    reading.close()
    loader.close()
    reading.close()
    while {thread for thread in threading.enumerate() if thread.name.startswith("data.")} - before:
        time.sleep(0.01)
    assert time.monotonic() - began < 10
