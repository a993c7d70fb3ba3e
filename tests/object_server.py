"""A file server that misbehaves on demand, so that reading remote shards is tested on loopback and without a network.

Real object stores are slow, refuse, cut bodies short and go silent, and none of that can be asked of them when a test
wants it. This one serves a folder over HTTP/1.1 with range reads, keeps what it was asked for, and breaks the answers
that a test names. It needs the standard library only, and closing it leaves no thread and no socket behind: the suite
turns warnings into errors.

To s3fs it is also a store that knows two things, GET and HEAD of `s3://FOLDER/KEY`: with AWS_ENDPOINT_URL set to `url`,
faults come through S3 as well. (What lists, signs or writes wants `tests.s3_server`.)
"""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import TCPServer, ThreadingMixIn
from types import TracebackType
from typing import Any, Literal, Self, get_args
from urllib.parse import unquote, urlsplit

Kind = Literal["hang", "status", "short_body", "short_range", "whole_file", "corrupt", "reset"]


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one answer.

    - hang: nothing is sent for `seconds` (None: until the server closes), then the right answer
    - status: `status` and no bytes of the file
    - short_body: Content-Length promises everything, and the connection closes after `keep` bytes
    - short_range: a well-formed 206 of the first `keep` bytes of what was asked
    - whole_file: the range is ignored: a well-formed 200 with all of the file
    - corrupt: the bit of value 1 is flipped in the middle byte of the body
    - reset: the connection is reset before any answer, or after `keep` bytes of the body where `keep` is given

    Where `keep` is None, short_body and short_range keep half.
    """

    kind: Kind
    seconds: float | None = None
    status: int = 503
    keep: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"no fault {self.kind!r}: one of {', '.join(get_args(Kind))}")


@dataclass(frozen=True)
class Request:
    """One request as it came in; `start` and `end` are what `cat_file` takes, and None where nothing was asked.

    That is, `end` is exclusive, and a suffix range (`bytes=-5`) has a `start` of -5.
    """

    method: str
    path: str
    start: int | None
    end: int | None
    at: float
    """time.monotonic() when it came in."""


Faults = Callable[[int, str, int | None, int | None], Fault | None]


def asked_range(header: str | None) -> tuple[int | None, int | None]:
    """A Range header as a slice's two ends; several ranges at once count as no range, which HTTP allows a server."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", header or "")
    if not match or match[0] == "bytes=-":
        return None, None
    first, last = match.groups()
    if not first:
        return -int(last), None
    return int(first), int(last) + 1 if last else None


class ClosingServer(ThreadingMixIn, TCPServer):
    """A threading server that can end its own idle and busy connections, and so can wait for its threads."""

    allow_reuse_address = True
    daemon_threads = False  # so that server_close() waits for the handlers
    request_queue_size = 128  # the default of 5 makes a burst of connections wait a second for a second SYN

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._open: set[socket.socket] = set()
        self._changes = threading.Lock()
        super().__init__(*args, **kwargs)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._changes:
            self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._changes:
            self._open.discard(request)
        super().shutdown_request(request)

    def stop(self, serving: threading.Thread) -> None:
        """End the loop that `serving` runs, then every connection, then wait until no thread is left."""
        self.shutdown()
        with self._changes:
            for connection in self._open:
                with contextlib.suppress(OSError):  # its client, or its handler, was faster
                    connection.shutdown(socket.SHUT_RDWR)
        self.server_close()
        serving.join()


class ObjectServer:
    """Serves the files under `folder` while its `with` block runs.

    `latency_seconds` (before each answer), `bytes_per_second` (of each body; None: as fast as it goes) and `faults` may
    be set at any time, and hold from the next request on. `faults` is called with the number of the request (from 0, in
    the order of `requests`), its path, start and end, from several threads at once.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder).resolve()
        self.latency_seconds = 0.0
        self.bytes_per_second: float | None = None
        self.faults: Faults = lambda number, path, start, end: None
        self.stopping = threading.Event()
        self.failures: list[BaseException] = []
        """What broke the server itself (or `faults`); the first is raised when the `with` block ends."""
        self._requests: list[Request] = []
        self._counting = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def requests(self) -> list[Request]:
        """Every request so far, in the order of arrival; those that were never answered too."""
        with self._counting:
            return list(self._requests)

    def count(self, request: Request) -> int:
        with self._counting:
            self._requests.append(request)
            return len(self._requests) - 1

    def __enter__(self) -> Self:
        self._server = _Server(self)
        self._serving = threading.Thread(target=self._server.serve_forever, args=(0.02,), name="object server")
        self._serving.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stopping.set()
        self._server.stop(self._serving)
        if self.failures and error is None:
            raise self.failures[0]


class _Server(ClosingServer):
    def __init__(self, objects: ObjectServer) -> None:
        self.objects = objects
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if error is not None and not isinstance(error, ConnectionError):  # a client may leave when it likes
            self.objects.failures.append(error)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each body waits for the client's delayed ACK of the headers: 40 ms
    server: _Server

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        objects = self.server.objects
        path = unquote(urlsplit(self.path).path)
        start, end = asked_range(self.headers["Range"])
        number = objects.count(Request(self.command, path, start, end, time.monotonic()))
        fault = objects.faults(number, path, start, end)
        kind = fault.kind if fault else None
        self.pause(objects.latency_seconds)
        if kind == "hang":
            self.pause(fault.seconds)
        if kind == "reset" and fault.keep is None:
            return self.reset()
        if kind == "status":
            return self.send(fault.status, b"as the test asked\n")
        file = (objects.folder / path.lstrip("/")).resolve()
        if not file.is_relative_to(objects.folder) or not file.is_file():
            return self.send(404, b"no such file\n")
        if kind == "whole_file":
            start = end = None

        size = file.stat().st_size
        first, stop, _ = slice(start, end).indices(size)
        if start is not None and first >= stop:
            return self.send(416, b"no such bytes\n", {"Content-Range": f"bytes */{size}"})
        kept = None
        if fault and kind in ("short_body", "short_range", "reset"):
            kept = min(stop - first, fault.keep if fault.keep is not None else (stop - first) // 2)
        if kind == "short_range":
            stop, kept = first + kept, None
        with file.open("rb") as opened:
            opened.seek(first)
            body = opened.read(stop - first)
        if kind == "corrupt" and body:
            flipped = bytearray(body)
            flipped[len(body) // 2] ^= 1
            body = bytes(flipped)
        if start is None and kind != "short_range":
            self.send(200, body, keep=kept)
        else:
            self.send(206, body, {"Content-Range": f"bytes {first}-{stop - 1}/{size}"}, keep=kept)
        if kept is not None:
            self.close_connection = True
        if kind == "reset":
            self.reset()
        return None

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None, *, keep: int | None = None) -> None:
        """An answer that promises all of `body`, and sends `keep` bytes of it, at the pace that was set."""
        self.send_response(status)
        promised = {"Accept-Ranges": "bytes", "Content-Length": str(len(body)), "Content-Type": "binary/octet-stream"}
        for name, value in {**promised, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        body = body[:keep]
        pace = self.server.objects.bytes_per_second
        step = max(1, min(1 << 16, int(pace / 20))) if pace else max(1, len(body))
        began = time.monotonic()
        for sent in range(0, len(body), step):
            piece = body[sent : sent + step]
            if pace:
                self.pause(began + (sent + len(piece)) / pace - time.monotonic())
            self.wfile.write(piece)

    def pause(self, seconds: float | None) -> None:
        if seconds is not None and seconds <= 0:
            return
        if self.server.objects.stopping.wait(seconds):
            raise ConnectionAbortedError("the server is closing")

    def reset(self) -> None:
        # With a linger of 0 s, close() sends RST instead of FIN; it takes effect when the last of the handler's files
        # on this socket closes, which is before the server would shut the connection down in good order.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True
