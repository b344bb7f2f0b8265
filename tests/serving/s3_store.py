"""moto's S3 on loopback with faults that a test asks for."""

import threading
from collections import Counter, deque
from collections.abc import Iterable
from typing import Any, Literal, Self

import boto3
import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

Fault = Literal["lost", "cut"] | tuple[int, str]


class _Silent(WSGIRequestHandler):
    def log(self, *args: Any, **kwargs: Any) -> None:
        """Says nothing."""


class S3Store:
    """A server with one bucket, also for the environment. A context manager.

    It serves one request at a time: moto checks the condition of a write and writes in two steps.
    """

    bucket = "shop"

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.faults: deque[tuple[str, Fault]] = deque()
        "method and what happens: to the next requests of that method, in order; an answer lost or cut, or a status"
        self.always: Fault | None = None
        self.ignores_conditions = False
        self.requests = Counter[str]()
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._serve, threaded=False, request_handler=_Silent)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        for name in ("AWS_PROFILE", "AWS_REGION", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("AWS_ENDPOINT_URL", self.url)

    def _serve(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        method = environ["REQUEST_METHOD"]
        self.requests[method] += 1
        if self.ignores_conditions:
            environ = {
                name: value for name, value in environ.items() if name not in ("HTTP_IF_MATCH", "HTTP_IF_NONE_MATCH")
            }
        fault = self.always
        if self.faults and self.faults[0][0] == method:
            fault = self.faults.popleft()[1]
        if isinstance(fault, tuple):
            return _refuse(start_response, *fault)
        answer: Iterable[bytes] = self._app(environ, start_response if fault != "lost" else lambda *_: None)
        if fault == "lost":
            list(answer)
            return _refuse(start_response, 500, "InternalError")
        return [b"".join(answer)[:10]] if fault == "cut" else answer

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        client = boto3.client("s3", endpoint_url=self.url)
        client.create_bucket(Bucket=self.bucket)
        self._client = client
        return self

    def keys(self) -> list[str]:
        """All keys in the bucket."""
        return [item["Key"] for item in self._client.list_objects_v2(Bucket=self.bucket).get("Contents", ())]

    def __exit__(self, *exc: object) -> None:
        for key in self.keys():
            self._client.delete_object(Bucket=self.bucket, Key=key)
        self._client.delete_bucket(Bucket=self.bucket)
        self._server.shutdown()
        self._server.server_close()


def _refuse(start_response: Any, status: int, code: str) -> Iterable[bytes]:
    body = f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
    start_response(f"{status} {code}", [("content-type", "application/xml"), ("content-length", str(len(body)))])
    return [body]
