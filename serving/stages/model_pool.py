"""Models loaded on demand, a few at a time: least recently used out, but never under somebody's feet.

Whoever uses a model holds it. When a model is wanted and there is no room, the one used least recently is let go:
its users end, new ones line up, it is closed, and only then is the other loaded, so that never more than
`max_loaded` are in memory. Everybody who lined up for a model gets it together; so under load from more models than
fit, each in turn serves all that waits for it, and none waits for ever.

Knows nothing of what a model is, nor of Ray or HTTP.
"""

import asyncio
import contextlib
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from mgie.errors import ClosedError, ConfigError
from serving.errors import ModelUnavailableError

ModelT = TypeVar("ModelT")


@dataclass(kw_only=True, eq=False)
class _Slot(Generic[ModelT]):
    """Room for one model."""

    name: str
    loaded: "Future[ModelT]"
    num_users: int = 0
    is_leaving: bool = False
    "somebody waits for its room: it takes no new users"


@dataclass(kw_only=True, eq=False)
class _Waiter(Generic[ModelT]):
    """Somebody who wants a model that is not there, or is leaving."""

    name: str
    slot: "Future[_Slot[ModelT]]" = field(default_factory=Future)


class ModelPool(Generic[ModelT]):
    """At most `max_loaded` models by name; for any thread and event loop.

    Args:
        load: Makes a model; runs on a thread of its own.
        close: Frees one; runs there, too, before the next is loaded.
        max_loaded: At least 1.

    Raises:
        ConfigError: `max_loaded` is below 1.
    """

    def __init__(self, load: Callable[[str], ModelT], close: Callable[[ModelT], None], *, max_loaded: int) -> None:
        if max_loaded < 1:
            raise ConfigError(f"max_loaded is {max_loaded}; it must be at least 1", param="max_loaded")
        self._load, self._close, self._max_loaded = load, close, max_loaded
        self._slots: OrderedDict[str, _Slot[ModelT]] = OrderedDict()  # the one used last at the end
        self._waiters: list[_Waiter[ModelT]] = []  # oldest first
        self._lock = threading.Lock()
        self._is_closed = False

    @contextlib.asynccontextmanager
    async def use(self, name: str) -> AsyncIterator[ModelT]:
        """The model, loaded if need be; it stays until the block ends.

        Raises:
            ModelUnavailableError: It cannot be loaded. The next who wants it tries again.
            ClosedError: The pool is closed.
        """
        waiter: _Waiter[ModelT] = _Waiter(name=name)
        with self._lock:
            if self._is_closed:
                raise ClosedError("the pool is closed")
            self._waiters.append(waiter)
            self._settle()
        try:
            slot = await asyncio.wrap_future(waiter.slot)
        except asyncio.CancelledError:
            self._give_up(waiter)
            raise
        try:
            yield await asyncio.wrap_future(slot.loaded)
        finally:
            self._release(slot)

    def add(self, name: str, model: ModelT) -> None:
        """Takes in a model that is loaded already, into an empty pool."""
        slot: _Slot[ModelT] = _Slot(name=name, loaded=Future())
        slot.loaded.set_result(model)
        with self._lock:
            self._slots[name] = slot

    @property
    def is_open(self) -> bool:
        """Whether it has not been closed."""
        return not self._is_closed

    def models(self) -> dict[str, ModelT]:
        """Models that are loaded, by name."""
        with self._lock:
            return {
                slot.name: slot.loaded.result()
                for slot in self._slots.values()
                if slot.loaded.done() and slot.loaded.exception() is None
            }

    def close(self) -> None:
        """Closes all models, used or not."""
        with self._lock:
            self._is_closed = True
            slots, waiters = list(self._slots.values()), self._waiters
            self._slots.clear()
            self._waiters = []
        for waiter in waiters:
            if waiter.slot.set_running_or_notify_cancel():
                waiter.slot.set_exception(ClosedError("the pool was closed"))
        for slot in slots:
            with contextlib.suppress(ModelUnavailableError):
                self._close(slot.loaded.result())

    # ---- below: callers hold the lock, but for those of `_give_up`, `_release` and `_fill`

    def _settle(self) -> None:
        """Gives waiters what is there, and makes room for the oldest of the rest."""
        while self._waiters:
            name = self._waiters[0].name
            slot = self._slots.get(name)
            if slot is None:
                leaving = self._make_room()
                if leaving is None:
                    break
                slot = self._slots[name] = _Slot(name=name, loaded=Future())
                slot.loaded.set_running_or_notify_cancel()  # from now on one user's cancel is not that of all
                threading.Thread(target=self._fill, args=(slot, leaving), name=f"load {name}", daemon=True).start()
            slot.is_leaving = False  # whoever its room was for has given up
            self._seat(slot)
        for slot in list(self._slots.values()):
            if not slot.is_leaving:
                self._seat(slot)

    def _seat(self, slot: _Slot[ModelT]) -> None:
        """Hands the slot to all that wait for it."""
        for waiter in [waiter for waiter in self._waiters if waiter.name == slot.name]:
            self._waiters.remove(waiter)
            if waiter.slot.set_running_or_notify_cancel():
                slot.num_users += 1
                self._slots.move_to_end(slot.name)
                waiter.slot.set_result(slot)

    def _make_room(self) -> Sequence[_Slot[ModelT]] | None:
        """What must be closed before another is loaded; None while that is in use."""
        if len(self._slots) < self._max_loaded:
            return ()
        slots = list(self._slots.values())
        oldest = next((slot for slot in slots if slot.is_leaving), slots[0])
        oldest.is_leaving = True
        if oldest.num_users:
            return None
        del self._slots[oldest.name]
        return (oldest,)

    def _give_up(self, waiter: _Waiter[ModelT]) -> None:
        if waiter.slot.cancel() or waiter.slot.exception() is not None:
            with self._lock:
                if waiter in self._waiters:
                    self._waiters.remove(waiter)
                self._settle()
        else:  # it was given the slot just before
            self._release(waiter.slot.result())

    def _release(self, slot: _Slot[ModelT]) -> None:
        with self._lock:
            slot.num_users -= 1
            self._settle()

    def _fill(self, slot: _Slot[ModelT], leaving: Sequence[_Slot[ModelT]]) -> None:
        """Loads a model; runs on a thread of its own."""
        try:
            for old in leaving:
                with contextlib.suppress(ModelUnavailableError):
                    self._close(old.loaded.result())
                old.loaded = Future()  # or it would keep the model in memory while the next is loaded
            slot.loaded.set_result(self._load(slot.name))
        except Exception as error:  # noqa: BLE001  whatever a damaged file raises; those who wait for this one get it
            with self._lock:
                if self._slots.get(slot.name) is slot:
                    del self._slots[slot.name]
                self._settle()
            failure = ModelUnavailableError(f"model {slot.name!r} cannot be loaded: {error}", param="model")
            failure.__cause__ = error
            slot.loaded.set_exception(failure)
