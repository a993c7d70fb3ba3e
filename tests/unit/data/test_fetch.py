"""What goes wrong between a server and us costs time, never bytes; what cannot be mended is said in one line, soon."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest

from llm_dist.data import fetch
from llm_dist.data.fetch import ATTEMPTS, Fetcher, NotThere
from llm_dist.errors import UserError
from tests.object_server import Fault, ObjectServer
from tests.s3_server import S3Server, require_packages

DATA = bytes(range(256)) * 400
START, END = 1000, 61_000
PATIENCE_SECONDS = 0.15


@pytest.fixture(autouse=True)
def nothing_is_logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """asyncio logs the errors of requests that nobody waited for."""
    require_packages("aiohttp")
    yield
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "LONGEST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(fetch, "_FIRST_PATIENCE_SECONDS", PATIENCE_SECONDS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "one.bin").write_bytes(DATA)
    return tmp_path / "shards"


@pytest.fixture
def server(folder: Path) -> Iterator[ObjectServer]:
    with ObjectServer(folder) as server:
        yield server


@pytest.fixture
def fetcher(server: ObjectServer) -> Iterator[Fetcher]:
    fetcher = Fetcher(server.url)
    yield fetcher
    fetcher.close()


def first(faults: int, fault: Fault) -> Callable[..., Fault | None]:
    return lambda number, *_: fault if number < faults else None


def test_http_reads_ranges_and_files(server: ObjectServer, fetcher: Fetcher) -> None:
    assert fetcher.read("one.bin", START, END) == DATA[START:END]
    assert fetcher.read("one.bin") == DATA
    assert [(asked.method, asked.start, asked.end) for asked in server.requests] == [
        ("GET", START, END),
        ("GET", 0, None),
    ]


@pytest.mark.parametrize("protocol", ["file", "memory"])
def test_blocking_protocols_read_ranges_and_files(folder: Path, protocol: str) -> None:
    fsspec.filesystem("memory").pipe("/shards/one.bin", DATA)
    fetcher = Fetcher(f"{protocol}://{folder if protocol == 'file' else '/shards'}/")
    assert fetcher.read("one.bin", START, END) == DATA[START:END]
    assert fetcher.read("one.bin") == DATA
    with pytest.raises(NotThere, match=rf"^{protocol}://.*/none.bin: not there; check the URL"):
        fetcher.read("none.bin")
    fetcher.close()
    fetcher.close()


def test_s3_reads_with_one_request_each(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_packages("s3fs", "moto", "flask", "flask_cors")
    monkeypatch.setattr(fetch, "_FIRST_PATIENCE_SECONDS", 30.0)  # the first request imports half of botocore
    with S3Server(folder) as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        fetcher = Fetcher(server.url)
        assert fetcher.read("one.bin", START, END) == DATA[START:END]
        assert fetcher.read("one.bin") == DATA
        assert [(asked.method, asked.start, asked.end) for asked in server.requests] == [
            ("GET", START, END),
            ("GET", 0, None),
        ]
        with pytest.raises(NotThere, match=r"^s3://shards/corpus/none\.bin: not there"):
            fetcher.read("none.bin")
        with pytest.raises(UserError, match=r"one\.bin: refused \(.*requested range.*; check the URL"):
            fetcher.read("one.bin", len(DATA) + 5, len(DATA) + 9)
        assert fetcher._filesystem.config_kwargs["max_pool_connections"] > 32
        fetcher.close()


@pytest.mark.parametrize("kind", ["status", "short_body", "short_range", "whole_file", "reset"])
def test_a_fault_that_passes_is_retried(server: ObjectServer, fetcher: Fetcher, kind: Any) -> None:
    server.faults = first(ATTEMPTS - 1, Fault(kind, keep=500 if kind == "reset" else None))
    assert fetcher.read("one.bin", START, END) == DATA[START:END]
    assert len(server.requests) == ATTEMPTS


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 504])
def test_a_server_that_asks_to_come_again_is_asked_again(server: ObjectServer, fetcher: Fetcher, status: int) -> None:
    server.faults = first(2, Fault("status", status=status))
    assert fetcher.read("one.bin", START, END) == DATA[START:END]
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (Fault("status"), "ClientResponseError: 503, message='Service Unavailable', url='http://127[^ ]*one.bin'"),
        (Fault("short_body"), "ClientPayloadError: Response payload is not completed.*"),
        (Fault("short_range", keep=7), "7 bytes instead of 60000"),
        (Fault("whole_file"), "102400 bytes instead of 60000"),
    ],
)
def test_a_fault_that_stays_is_one_line(server: ObjectServer, fetcher: Fetcher, fault: Fault, text: str) -> None:
    server.faults = lambda *_: fault
    said = rf"^{server.url}/one.bin: {ATTEMPTS} attempts failed, the last with {text}; start again when the server answ"
    with pytest.raises(UserError, match=said) as raised:
        fetcher.read("one.bin", START, END)
    assert "\n" not in str(raised.value)
    assert len(server.requests) == ATTEMPTS


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (Fault("status", status=404), "not there; check the URL, or upload the file again"),
        (Fault("status", status=403), r"may not be read \(status 403\); check the URL and the credentials"),
        (Fault("status", status=401), r"may not be read \(status 401\); check the URL and the credentials"),
        (Fault("status", status=416), r"shorter than it should be \(status 416\); upload the file again"),
        (Fault("status", status=410), r"refused \(status 410\); check the URL and the file there"),
    ],
)
def test_what_asking_again_cannot_mend_is_said_at_once(
    server: ObjectServer, fetcher: Fetcher, fault: Fault, text: str
) -> None:
    server.faults = lambda *_: fault
    with pytest.raises(UserError, match=rf"^{server.url}/one\.bin: {text}$"):
        fetcher.read("one.bin", START, END)
    assert len(server.requests) == 1


def test_pauses_grow_and_are_drawn_at_random(server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[float, float]] = []
    monkeypatch.setattr(fetch, "LONGEST_PAUSE_SECONDS", 60.0)
    monkeypatch.setattr(fetch.random, "uniform", lambda low, high: drawn.append((low, high)) or 0.0)
    fetcher = Fetcher(server.url)
    server.faults = lambda *_: Fault("status")
    with pytest.raises(UserError):
        fetcher.read("one.bin", START, END)
    assert drawn == [(0, high) for high in pytest.approx([0.1, 0.4, 1.6, 6.4, 25.6, 60.0, 60.0]).expected]
    drawn.clear()
    with pytest.raises(UserError):
        fetcher.read("one.bin", longest_pause_seconds=1.0)
    assert max(high for _, high in drawn) == 1.0
    fetcher.close()


def test_nobody_listens(folder: Path) -> None:
    with ObjectServer(folder) as server:
        fetcher = Fetcher(server.url)
        fetcher.read("one.bin", START, END)
    with pytest.raises(UserError, match=rf"{ATTEMPTS} attempts failed, the last with ClientConnectorError: Cannot con"):
        fetcher.read("one.bin", START, END)
    fetcher.close()


def test_a_second_request_rescues_one_that_hangs(server: ObjectServer, fetcher: Fetcher) -> None:
    server.faults = first(1, Fault("hang"))
    began = time.monotonic()
    assert fetcher.read("one.bin", START, END) == DATA[START:END]
    assert PATIENCE_SECONDS <= time.monotonic() - began < 10
    assert len(server.requests) == 2


def test_the_first_good_answer_of_two_counts(server: ObjectServer, fetcher: Fetcher) -> None:
    """A late first one, a second that fails; then two that fail, and another attempt."""
    plan = [Fault("hang", seconds=3 * PATIENCE_SECONDS), Fault("status")]
    server.faults = lambda number, *_: plan[number] if number < len(plan) else None
    assert fetcher.read("one.bin", START, END) == DATA[START:END]
    assert len(server.requests) == 2

    def both_fail(number: int, *_: Any) -> Fault | None:
        return {2: Fault("hang", seconds=60), 3: Fault("status")}.get(number)

    server.faults = both_fail
    fetcher_too = Fetcher(server.url)
    began = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetch, "DEADLINE_SECONDS", 1.0)
        assert fetcher_too.read("one.bin", START, END) == DATA[START:END]
    assert time.monotonic() - began < 20
    assert len(server.requests) == 5
    fetcher_too.close()


def test_after_the_deadline_an_attempt_has_failed(
    server: ObjectServer, fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "DEADLINE_SECONDS", 0.25)
    server.faults = lambda *_: Fault("hang")
    with pytest.raises(UserError, match=rf"{ATTEMPTS} attempts failed, the last with TimeoutError: no answer within"):
        fetcher.read("one.bin", START, END)
    assert len(server.requests) <= 2 * ATTEMPTS


def test_requests_that_lost_are_ended(server: ObjectServer, fetcher: Fetcher) -> None:
    server.faults = first(1, Fault("hang"))
    fetcher.read("one.bin", START, END)
    deadline = time.monotonic() + 30
    session = fetcher._filesystem._session
    while session.connector._acquired and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not session.connector._acquired


def test_a_slow_network_is_not_asked_for_everything_twice(server: ObjectServer, fetcher: Fetcher) -> None:
    server.latency_seconds = 2 * PATIENCE_SECONDS
    with ThreadPoolExecutor(30) as threads:
        for _ in range(2):  # with too few answers known, all of them
            list(threads.map(lambda _: fetcher.read("one.bin", START, END), range(30)))
        before = len(server.requests)
        list(threads.map(lambda _: fetcher.read("one.bin", START, END), range(60)))
    assert len(server.requests) - before <= 60 + 30


def test_many_hanging_requests_do_not_teach_patience(fetcher: Fetcher, server: ObjectServer) -> None:
    server.latency_seconds = 0.03
    for _ in range(fetch._FEWEST_SAMPLES):
        fetcher.read("one.bin", START, END)
    at_first, _ = fetcher._patience_and_deadline(END)
    server.faults = lambda number, *_: Fault("hang") if number % 3 == 0 else None  # never two in a row
    for _ in range(60):
        fetcher.read("one.bin", START, END)
    assert fetcher._patience_and_deadline(END)[0] < 3 * at_first


def test_closing_ends_what_hangs(server: ObjectServer, fetcher: Fetcher) -> None:
    server.faults = lambda *_: Fault("hang")
    with ThreadPoolExecutor(4) as threads:
        reads = [threads.submit(fetcher.read, "one.bin", START, END) for _ in range(4)]
        while len(server.requests) < 4:
            time.sleep(0.01)
        began = time.monotonic()
        fetcher.close()
        for read in reads:
            with pytest.raises(RuntimeError, match=r"one\.bin: closed while it was read"):
                read.result()
        assert time.monotonic() - began < 10
    fetcher.close()


def test_closing_ends_a_pause_and_a_blocking_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    fetcher = Fetcher(f"file://{folder}")
    monkeypatch.setattr(fetcher._filesystem, "cat_file", lambda *_, **__: release.wait(60) and b"")
    with ThreadPoolExecutor(1) as threads:
        read = threads.submit(fetcher.read, "one.bin", START, END)
        fetcher.close()
        with pytest.raises(RuntimeError, match="closed"):
            read.result(timeout=30)
    release.set()


def test_many_threads_may_be_the_first(server: ObjectServer) -> None:
    fetcher, barrier = Fetcher(server.url), threading.Barrier(24)

    def read(number: int) -> bytes:
        barrier.wait()
        return fetcher.read("one.bin", number, 2000 + number)

    with ThreadPoolExecutor(24) as threads:
        assert list(threads.map(read, range(24))) == [DATA[number : 2000 + number] for number in range(24)]
    fetcher.close()


@pytest.mark.parametrize(
    ("url", "text"),
    [
        (
            "gs://bucket/train",
            r"^gs://bucket/train: gs needs a package that is missing \(.*gcsfs.*\); pip install 'llm_",
        ),
        ("nowhere://a/b", r"^nowhere://a/b: Protocol not known: nowhere; name a folder, or a URL that fsspec knows$"),
    ],
)
def test_a_protocol_that_nobody_speaks_is_one_line(url: str, text: str) -> None:
    with pytest.raises(UserError, match=text) as raised:
        Fetcher(url)
    assert "\n" not in str(raised.value)
