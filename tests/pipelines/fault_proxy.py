"""An HTTP proxy in front of an S3 server that answers some requests with 500 or 503 itself."""

import http.client
import random
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import urlparse

_HOP_HEADERS = {"connection", "transfer-encoding", "keep-alive", "content-length"}


class FaultProxy:
    """Forwards to `target`; a share of the requests fails, chosen by `seed`. A context manager."""

    def __init__(self, target: str, *, share: float, seed: int) -> None:
        self.num_requests, self.faults = 0, Counter[int]()
        host = urlparse(target).netloc
        rng, lock = random.Random(seed), threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _serve(handler: Any) -> None:  # noqa: N805  # `self` is the proxy
                if handler.headers.get("expect", "").lower() == "100-continue":
                    handler.send_response_only(100)
                    handler.end_headers()
                body = _read_body(handler)
                with lock:
                    self.num_requests += 1
                    fault = rng.choice((500, 503)) if rng.random() < share else None
                    self.faults.update([fault] if fault else [])
                if fault is not None:
                    code = "InternalError" if fault == 500 else "SlowDown"
                    text = f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
                    _answer(handler, fault, {"content-type": "application/xml"}, text)
                    return
                connection = http.client.HTTPConnection(host)
                headers = {name: value for name, value in handler.headers.items() if name.lower() not in _HOP_HEADERS}
                headers.pop("Expect", None)
                connection.request(handler.command, handler.path, body, {**headers, "content-length": str(len(body))})
                response = connection.getresponse()
                content = response.read()
                kept = {name: value for name, value in response.getheaders() if name.lower() not in _HOP_HEADERS}
                if handler.command == "HEAD":
                    kept["content-length"] = response.headers.get("content-length", "0")
                _answer(handler, response.status, kept, content)
                connection.close()

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve  # noqa: N815  # so http.server wants it

            def log_message(self, *args: Any) -> None:
                """Says nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def _read_body(handler: Any) -> bytes:
    if handler.headers.get("transfer-encoding", "").lower() == "chunked":
        body = b""
        while size := int(handler.rfile.readline().split(b";")[0], 16):
            body += handler.rfile.read(size)
            handler.rfile.readline()
        handler.rfile.readline()
        return body
    data: bytes = handler.rfile.read(int(handler.headers.get("content-length", 0)))
    return data


def _answer(handler: Any, status: int, headers: dict[str, str], content: bytes) -> None:
    handler.send_response_only(status)
    for name, value in headers.items():
        handler.send_header(name, value)
    if "content-length" not in {name.lower() for name in headers}:
        handler.send_header("content-length", str(len(content)))
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(content)
