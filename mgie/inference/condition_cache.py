"""Conditions that were derived before: the same photo and words give the same, so that the MLLM need not run again.

Knows nothing of how a condition is derived, and needs no torch itself.
"""

import asyncio
import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar

from mgie.config import GenerationConfig
from mgie.errors import ConfigError

ConditionT = TypeVar("ConditionT")  # an `EditCondition`

DEFAULT_CACHE_BYTES = 64 * 2**20  # some 250 edits of a 7B bundle
_ENTRY_BYTES = 1024  # key, numbers and Python's own objects of an entry, roughly


@dataclass(frozen=True, kw_only=True)
class ConditionCacheStats:
    """Figures of one cache since it was made."""

    num_hits: int
    "the condition was there"
    num_joined: int
    "it was being derived for another, and was waited for"
    num_misses: int
    "derivations that were begun"
    num_entries: int
    num_bytes: int

    @property
    def hit_rate(self) -> float:
        """Share of the requests that needed no derivation of their own; 0 before the first one."""
        num_requests = self.num_hits + self.num_joined + self.num_misses
        return (self.num_hits + self.num_joined) / num_requests if num_requests else 0.0


def condition_key(
    image: bytes,
    instruction: str,
    *,
    expressive: str | None,
    generation: GenerationConfig | None,
    bundle: str,
    is_alone: bool = False,
) -> str:
    """What a condition depends on, as a digest.

    Args:
        image: Encoded photo; the same pixels in another encoding count as another photo.
        instruction: The user's words.
        expressive: The expressive instruction, if the user gives it; "" is one, None is none.
        generation: Settings; None = the bundle's own.
        bundle: Its identity.
        is_alone: It is derived in a batch of its own: what others share its batch would show in the last bits.
    """
    photo = hashlib.sha256(image).hexdigest()
    parts = [photo, instruction, expressive, None if generation is None else asdict(generation), bundle, is_alone]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class ConditionCache(Generic[ConditionT]):
    """The conditions used last, up to a number of bytes; safe to use from any thread and event loop.

    Callers share what they get and must not change it.

    Args:
        max_bytes: Limit for tensors and texts; with 0 nothing is kept, though equal requests at the same time still share.

    Raises:
        ConfigError: `max_bytes` is negative.
    """

    def __init__(self, max_bytes: int) -> None:
        if max_bytes < 0:
            raise ConfigError(f"max_bytes is {max_bytes}; it must be at least 0", param="max_bytes")
        self._max_bytes = max_bytes
        self._entries: OrderedDict[str, ConditionT] = OrderedDict()  # the one used last at the end
        self._pending: dict[str, Future[ConditionT | None]] = {}
        self._num_bytes = self._num_hits = self._num_joined = self._num_misses = 0
        self._lock = threading.Lock()

    async def get(self, key: str, derive: Callable[[], Awaitable[ConditionT]]) -> ConditionT:
        """The condition of a key: kept, being derived for another, or from `derive`.

        A failure or cancellation is that of its own caller: one who waited for it derives in its place.

        Args:
            key: See `condition_key`.
            derive: Called at most once.

        Raises:
            Exception: What `derive` raised.
        """
        while True:
            with self._lock:
                if key in self._entries:
                    self._num_hits += 1
                    self._entries.move_to_end(key)
                    return self._entries[key]
                others = self._pending.get(key)
                if others is None:
                    self._num_misses += 1
                    ours = self._pending[key] = Future()
                    ours.set_running_or_notify_cancel()  # from now on who stops waiting cannot cancel it for others
                    break
            shared = await asyncio.wrap_future(others)
            if shared is not None:
                with self._lock:
                    self._num_joined += 1
                return shared
        edit_condition = None
        try:
            edit_condition = await derive()
            return edit_condition
        finally:
            with self._lock:
                del self._pending[key]
                if edit_condition is not None:
                    self._keep(key, edit_condition)
            ours.set_result(edit_condition)

    def stats(self) -> ConditionCacheStats:
        """Figures so far."""
        with self._lock:
            return ConditionCacheStats(
                num_hits=self._num_hits,
                num_joined=self._num_joined,
                num_misses=self._num_misses,
                num_entries=len(self._entries),
                num_bytes=self._num_bytes,
            )

    def _keep(self, key: str, edit_condition: ConditionT) -> None:
        """The caller holds the lock."""
        size = _num_bytes(edit_condition)
        if size > self._max_bytes:
            return  # it would drive out all others, and then itself
        self._entries[key] = edit_condition
        self._num_bytes += size
        while self._num_bytes > self._max_bytes:
            _, oldest = self._entries.popitem(last=False)
            self._num_bytes -= _num_bytes(oldest)


def _num_bytes(edit_condition: Any) -> int:
    tensors = (edit_condition.condition, edit_condition.null_condition)
    # Of the storage: a view keeps all of what it looks at. A character takes up to four bytes.
    num_bytes: int = sum(t.untyped_storage().nbytes() for t in tensors)
    return num_bytes + 4 * len(edit_condition.expressive) + _ENTRY_BYTES
