"""An S3 store on loopback, so that `s3://` shards are tested with the real client and without a network.

moto speaks enough of S3 for s3fs to list, stat and read ranges, and turns away who comes without credentials (whose
they are, it does not check). It never fails on its own: for faults, see `tests.object_server`, which s3fs can read too.
"""

from __future__ import annotations

import importlib.util
import os
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from tests.object_server import ClosingServer, Request, asked_range

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "a-test",
    "AWS_SECRET_ACCESS_KEY": "a-test-too",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "AWS_EC2_METADATA_DISABLED": "true",
}
"""Who the tests are to S3, whatever the machine says; the last line keeps botocore from asking 169.254.169.254 for
credentials, which is no address of ours."""


def require_packages(*names: str) -> None:
    """Skip the test that calls this, saying why, where one of the packages is missing; with CI=true, fail it."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if not missing:
        return
    why = f"reading remote shards is tested with {', '.join(missing)}: pip install -r requirements/dev.txt"
    if os.environ.get("CI") == "true":
        pytest.fail(f"with CI=true no test may be skipped: {why}")
    pytest.skip(why)


class S3Server:
    """Holds a copy of the files under `folder` as `s3://BUCKET/PREFIX/...` while its `with` block runs.

    - `url`: `s3://BUCKET/PREFIX`
    - `storage_options`: what `fsspec.filesystem("s3", **storage_options)` needs
    - `environment`: the same as environment variables, under which a bare `s3://` URL is enough
    - `requests`: what was asked of it since the upload; paths are /BUCKET/PREFIX/...

    moto keeps one store per process, so that one of these runs at a time. fsspec keeps one s3fs per set of options,
    and that one keeps the endpoint it was made with: starting and stopping make it forget those.
    """

    def __init__(self, folder: Path, bucket: str = "shards", prefix: str = "corpus") -> None:
        self.folder = Path(folder)
        self.bucket, self.prefix = bucket, prefix
        self.url = f"s3://{bucket}/{prefix}"
        self._requests: list[Request] = []

    @property
    def endpoint_url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def storage_options(self) -> dict[str, str]:
        return {
            "endpoint_url": self.endpoint_url,
            "key": ENVIRONMENT["AWS_ACCESS_KEY_ID"],
            "secret": ENVIRONMENT["AWS_SECRET_ACCESS_KEY"],
        }

    @property
    def environment(self) -> dict[str, str]:
        return {**ENVIRONMENT, "AWS_ENDPOINT_URL": self.endpoint_url}

    @property
    def requests(self) -> list[Request]:
        return list(self._requests)

    def __enter__(self) -> Self:
        _forget_filesystems()
        self._server = _server(self._requests)
        self._serving = threading.Thread(target=self._server.serve_forever, args=(0.02,), name="s3 server")
        self._serving.start()
        try:
            self._upload()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        from moto.s3.models import s3_backends

        _forget_filesystems()
        self._server.stop(self._serving)
        s3_backends.reset()

    def _upload(self) -> None:
        import boto3

        client = boto3.client(
            "s3",
            endpoint_url=self.endpoint_url,
            aws_access_key_id=ENVIRONMENT["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=ENVIRONMENT["AWS_SECRET_ACCESS_KEY"],
            region_name=ENVIRONMENT["AWS_DEFAULT_REGION"],
        )
        try:
            client.create_bucket(Bucket=self.bucket)
            for path in sorted(self.folder.rglob("*")):
                if path.is_file():
                    key = f"{self.prefix}/{path.relative_to(self.folder).as_posix()}"
                    client.put_object(Bucket=self.bucket, Key=key, Body=path.read_bytes())
        finally:
            client.close()
        self._requests.clear()


def _forget_filesystems() -> None:
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()


def _server(requests: list[Request]) -> Any:
    """moto's application, behind a server that waits for its threads; `ThreadedMotoServer` lets go of them."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import ThreadedWSGIServer

    class Handler(MotoRequestHandler):
        disable_nagle_algorithm = True

        def send_header(self, keyword: str, value: str) -> None:
            """moto's errors bring a Server and a Date on top of werkzeug's; aiohttp's debug mode takes one of each."""
            name = f"{keyword}: ".lower().encode()
            if not any(line.lower().startswith(name) for line in getattr(self, "_headers_buffer", [])):
                super().send_header(keyword, value)

        def log(self, *args: Any) -> None:
            pass

    class Server(ClosingServer, ThreadedWSGIServer):
        pass

    answer = DomainDispatcherApplication(create_backend_app)

    def application(environ: dict[str, Any], start_response: Any) -> Any:
        start, end = asked_range(environ.get("HTTP_RANGE"))
        requests.append(Request(environ["REQUEST_METHOD"], environ["PATH_INFO"], start, end, time.monotonic()))
        return answer(environ, start_response)

    return Server("127.0.0.1", 0, application, Handler)
