"""API keys: a file of them, kept in step with it, and the search for one.

Of a key its SHA-256 is stored, never itself. A fast hash is right here: a key is 32 random bytes, so no list of likely
ones can be tried, which is what slow hashes are against. Knows nothing of HTTP.
"""

import asyncio
import hashlib
import hmac
import logging
import os
import re
import secrets
import time
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import AwareDatetime, Field, ValidationError

from mgie.errors import ConfigError
from serving.access.limits import Allowance, KeyLimits
from serving.errors import UnknownKeyError
from serving.schema import Priority

logger = logging.getLogger("serving.access.keys")

PREFIX, NUM_RANDOM_BYTES = "mgie-", 32
WATCH_EVERY_S = 3.0
VARIABLE = "MGIE_API_KEYS"  # environment variable with the same text as the file


class ApiKey(KeyLimits):
    """One entry of the file."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9_-]{1,64}$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    priority: Priority | None = None
    "None: interactive, and batch for jobs"
    expires: AwareDatetime | None = None


@dataclass(frozen=True)
class Caller:
    """Whose request it is."""

    key: ApiKey
    allowance: Allowance


def new_key() -> tuple[str, str]:
    """A key, to be given to its user and not kept, and its SHA-256, to be kept."""
    key = PREFIX + secrets.token_urlsafe(NUM_RANDOM_BYTES)
    return key, _digest(key)


def read_keys(text: str, *, where: str) -> dict[str, ApiKey]:
    """The keys of a TOML text, by name.

    Args:
        where: Names the text in errors, which quote nothing of it but names: somebody may have put a key there.

    Raises:
        ConfigError: It is no TOML, or an entry is wrong.
    """
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{where} is no TOML: {error}") from None
    entries = content.get("keys")
    if set(content) != {"keys"} or not isinstance(entries, list) or not entries:
        raise ConfigError(
            f"{where} holds {', '.join(content) or 'nothing'}; it must hold one [[keys]] per key, no more"
        )
    keys: dict[str, ApiKey] = {}
    hashes: dict[str, str] = {}
    for number, entry in enumerate(entries, 1):
        key = _read_key(entry, f"{where}, key {number}")
        if key.name in keys:
            raise ConfigError(f"{where}, key {number}: name is {key.name!r}, as that of another; names must differ")
        if key.sha256 in hashes:
            raise ConfigError(f"{where}, key {number}: sha256 is that of {hashes[key.sha256]!r}; they must differ")
        keys[key.name], hashes[key.sha256] = key, key.name
    return keys


def _read_key(entry: Any, where: str) -> ApiKey:
    name = entry.get("name") if isinstance(entry, dict) else None
    if isinstance(name, str) and re.fullmatch(r"[a-z0-9_-]{1,64}", name):
        where += f" ({name})"
    try:
        return ApiKey.model_validate(entry)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in problem["loc"]) or "entry"
        allowed = {
            "name": "must be 1 to 64 of a-z, 0-9, _ and -",
            "sha256": "must be the 64 hexadecimal digits (0-9, a-f) of the key's SHA-256",
            "expires": "must be a time with its zone, as 2030-01-31T12:00:00Z",
        }.get(field, problem["msg"].replace("Input should be", "must be"))
        if problem["type"] in {"missing", "extra_forbidden"}:
            fields = ", ".join(ApiKey.model_fields)
            allowed = "is missing" if problem["type"] == "missing" else f"is no field of a key; these are: {fields}"
        raise ConfigError(f"{where}: {field} {allowed}") from None


class KeyRing:
    """The valid keys, and what each has left.

    Args:
        file: Read again when it changes; None: there is none.
        text: More of the same, as from the environment.
        num_sharing: Ingress replicas, see `Allowance`.
        now: Unix time.
        clock: Seconds, for the limits.

    Raises:
        ConfigError: The file cannot be read; something in it or in the text is wrong, or a name is in both.
    """

    def __init__(
        self,
        file: Path | None = None,
        text: str = "",
        *,
        num_sharing: int = 1,
        now: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._file, self._text, self._now = file, text, now
        self._new_allowance = partial(Allowance, num_sharing=num_sharing, clock=clock)
        self.callers: tuple[Caller, ...] = ()
        "in the order of the file"
        self._seen: tuple[int, ...] | str | None = None
        self.reload()

    def find(self, key: str) -> Caller:
        """Whose key it is.

        Raises:
            UnknownKeyError: Nobody's, or it has expired.
        """
        digest = _digest(key)
        found: Caller | None = None
        # All are compared, each in constant time: how long it takes tells nothing.
        for caller in self.callers:
            if hmac.compare_digest(caller.key.sha256, digest):
                found = caller
        if found is None:
            raise UnknownKeyError("the API key is not valid", code="invalid_api_key")
        if found.key.expires is not None and found.key.expires.timestamp() <= self._now():
            raise UnknownKeyError("the API key has expired", code="invalid_api_key")
        return found

    def reload(self) -> None:
        """Reads the file, if it has changed. Raises ConfigError and changes nothing where it is wrong."""
        self._use(self._changed())

    async def watch(self) -> None:
        """Follows the file; a new one that is wrong leaves the keys as they are. Never returns."""
        while True:
            await asyncio.sleep(WATCH_EVERY_S)
            try:
                self._use(await asyncio.to_thread(self._changed))
            except ConfigError as error:
                logger.error("the keys stay as they were: %s", error)  # noqa: TRY400  it says all

    def _changed(self) -> dict[str, ApiKey] | None:
        """The keys, if there are others now; on any thread."""
        state = self._state()
        if state == self._seen:
            return None
        self._seen = state  # also of a wrong file: it is told of once
        return self._read()

    def _state(self) -> tuple[int, ...] | str:
        """What differs when the file is another."""
        if self._file is None:
            return ""
        try:
            state = self._file.stat()
        except OSError as error:
            return str(error)
        return state.st_mtime_ns, state.st_size, state.st_ino

    def _read(self) -> dict[str, ApiKey]:
        keys = read_keys(self._text, where=VARIABLE) if self._text else {}
        if self._file is not None:
            try:
                text = self._file.read_text(encoding="utf-8-sig")
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"keys_file {self._file} cannot be read: {error}", param="keys_file") from None
            for name, key in read_keys(text, where=f"keys_file {self._file}").items():
                if name in keys or key.sha256 in {other.sha256 for other in keys.values()}:
                    raise ConfigError(f"key {name!r} is in keys_file {self._file} and in {VARIABLE}; one must go")
                keys[name] = key
        return keys

    def _use(self, keys: Mapping[str, ApiKey] | None) -> None:
        """Takes the keys over; those that were there go on with what they have left."""
        if keys is None:
            return
        allowances = {caller.key.name: caller.allowance for caller in self.callers}
        callers = []
        for key in keys.values():
            allowance = allowances.get(key.name) or self._new_allowance(key)
            allowance.limit(key)
            callers.append(Caller(key, allowance))
        self.callers = tuple(callers)
        logger.info("%d API keys are valid: %s", len(keys), ", ".join(keys))


def open_keys(file: str | None, *, num_sharing: int) -> KeyRing | None:
    """The keys of a service, from its file and the environment; None: there are none, it is open to everybody.

    Raises:
        ConfigError: See `KeyRing`.
    """
    text = os.environ.get(VARIABLE, "")
    return KeyRing(Path(file) if file else None, text, num_sharing=num_sharing) if file or text else None


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
