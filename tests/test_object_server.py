"""The test servers do what they say, and fsspec says of each fault what the loader's error handling is written for.

A later fsspec that names a fault otherwise, or hides one, shows here first.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from tests.object_server import Fault, ObjectServer
from tests.s3_server import ENVIRONMENT, S3Server, require_packages

DATA = bytes(range(256)) * 40
START, END = 1000, 3000
HTTP_PACKAGES = ("aiohttp",)
S3_PACKAGES = ("aiohttp", "s3fs", "boto3", "moto", "flask", "flask_cors")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "shards" / "deep").mkdir(parents=True)
    (tmp_path / "shards" / "one.bin").write_bytes(DATA)
    (tmp_path / "shards" / "deep" / "two.bin").write_bytes(DATA[::-1])
    (tmp_path / "secret").write_bytes(b"not served")
    return tmp_path / "shards"


@pytest.fixture
def objects(folder: Path) -> Iterator[ObjectServer]:
    with ObjectServer(folder) as server:
        yield server


@pytest.fixture
def http() -> Any:
    require_packages(*HTTP_PACKAGES)
    return fsspec.filesystem("http", skip_instance_cache=True)


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine that nobody set up for AWS, but for `ENVIRONMENT`."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


@pytest.fixture
def s3(folder: Path, aws: pytest.MonkeyPatch) -> Iterator[S3Server]:
    require_packages(*S3_PACKAGES)
    with S3Server(folder) as server:
        yield server


def s3_filesystem(**options: Any) -> Any:
    return fsspec.filesystem("s3", skip_instance_cache=True, **options)


def name_of(raised: pytest.ExceptionInfo[Exception]) -> str:
    return f"{raised.type.__module__.split('.')[0]}.{raised.type.__name__}"


@pytest.mark.parametrize(
    ("start", "end"), [(START, END), (0, 1), (len(DATA) - 5, len(DATA) + 100), (10_000, None), (None, 7), (-9, None)]
)
def test_http_reads_ranges(objects: ObjectServer, http: Any, start: int | None, end: int | None) -> None:
    assert http.cat_file(f"{objects.url}/one.bin", start=start, end=end) == DATA[start:end]
    (asked,) = objects.requests
    assert (asked.method, asked.path, asked.start, asked.end) == ("GET", "/one.bin", start or 0 if end else start, end)


def test_http_reads_whole_files_and_sizes(objects: ObjectServer, http: Any) -> None:
    assert http.cat_file(f"{objects.url}/deep/two.bin") == DATA[::-1]
    assert http.size(f"{objects.url}/deep/two.bin") == len(DATA)
    assert [(asked.method, asked.start) for asked in objects.requests] == [("GET", None), ("HEAD", None)]


@pytest.mark.parametrize("path", ["none.bin", "deep", "%2e%2e/secret"])
def test_what_is_no_file_of_the_folder_is_not_found(objects: ObjectServer, http: Any, path: str) -> None:
    with pytest.raises(FileNotFoundError, match=objects.url):
        http.cat_file(f"{objects.url}/{path}", start=0, end=5)


SHORT = "Response payload is not completed: .*Not enough data to satisfy content length header"


@pytest.mark.parametrize(
    ("fault", "error", "text", "requests"),
    [
        (Fault("status"), "aiohttp.ClientResponseError", "503, message='Service Unavailable', url='http://127", 1),
        (Fault("status", status=403), "aiohttp.ClientResponseError", "403, message='Forbidden', url='http://127", 1),
        (Fault("short_body"), "aiohttp.ClientPayloadError", rf"{SHORT} \(received 1000 of 2000 bytes\)", 1),
        (
            Fault("reset"),
            "aiohttp.ClientOSError",
            r"^\[Errno 104\] Connection reset by peer$",
            2,
        ),  # aiohttp tries twice
        (Fault("reset", keep=500), "aiohttp.ClientPayloadError", f"{SHORT}.*ConnectionResetError", 1),
        (Fault("hang"), "fsspec.FSTimeoutError", "^$", 1),
    ],
    ids=["status 503", "status 403", "short body", "reset at once", "reset in the body", "hang"],
)
def test_http_faults_that_raise(
    objects: ObjectServer, http: Any, fault: Fault, error: str, text: str, requests: int
) -> None:
    objects.faults = lambda number, path, start, end: fault
    with pytest.raises(Exception, match=text) as raised:
        http.cat_file(f"{objects.url}/one.bin", start=START, end=END, timeout=0.3 if fault.kind == "hang" else 10)
    assert name_of(raised) == error
    if fault.kind != "hang":  # which a busy machine may give up before it has asked
        assert len(objects.requests) == requests


@pytest.mark.parametrize(
    ("fault", "read"),
    [
        (Fault("short_range"), DATA[START : (START + END) // 2]),
        (Fault("short_range", keep=3), DATA[START : START + 3]),
        (Fault("whole_file"), DATA),
        (Fault("corrupt"), DATA[START:2000] + bytes([DATA[2000] ^ 1]) + DATA[2001:END]),
        (Fault("hang", seconds=0.05), DATA[START:END]),
    ],
    ids=["short range", "shorter range", "whole file", "corrupt", "hang for a while"],
)
def test_http_faults_that_only_the_reader_can_see(objects: ObjectServer, http: Any, fault: Fault, read: bytes) -> None:
    objects.faults = lambda number, path, start, end: fault
    assert http.cat_file(f"{objects.url}/one.bin", start=START, end=END) == read


def test_faults_are_chosen_by_request(objects: ObjectServer, http: Any) -> None:
    asked = []

    def first_only(*request: Any) -> Fault | None:
        asked.append(request)
        return Fault("status") if request[0] == 0 else None

    objects.faults = first_only
    with pytest.raises(Exception, match="503"):
        http.cat_file(f"{objects.url}/one.bin", start=START, end=END)
    assert http.cat_file(f"{objects.url}/one.bin", start=START, end=END) == DATA[START:END]
    assert asked == [(0, "/one.bin", START, END), (1, "/one.bin", START, END)]


def test_latency_and_bandwidth_are_set_while_it_runs(objects: ObjectServer, http: Any) -> None:
    def seconds() -> float:
        began = time.monotonic()
        assert http.cat_file(f"{objects.url}/one.bin", start=START, end=END) == DATA[START:END]
        return time.monotonic() - began

    seconds()
    objects.latency_seconds = 0.2
    assert seconds() >= 0.2
    objects.latency_seconds, objects.bytes_per_second = 0, (END - START) / 0.2
    assert seconds() >= 0.19


def test_closing_ends_hanging_slow_and_idle_connections(folder: Path) -> None:
    threads = set(threading.enumerate())
    with ObjectServer(folder) as server:
        server.faults = lambda number, path, start, end: Fault("hang") if path == "/hang" else None
        server.bytes_per_second = 1.0
        address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
        clients = [socket.create_connection(address) for _ in range(3)]
        for client, path in zip(clients, ("/hang", "/one.bin"), strict=False):  # the third says nothing
            client.sendall(f"GET {path} HTTP/1.1\r\nHost: here\r\n\r\n".encode())
        while len(server.requests) < 2:
            time.sleep(0.01)
        began = time.monotonic()
    assert time.monotonic() - began < 5  # of the three hours that one.bin would take
    assert set(threading.enumerate()) == threads
    for client in clients:
        client.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address)


def test_a_mistake_in_the_test_itself_is_raised(folder: Path, http: Any) -> None:
    def mistaken(*request: Any) -> Fault | None:
        raise KeyError("a mistake")

    def read_from_it() -> None:
        with ObjectServer(folder) as server:
            server.faults = mistaken
            with pytest.raises(Exception, match="disconnected"):
                http.cat_file(f"{server.url}/one.bin")

    with pytest.raises(KeyError, match="a mistake"):
        read_from_it()
    with pytest.raises(ValueError, match="no fault 'hung': one of hang, "):
        Fault("hung")  # type: ignore[arg-type]


def test_s3_reads_ranges_of_a_bare_url(s3: S3Server, aws: pytest.MonkeyPatch) -> None:
    for name, value in s3.environment.items():
        aws.setenv(name, value)
    with_options, bare = s3_filesystem(**s3.storage_options), s3_filesystem()
    for start, end in ((START, END), (-9, None)):
        assert with_options.cat_file(f"{s3.url}/one.bin", start=start, end=end) == DATA[start:end]
        assert bare.cat_file(f"{s3.url}/one.bin", start=start, end=end) == DATA[start:end]
    assert {(asked.method, asked.path) for asked in s3.requests} == {("GET", "/shards/corpus/one.bin")}
    assert [(asked.start, asked.end) for asked in s3.requests] == [(START, END)] * 2 + [(-9, None)] * 2
    assert bare.size(f"{s3.url}/deep/two.bin") == len(DATA)
    assert bare.find(s3.url) == ["shards/corpus/deep/two.bin", "shards/corpus/one.bin"]


def test_s3_says_what_is_missing(s3: S3Server, aws: pytest.MonkeyPatch) -> None:
    aws.setenv("AWS_ENDPOINT_URL", s3.endpoint_url)
    with pytest.raises(FileNotFoundError, match=r"^The specified key does not exist\.$"):
        s3_filesystem().cat_file(f"{s3.url}/none.bin", start=0, end=5)
    with pytest.raises(FileNotFoundError, match=r"^The specified bucket does not exist$"):
        s3_filesystem().cat_file("s3://none/one.bin", start=0, end=5)
    with pytest.raises(PermissionError, match=r"^Forbidden$"):
        s3_filesystem(anon=True).cat_file(f"{s3.url}/one.bin", start=0, end=5)
    aws.delenv("AWS_ACCESS_KEY_ID")
    aws.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(Exception, match=r"^Unable to locate credentials$") as raised:
        s3_filesystem().cat_file(f"{s3.url}/one.bin", start=0, end=5)
    assert name_of(raised) == "botocore.NoCredentialsError"
    assert not isinstance(raised.value, OSError)


def test_s3_servers_leave_nothing_to_the_next_one(folder: Path, aws: pytest.MonkeyPatch) -> None:
    require_packages(*S3_PACKAGES)
    aws.setenv("AWS_MAX_ATTEMPTS", "1")  # botocore's own are 5, with seconds between them
    threads = {thread for thread in threading.enumerate() if "server" in thread.name}
    with S3Server(folder) as first:
        aws.setenv("AWS_ENDPOINT_URL", first.endpoint_url)
        filesystem, path = fsspec.core.url_to_fs(f"{first.url}/one.bin")
        assert filesystem.cat_file(path, start=0, end=5) == DATA[:5]
    with pytest.raises(Exception, match=r'^Could not connect to the endpoint URL: "http://127') as raised:
        filesystem.cat_file(path, start=0, end=5)
    assert name_of(raised) == "botocore.EndpointConnectionError"
    assert not isinstance(raised.value, OSError)
    with S3Server(folder / "deep", bucket="other") as second:
        aws.setenv("AWS_ENDPOINT_URL", second.endpoint_url)
        filesystem, folder_path = fsspec.core.url_to_fs(second.url)
        assert filesystem.find(folder_path) == ["other/corpus/two.bin"]
        with pytest.raises(FileNotFoundError):
            filesystem.cat_file(path, start=0, end=5)
    assert {thread for thread in threading.enumerate() if "server" in thread.name} == threads


@pytest.mark.parametrize(
    ("fault", "error", "text"),
    [
        (Fault("status"), "builtins.OSError", r"^\[Errno 16\] Service Unavailable$"),
        (Fault("reset"), "botocore.EndpointConnectionError", "^Could not connect to the endpoint URL"),
        (Fault("short_body"), "aiohttp.ClientPayloadError", SHORT),
        (Fault("hang"), "fsspec.FSTimeoutError", "^$"),
    ],
    ids=["status", "reset", "short body", "hang"],
)
def test_s3fs_takes_faults_from_an_object_server(
    folder: Path, aws: pytest.MonkeyPatch, fault: Fault, error: str, text: str
) -> None:
    require_packages("aiohttp", "s3fs")
    aws.setenv("AWS_MAX_ATTEMPTS", "1")
    with ObjectServer(folder.parent) as server:
        aws.setenv("AWS_ENDPOINT_URL", server.url)
        filesystem = s3_filesystem()
        filesystem.retries = 1  # s3fs's own are 5 around botocore's
        assert filesystem.cat_file("s3://shards/one.bin", start=START, end=END) == DATA[START:END]
        server.faults = lambda number, path, start, end: fault
        with pytest.raises(Exception, match=text) as raised:
            filesystem.cat_file("s3://shards/one.bin", start=START, end=END, timeout=0.3 if fault.kind == "hang" else 9)
        assert name_of(raised) == error
        if fault.kind != "hang":
            assert len(server.requests) == (3 if fault.kind == "reset" else 2)


def test_a_missing_package_skips_and_with_ci_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    require_packages("pytest")
    with pytest.raises(pytest.skip.Exception, match=r"no_such_package: pip install -r requirements/dev\.txt$"):
        require_packages("pytest", "no_such_package")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no test may be skipped"):
        require_packages("no_such_package")
