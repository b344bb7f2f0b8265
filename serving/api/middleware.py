"""A client's connection: what holds for every request on it, and that nobody works for a client who has gone."""

import asyncio
import json
import logging
import math
import re
import time
import uuid
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

from fastapi import Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.api.request_body import JSON_TYPE
from serving.api.responses import answer_error
from serving.errors import BodyTooLargeError
from serving.telemetry.logs import CLIENT_GONE
from serving.telemetry.metrics import EDIT_SECONDS, EDITS, Meter

T = TypeVar("T")

BASE64_RATIO = 4 / 3

_STREAMED_ERROR = b'data: {"error"'  # the last event of a stream that fails on the way

logger = logging.getLogger("serving.api.middleware")


class BoundaryMiddleware:
    """What holds for every request: a limit on its body, an id, and no exception that leaves the application.

    Args:
        app: The application inside.
        max_body_bytes: Checked against Content-Length at once, and against what is really read; a JSON body may have
            a third more, which base64 takes.
        adds_request_id: False behind Ray Serve's proxy, which adds the header itself.
    """

    def __init__(self, app: ASGIApp, *, max_body_bytes: int, adds_request_id: bool) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._adds_request_id = adds_request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        is_usable = (given != "" and not self._adds_request_id) or re.fullmatch(r"[\w.-]{1,128}", given, re.ASCII)
        request_id = given if is_usable else str(uuid.uuid4())
        scope.setdefault("state", {})["request_id"] = request_id
        is_json = headers.get("content-type", "").startswith(JSON_TYPE)
        max_bytes = math.ceil(self._max_body_bytes * BASE64_RATIO) if is_json else self._max_body_bytes
        num_read = 0
        has_started = False

        async def limited_receive() -> Message:
            nonlocal num_read
            message = await receive()
            num_read += len(message.get("body", b""))
            if num_read > max_bytes:
                raise _too_large(num_read, max_bytes)
            return message

        async def send_with_id(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                if self._adds_request_id:
                    MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        announced = headers.get("content-length", "")
        if announced.isdigit() and int(announced) > max_bytes:
            await answer_error(_too_large(int(announced), max_bytes), request_id)(scope, receive, send_with_id)
            return
        try:
            await self._app(scope, limited_receive, send_with_id)
        except ClientDisconnect:
            logger.info("the client of request %s went away", request_id)
        except Exception as error:  # the last line of defence: a client gets JSON, never a traceback
            if has_started:
                # Whatever carries the answer would write the exception into a log of its own, words and all.
                logger.exception("request %s failed in the middle of its answer", request_id)
                raise RuntimeError("the answer broke off; the log of the ingress has the reason") from None
            await answer_error(error, request_id)(scope, receive, send_with_id)


class RecordMiddleware:
    """Writes a line for each request when its answer has ended; counts and times those that ask for an edit.

    What is told is what the client was told, whoever said it. Of a path the pattern is logged, since a path may hold the id
    of a file, which is all that it takes to read it.

    Args:
        app: The application inside.
        meter: Takes the figures.
        edits_path: POSTs to it ask for an edit.
    """

    def __init__(self, app: ASGIApp, *, meter: Meter, edits_path: str) -> None:
        self._app, self._meter, self._edits_path = app, meter, edits_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_s = time.monotonic()
        status, code = CLIENT_GONE, None  # unless it is answered

        async def watched_send(message: Message) -> None:
            nonlocal status, code
            await send(message)
            if message["type"] == "http.response.start":
                status = message["status"]
            elif code is None:
                body = message.get("body", b"")
                if status >= 400 or body.startswith(_STREAMED_ERROR):
                    code = _error_code(body)
                elif not message.get("more_body", False):
                    code = "ok"

        try:
            await self._app(scope, receive, watched_send)
        finally:
            duration_s = time.monotonic() - started_s
            _log_request(scope, status, duration_s)
            if (scope["method"], scope["path"]) == ("POST", self._edits_path):
                # Without an end, or an answer at all, the client went away.
                status, code = (CLIENT_GONE, "client_gone") if code is None else (status, code)
                self._meter(EDITS, status=str(status), code=code)
                self._meter(EDIT_SECONDS, duration_s, status=str(status))


def _error_code(body: bytes) -> str:
    try:
        return str(json.loads(body.removeprefix(b"data: "))["error"]["code"])
    except (ValueError, KeyError, TypeError):  # not an answer of ours
        return "unknown"


def _too_large(num_bytes: int, max_bytes: int) -> BodyTooLargeError:
    return BodyTooLargeError(f"the body is {num_bytes} bytes or more; at most {max_bytes} are allowed")


async def cancel_on_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Awaits the work, and cancels it as soon as the client has gone away.

    Ray Serve does that too, but a client can switch it off by a header.

    Raises:
        ClientDisconnect: The client has gone.
        Exception: What the work raises.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        watch.cancel()
        task.cancel()
        await asyncio.wait((task, watch))


def _log_request(scope: Mapping[str, Any], status: int, duration_s: float) -> None:
    state = scope.get("state", {})
    facts = {
        "method": scope["method"],
        "path": getattr(scope.get("route"), "path", None) or "-",  # refused, unknown, or a file of the page
        "status": status,
        "duration_s": round(duration_s, 4),
        "key": state.get("owner") or "-",
        "request_id": state.get("request_id"),
    }
    # As text for those who read, and as fields for those who search.
    words = " ".join(f"{name}={value}" for name, value in facts.items())
    logger.info("%s", words, extra=facts | state.get("logged_words", {}))
