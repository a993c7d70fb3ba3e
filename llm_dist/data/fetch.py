"""Ranges of files behind a URL, by whichever protocol fsspec knows: retried with jitter, and hedged.

A request that takes longer than nearly all before it is asked a second time, and the first answer counts: one slow
server then costs a moment instead of a step. Knows nothing of what the bytes mean.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections import deque
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from llm_dist.errors import UserError

ATTEMPTS = 8
LONGEST_PAUSE_SECONDS = 10.0
"""Pauses are drawn from 0 to a bound that doubles from 0.1 s to this: clients that failed together come back apart."""
DEADLINE_SECONDS = 60.0
"""After so long without an answer an attempt has failed."""
_HEDGE_SECONDS = 0.05, 5.0
"""A second request is never made before the first of these, and always after the second."""
_FEWEST_SAMPLES, _SAMPLES = 20, 200
_BLOCKING_THREADS = 32
_TRANSIENT = (408, 425, 429)
"""HTTP's time-outs and requests to slow down."""
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError")


class Fetcher:
    """Reads files below one URL. Safe to use from several threads."""

    def __init__(self, url: str) -> None:
        """Raises `UserError` when the URL's protocol is unknown or its package is missing."""
        self.url = url.rstrip("/")
        self._filesystem, self._root = _filesystem_of(self.url)
        self._latencies: deque[float] = deque(maxlen=_SAMPLES)
        self._threads = None if self._is_async else ThreadPoolExecutor(_BLOCKING_THREADS, "data.fetch")

    def read(self, name: str, first: int = 0, end: int | None = None) -> bytes:
        """Bytes `first` to `end` (not included; the end of the file by default) of a file below the URL.

        Raises:
            UserError: it is not there or may not be read, or every attempt failed.
        """
        bound = 0.1
        for attempt in range(1, ATTEMPTS + 1):
            try:
                content = self._hedged(name, first, end)
                if end is None or len(content) == end - first:
                    return content
                failure = f"{len(content)} bytes came instead of {end - first}"
            except FileNotFoundError:
                raise UserError(f"{self.url}/{name}: not there; check the URL, or upload the file again") from None
            except PermissionError as error:
                raise UserError(f"{self.url}/{name}: may not be read ({error}); check the credentials") from None
            except Exception as error:  # noqa: BLE001 (the errors of fsspec's protocols have no class in common)
                if why := _is_final(error):
                    raise UserError(f"{self.url}/{name}: {why}; check the URL and the credentials") from None
                failure = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            if attempt < ATTEMPTS:
                time.sleep(random.uniform(0, bound))
                bound = min(LONGEST_PAUSE_SECONDS, 2 * bound)
        raise UserError(f"{self.url}/{name}: {ATTEMPTS} attempts failed, the last with {failure}; start again later")

    def close(self) -> None:
        """Let go of threads; a second call does nothing."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)

    @property
    def _is_async(self) -> bool:
        return bool(self._filesystem.async_impl)

    def _hedged(self, name: str, first: int, end: int | None) -> bytes:
        """The first good answer of one request or, where that is slow, of two."""
        began = time.monotonic()
        asked = [self._ask(name, first, end)]
        try:
            wait(asked, timeout=self._patience())
            if not asked[0].done():
                asked.append(self._ask(name, first, end))
            waiting = set(asked)
            while waiting and (left := began + DEADLINE_SECONDS - time.monotonic()) > 0:
                done, waiting = wait(waiting, left, FIRST_COMPLETED)
                for answer in done:
                    if answer.exception() is None:
                        self._latencies.append(time.monotonic() - began)
                        return answer.result()
            if not waiting:
                return asked[0].result()
            raise TimeoutError(f"no answer within {DEADLINE_SECONDS:.0f} s")
        finally:
            for answer in asked:
                answer.cancel()

    def _patience(self) -> float:
        """Seconds after which a request is slow: those that 95 % of the last ones took."""
        shortest, longest = _HEDGE_SECONDS
        if len(self._latencies) < _FEWEST_SAMPLES:
            return longest / 5
        return min(longest, max(shortest, statistics.quantiles(list(self._latencies), n=20)[-1]))

    def _ask(self, name: str, first: int, end: int | None) -> Future[bytes]:
        path, whole = f"{self._root}/{name}", first == 0 and end is None
        bounds: dict[str, int | None] = {} if whole else {"start": first, "end": end}
        if self._threads is not None:
            return self._threads.submit(self._filesystem.cat_file, path, **bounds)
        # Its coroutine can be cancelled, which a thread that waits for an answer cannot.
        return asyncio.run_coroutine_threadsafe(self._filesystem._cat_file(path, **bounds), self._filesystem.loop)


def _is_final(error: Exception) -> str | None:
    """Why asking again cannot help; None when it may."""
    status = getattr(error, "status", None)
    if isinstance(status, int) and 400 <= status < 500 and status not in _TRANSIENT:
        return f"refused with status {status}"
    return str(error) if type(error).__name__ in _NO_CREDENTIALS else None


def _filesystem_of(url: str) -> tuple[Any, str]:
    import fsspec

    protocol = url.partition("://")[0]
    try:
        filesystem, root = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise UserError(
            f"{url}: {protocol} needs a package that is missing ({error}); pip install 'llm_dist[remote]' brings those "
            "of http and s3"
        ) from None
    except ValueError as error:
        raise UserError(f"{url}: {' '.join(str(error).split())}; name a folder, or a URL that fsspec knows") from None
    if hasattr(filesystem, "retries"):
        filesystem.retries = 1  # s3fs would multiply our attempts with its own
    return filesystem, root.rstrip("/")
