"""Telling a client of the end of its job: which addresses may be called, how a message is signed, sending it.

Only hosts that the operator lists are called, and redirects are not followed, so that nobody can have the service
reach into its own network. At least once: a message may come again, with the same id.

Source: Standard Webhooks 1.0.0, https://github.com/standard-webhooks/standard-webhooks
"""

import base64
import binascii
import hashlib
import hmac
import os
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx2

from mgie.errors import ConfigError
from serving.errors import RequestError, quoted
from serving.jobs.record import Webhook

SECRET_VARIABLE = "MGIE_WEBHOOK_SECRET"  # noqa: S105  the name of one
SEND_TIMEOUT_S = 10.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 600.0

_HOST = re.compile(r"[a-z0-9_.:-]+")
_PORTS = {"https": 443, "http": 80}
_MIN_SECRET_BYTES, _MAX_SECRET_BYTES = 24, 64  # as the specification has them
_SECRET_PREFIX = "whsec_"  # noqa: S105


@dataclass(frozen=True, kw_only=True)
class WebhookSettings:
    """Who may be called, and how."""

    hosts: frozenset[tuple[str, int | None]]
    "host, and port if not that of the scheme"
    secret: bytes
    give_up_s: float
    "after the end of the job"


def webhook_settings(hosts: Sequence[str], *, secret_file: str | None, give_up_s: float) -> WebhookSettings | None:
    """The settings of a service; None if no host is allowed.

    Args:
        hosts: Each `host` or `host:port`.
        secret_file: Holds the secret, `whsec_` and base64; None: environment variable MGIE_WEBHOOK_SECRET.

    Raises:
        ConfigError: A host is none, or there is no secret that could be used.
    """
    if not hosts:
        return None
    return WebhookSettings(
        hosts=frozenset(_host(host) for host in hosts), secret=_secret(secret_file), give_up_s=give_up_s
    )


def check_url(url: str, settings: WebhookSettings | None) -> None:
    """Whether a client may have an address called.

    Raises:
        RequestError: It may not.
    """

    def refused(allowed: str) -> RequestError:
        return RequestError(f"webhook_url is {quoted(url)}; {allowed}", param="webhook_url", code="unsupported_value")

    if settings is None:
        raise refused("this service calls no webhooks")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise refused("it must be an address like https://host/path") from error
    is_plain = url.isascii() and url.isprintable() and " " not in url and "\\" not in url
    if parts.scheme not in _PORTS or not parts.hostname or parts.fragment or "@" in parts.netloc or not is_plain:
        raise refused("it must be an address like https://host/path, without user name and fragment")
    if (parts.hostname, None if port == _PORTS[parts.scheme] else port) not in settings.hosts:
        raise refused("its host is not among those that the operator allows")


def signed_headers(message_id: str, body: bytes, *, secret: bytes, now_s: float) -> dict[str, str]:
    """Headers of a message; its id is the same in every try."""
    timestamp = str(int(now_s))
    content = b".".join((message_id.encode(), timestamp.encode(), body))
    signature = base64.b64encode(hmac.new(secret, content, hashlib.sha256).digest()).decode()
    return {
        "content-type": "application/json",
        "webhook-id": message_id,
        "webhook-timestamp": timestamp,
        "webhook-signature": f"v1,{signature}",
    }


async def send(client: httpx2.AsyncClient, url: str, body: bytes, headers: dict[str, str]) -> int | str:
    """Sends a message; returns the status of the answer, or what went wrong."""
    try:
        async with client.stream("POST", url, content=body, headers=headers, follow_redirects=False) as response:
            return response.status_code  # the body of an answer is of no interest, and could be endless
    except httpx2.HTTPError as error:
        return type(error).__name__


def begun(webhook: Webhook, *, now_s: float) -> Webhook:
    """A try begins; if nothing more is heard of it, another may begin after a pause."""
    pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**webhook.tries) * random.uniform(0.75, 1.25)  # noqa: S311
    return webhook.model_copy(update={"tries": webhook.tries + 1, "next_s": now_s + SEND_TIMEOUT_S + pause_s})


def ended(webhook: Webhook, answer: int | str, *, now_s: float, give_up_at_s: float) -> Webhook:
    """A try has ended: with a status, or with words about what went wrong."""
    if isinstance(answer, int) and 200 <= answer < 300:
        return webhook.model_copy(update={"status": "delivered"})
    next_s = max(now_s, webhook.next_s - SEND_TIMEOUT_S)  # the pause alone: nobody waits for an answer any more
    if answer == 410 or next_s > give_up_at_s:
        return webhook.model_copy(update={"status": "given_up"})
    return webhook.model_copy(update={"next_s": next_s})


def _host(text: str) -> tuple[str, int | None]:
    try:
        parts = urlsplit(f"//{text}")
        port = parts.port
    except ValueError:
        parts = None
    host = parts.hostname if parts is not None and parts.netloc == text else None
    if host is None or not _HOST.fullmatch(host) or "@" in text or text[-1] == ":":
        raise ConfigError(f"webhook_hosts has {text!r}; each must be a host or host:port", param="webhook_hosts")
    return host, port


def _secret(file: str | None) -> bytes:
    where = f"the file {file}" if file is not None else f"environment variable {SECRET_VARIABLE}"
    try:
        text = os.environ.get(SECRET_VARIABLE, "") if file is None else Path(file).read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"webhook_secret_file is {file!r}, which cannot be read: {error}") from error
    # The messages never show what was found.
    if not text.strip():
        raise ConfigError(f"webhook_hosts needs a secret to sign with; {where} holds none")
    try:
        secret = base64.b64decode(text.strip().removeprefix(_SECRET_PREFIX), validate=True)
    except binascii.Error as error:
        raise ConfigError(f"the webhook secret in {where} must be {_SECRET_PREFIX} and base64") from error
    if not _MIN_SECRET_BYTES <= len(secret) <= _MAX_SECRET_BYTES:
        allowed = f"it must have {_MIN_SECRET_BYTES} to {_MAX_SECRET_BYTES}"
        raise ConfigError(f"the webhook secret in {where} has {len(secret)} bytes; {allowed}")
    return secret
