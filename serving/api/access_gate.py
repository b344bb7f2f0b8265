"""The gate before the routes: whose request it is, and whether its key has some left, before anything of it is read."""

import asyncio
import contextlib
import math
import re
from collections.abc import AsyncIterator

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.access.keys import Caller, KeyRing
from serving.api.responses import answer_error
from serving.errors import LimitError, UnknownKeyError

# All that opens without a key. A kept file has an id that cannot be guessed, as the signed addresses of S3 have. What is
# not here and may seem harmless: /readyz and /stats ask the stages, so anybody could wake those that are scaled to zero
# (a probe of readiness sends a key, one of liveness asks /healthz); the rest tells what is served, and to whom it may be
# of use is for the keys to say. Paths that do not exist are none of a stranger's business either.
_OPEN = re.compile(r"/|/page/.+|/healthz|/v1/images/files/[^/]+")


class AccessMiddleware:
    """Lets requests in that have a valid key with something left; all, where there are no keys.

    Sets `request.state.caller` (None: no key was needed), `owner` (name of the key, or "") and `priority` (the key's;
    None: it says nothing).

    Args:
        app: The application inside.
        keys: None: the service is open.
    """

    def __init__(self, app: ASGIApp, *, keys: KeyRing | None) -> None:
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":  # no route takes anything else
            await self._app(scope, receive, send)
            return
        caller = None if self._keys is None or _is_open(scope) else find_caller(Headers(scope=scope), self._keys)
        state = scope.setdefault("state", {})
        state["caller"] = caller
        state["owner"], state["priority"] = (caller.key.name, caller.key.priority) if caller else ("", None)
        if caller is None:
            await self._app(scope, receive, send)
            return

        async def send_with_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(limit_headers(caller))
            await send(message)

        with contextlib.ExitStack() as held:
            try:
                # Calling edits off is never refused: it makes room.
                if scope["method"] != "DELETE":
                    caller.allowance.request()
                if scope["method"] == "POST":
                    held.enter_context(caller.allowance.edit())
            except LimitError as error:
                await answer_error(error, state["request_id"])(scope, receive, send_with_limits)
                return
            await self._app(scope, receive, send_with_limits)


def find_caller(headers: Headers, keys: KeyRing) -> Caller:
    """Whose request it is.

    Raises:
        UnknownKeyError: It has no key, or a wrong one.
    """
    sent = headers.getlist("authorization")
    scheme, _, key = sent[0].strip().partition(" ") if sent else ("", "", "")
    if scheme.lower() != "bearer" or not key.strip():
        message = "an API key is needed: send the header Authorization: Bearer YOUR_KEY"
        raise UnknownKeyError(message, code="missing_api_key")
    if len(sent) > 1:
        raise UnknownKeyError("there is more than one header Authorization; send one", code="invalid_api_key")
    return keys.find(key.strip())


def limit_headers(caller: Caller) -> dict[str, str]:
    """What the key has left, as OpenAI says it: of this replica, where there are several."""
    bucket = caller.allowance.requests
    if bucket is None:
        return {}
    return {
        "x-ratelimit-limit-requests": str(caller.key.requests_per_minute),
        "x-ratelimit-remaining-requests": str(max(0, math.floor(bucket.level))),
        "x-ratelimit-reset-requests": f"{bucket.full_in_s:.1f}s",
    }


@contextlib.asynccontextmanager
async def watched(keys: KeyRing | None) -> AsyncIterator[None]:
    """Meanwhile the keys follow their file."""
    watch = None if keys is None else asyncio.create_task(keys.watch())
    try:
        yield
    finally:
        if watch is not None:
            watch.cancel()


def _is_open(scope: Scope) -> bool:
    return scope["method"] == "GET" and _OPEN.fullmatch(scope["path"]) is not None
