"""Ranges of files behind a URL, by whichever protocol fsspec knows: retried with jitter, and hedged.

A request that takes longer than nearly all before it is asked a second time, and the first answer counts: one slow
server then costs a moment instead of a step. Knows nothing of what the bytes mean.
"""

from __future__ import annotations

import asyncio
import errno
import random
import statistics
import time
from collections import deque
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from llm_dist.errors import UserError

ATTEMPTS = 8
LONGEST_PAUSE_SECONDS = 60.0
"""Pauses are drawn from 0 to a bound that grows fourfold from 0.1 s to this: clients that failed together come back
apart, and an outage of a minute ends no run."""
DEADLINE_SECONDS = 60.0
"""After so long without an answer an attempt to read a range has failed."""
WHOLE_FILE_DEADLINE_SECONDS = 600.0
"""A table of a trillion tokens has 100 MB."""
_HEDGE_SECONDS = 0.05, 30.0
"""A second request is never made before the first of these, and always after the second."""
_FIRST_PATIENCE_SECONDS, _WHOLE_FILE_PATIENCE_SECONDS = 1.0, 5.0
"""When a second request is made while too few answers are known, and of a file whose size is not known."""
_DEADLINE_PATIENCES = 20
"""An attempt has failed after so many times the patience, if that is sooner; each next one is given twice as long."""
_FEWEST_SAMPLES, _SAMPLES = 20, 200
_BLOCKING_THREADS = 32
_CONNECTIONS = 100
"""At once; botocore's own limit of 10 would hold back requests that are meant to overtake others."""
_TRANSIENT = (408, 425, 429)
"""HTTP's time-outs and requests to slow down."""
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError")


class NotThere(UserError):
    """There is no such file."""


class Fetcher:
    """Reads files below one URL. Safe to use from several threads."""

    def __init__(self, url: str) -> None:
        """Raises `UserError` when the URL's protocol is unknown or its package is missing."""
        self.url = url.rstrip("/")
        self._filesystem, self._root = _filesystem_of(self.url)
        self._latencies: deque[float] = deque(maxlen=_SAMPLES)
        is_async = bool(self._filesystem.async_impl)
        self._threads = None if is_async else ThreadPoolExecutor(_BLOCKING_THREADS, "data.fetch")
        self._closed: Future[bytes] = Future()
        """Done when this is closed, so that who waits for an answer can wait for that as well."""

    def read(
        self, name: str, first: int = 0, end: int | None = None, longest_pause_seconds: float | None = None
    ) -> bytes:
        """Bytes `first` to `end` (not included; the end of the file by default) of a file below the URL.

        Raises:
            NotThere: there is no such file.
            UserError: it may not be read, or every attempt failed.
        """
        longest = LONGEST_PAUSE_SECONDS if longest_pause_seconds is None else longest_pause_seconds
        for attempt in range(ATTEMPTS):
            if attempt:
                wait([self._closed], random.uniform(0, min(longest, 0.1 * 4 ** (attempt - 1))))
            try:
                content = self._hedged(name, first, end, 2**attempt)
            except Exception as error:  # noqa: BLE001 (the errors of fsspec's protocols have no class in common)
                if self._closed.done():
                    raise RuntimeError(f"{self.url}/{name}: closed while it was read") from None
                if isinstance(error, FileNotFoundError):
                    raise NotThere(f"{self.url}/{name}: not there; check the URL, or upload the file again") from None
                if mistake := _mistake(error):
                    raise UserError(f"{self.url}/{name}: {mistake}") from None
                failure = f"{type(error).__name__}: {_line(error)}"
            else:
                if end is None or len(content) == end - first:
                    return content
                failure = f"{len(content)} bytes instead of {end - first}"
        raise UserError(
            f"{self.url}/{name}: {ATTEMPTS} attempts failed, the last with {failure}; "
            "start again when the server answers"
        )

    def close(self) -> None:
        """End the requests that are under way, whose readers get an error; a second call does nothing."""
        if not self._closed.done():
            self._closed.set_result(b"")
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)

    def _hedged(self, name: str, first: int, end: int | None, stretch: int) -> bytes:
        """The first good answer of one request or, where that is slow, of two."""
        patience, longest = self._patience_and_deadline(end)
        deadline = min(longest, stretch * _DEADLINE_PATIENCES * patience)
        began = time.monotonic()
        asked = {self._ask(name, first, end): began}
        only = next(iter(asked))
        try:
            wait([only, self._closed], patience, FIRST_COMPLETED)
            if not only.done() and not self._closed.done():
                asked[self._ask(name, first, end)] = time.monotonic()
            waiting = set(asked)
            while waiting and not self._closed.done() and (left := began + deadline - time.monotonic()) > 0:
                done = wait([*waiting, self._closed], left, FIRST_COMPLETED).done & waiting
                waiting -= done
                for answer in done:
                    if answer.exception() is None:
                        # Of a first request that was overtaken it is only known that it took longer than patience.
                        least = 0.0 if answer is only else patience
                        if end is not None:
                            self._latencies.append(max(least, time.monotonic() - asked[answer]))
                        return answer.result()
            if not waiting:
                return only.result()
            raise TimeoutError(f"no answer within {deadline:.0f} s")
        finally:
            for answer in asked:
                answer.cancel()

    def _patience_and_deadline(self, end: int | None) -> tuple[float, float]:
        """Seconds after which a request is slow, and after which it has failed in any case.

        Slow is what takes longer than 95 % of the last ones and, as all may be alike, twice as long as half of them.
        """
        if end is None:
            return _WHOLE_FILE_PATIENCE_SECONDS, WHOLE_FILE_DEADLINE_SECONDS
        known = list(self._latencies)
        if len(known) < _FEWEST_SAMPLES:
            return _FIRST_PATIENCE_SECONDS, DEADLINE_SECONDS
        shortest, longest = _HEDGE_SECONDS
        twentieths = statistics.quantiles(known, n=20)
        return min(longest, max(shortest, twentieths[-1], 2 * twentieths[9])), DEADLINE_SECONDS

    def _ask(self, name: str, first: int, end: int | None) -> Future[bytes]:
        path = f"{self._root}/{name}"
        # A whole file is asked for as a range, too: s3fs would ask for its size before.
        if self._threads is not None:
            return self._threads.submit(self._filesystem.cat_file, path, start=first, end=end)
        # Its coroutine can be cancelled, which a thread that waits for an answer cannot.
        coroutine = self._filesystem._cat_file(path, start=first, end=end)
        return asyncio.run_coroutine_threadsafe(coroutine, self._filesystem.loop)


def _mistake(error: Exception) -> str | None:
    """What is wrong, where asking again cannot help, and the way out; None when it may."""
    status = getattr(error, "status", None)
    said = f"status {status}" if isinstance(status, int) else _line(error)
    if isinstance(error, PermissionError) or type(error).__name__ in _NO_CREDENTIALS or status in (401, 403):
        return f"may not be read ({said}); check the URL and the credentials"
    if status == 416:
        return f"shorter than it should be ({said}); upload the file again"
    is_refused = isinstance(status, int) and 400 <= status < 500 and status not in _TRANSIENT
    # s3fs gives these numbers to what S3 calls invalid: a range behind the end, a name, a token.
    if is_refused or (isinstance(error, OSError) and error.errno in (errno.EINVAL, errno.EPERM)):
        return f"refused ({said}); check the URL and the file there"
    return None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _filesystem_of(url: str) -> tuple[Any, str]:
    import fsspec

    protocol = url.partition("://")[0]
    try:
        # fsspec keeps it for ever, which is well: one that goes waits for its thread, which may wait for this one.
        filesystem, root = fsspec.core.url_to_fs(url, **_options(protocol))
    except ImportError as error:
        raise UserError(
            f"{url}: {protocol} needs a package that is missing ({_line(error)}); pip install 'llm_dist[remote]' "
            "brings those of http and s3"
        ) from None
    except ValueError as error:
        raise UserError(f"{url}: {_line(error)}; name a folder, or a URL that fsspec knows") from None
    if "config_kwargs" in filesystem.storage_options and hasattr(filesystem, "retries"):
        filesystem.retries = 1  # s3fs would multiply our attempts with its own
    return filesystem, root.rstrip("/")


def _options(protocol: str) -> dict[str, Any]:
    """Beside what fsspec's configuration file says: botocore would multiply our attempts, too."""
    import fsspec

    if protocol not in ("s3", "s3a"):
        return {}
    ours = {"max_pool_connections": _CONNECTIONS, "retries": {"total_max_attempts": 1}}
    return {"config_kwargs": {**ours, **fsspec.config.conf.get(protocol, {}).get("config_kwargs", {})}}
