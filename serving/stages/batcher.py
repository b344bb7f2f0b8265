"""A greedy batcher: whenever its worker is free, it takes all that waits and fits together.

`@serve.batch` closes a batch before the worker is free; while one batch runs, late arrivals end up in
batches of one behind it. Here nothing is decided until the worker asks for work, so a batch is as large
as the load allows and a lone item never waits for company.

Knows nothing of models, images, Ray or HTTP. One thread runs the work, so a model behind it needs no
locks; callers await from any event loop.
"""

import asyncio
import bisect
import math
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from mgie.errors import ClosedError, ConfigError

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


@dataclass(frozen=True, kw_only=True)
class BatchRun:
    """How one item was run."""

    batch: int
    "number of the batch among those of this batcher, from 0"
    batch_size: int
    "items in that batch; 1 after a retry alone"
    queue_s: float
    "seconds from submission to the start of the batch"
    run_s: float
    "seconds from the start of the batch to this item's result"


@dataclass(frozen=True, kw_only=True)
class Batched(Generic[ResultT]):
    """A result and how it came about."""

    result: ResultT
    run: BatchRun


@dataclass(frozen=True, kw_only=True)
class BatcherStats:
    """Counts since the batcher started; an item that is retried alone counts once more."""

    num_items: int
    num_batches: int
    num_failed: int
    "items whose future got an exception"
    num_dropped: int
    "items whose caller went away before their batch started"
    num_cancelled: int
    "items whose caller went away while their batch ran"
    num_waiting: int
    num_running: int
    "items of the running batch that somebody waits for"

    @property
    def mean_batch_size(self) -> float:
        """Items per batch; 0 before the first one."""
        return self.num_items / self.num_batches if self.num_batches else 0.0


@dataclass(kw_only=True, eq=False)
class _Entry(Generic[ItemT, ResultT]):
    item: ItemT
    key: Hashable
    submitted_at: float
    order: float
    "who waits is served in this order"
    future: "Future[Batched[ResultT]]" = field(default_factory=Future)
    is_wanted: bool = True
    "false: its caller went away while its batch ran"

    @property
    def is_open(self) -> bool:
        return self.is_wanted and not self.future.done()


class GreedyBatcher(Generic[ItemT, ResultT]):
    """Runs `work` over batches of waiting items, on one thread of its own.

    Args:
        work: Takes the items of a batch and a function that says whether an item (by its index) is still wanted,
            yields `(index, result)` in any order; each result is handed to its caller at once. Nothing need be
            yielded for what is not wanted any more. An exception fails a lone item; the unfinished items of a
            larger batch are then run one by one, so that only the guilty one fails.
        key: Compatibility of an item; a batch holds items of one key.
        max_batch_size: Largest batch; at least 1.
        name: Name of the thread, for stack dumps.

    Raises:
        ConfigError: `max_batch_size` is below 1.
    """

    def __init__(
        self,
        work: Callable[[Sequence[ItemT], Callable[[int], bool]], Iterable[tuple[int, ResultT]]],
        *,
        key: Callable[[ItemT], Hashable],
        max_batch_size: int,
        name: str,
    ) -> None:
        if max_batch_size < 1:
            raise ConfigError(f"max_batch_size is {max_batch_size}; it must be at least 1", param="max_batch_size")
        self._work = work
        self._key = key
        self._max_batch_size = max_batch_size
        self._waiting: list[_Entry[ItemT, ResultT]] = []  # in order
        self._changed = threading.Condition()
        self._is_closed = False
        self._num_items = self._num_batches = self._num_failed = self._num_dropped = self._num_cancelled = 0
        self._running: list[_Entry[ItemT, ResultT]] = []
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    async def submit(self, item: ItemT, *, queue_delay_s: float = 0.0, is_urgent: bool = False) -> Batched[ResultT]:
        """Waits for the item's result. Cancelling the caller drops the item, or tells its running batch.

        Args:
            item: What to run.
            queue_delay_s: It lets those pass that come so much later, and nobody after them.
            is_urgent: It goes before all that wait.

        Raises:
            ClosedError: The batcher is closed.
            Exception: Whatever `key` or `work` raised for this item.
        """
        now_s = time.monotonic()
        order = -math.inf if is_urgent else now_s + queue_delay_s
        entry: _Entry[ItemT, ResultT] = _Entry(item=item, key=self._key(item), submitted_at=now_s, order=order)
        with self._changed:
            if self._is_closed:
                raise ClosedError("the batcher is closed")
            bisect.insort(self._waiting, entry, key=lambda waiting: waiting.order)
            self._changed.notify()
        try:
            return await asyncio.wrap_future(entry.future)
        except asyncio.CancelledError:
            if not entry.future.cancel() and entry.is_open:  # it runs
                with self._changed:
                    entry.is_wanted = False
                    self._num_cancelled += 1
            raise

    def stats(self) -> BatcherStats:
        """Counts so far."""
        with self._changed:
            return BatcherStats(
                num_items=self._num_items,
                num_batches=self._num_batches,
                num_failed=self._num_failed,
                num_dropped=self._num_dropped,
                num_cancelled=self._num_cancelled,
                num_waiting=len(self._waiting),
                num_running=sum(entry.is_open for entry in self._running),
            )

    def is_alive(self) -> bool:
        """Whether items submitted now will be run."""
        return self._thread.is_alive() and not self._is_closed

    def close(self) -> None:
        """Lets the running batch end, fails what still waits, and ends the thread."""
        with self._changed:
            self._is_closed = True
            abandoned = list(self._waiting)
            self._waiting.clear()
            self._changed.notify()
        for entry in abandoned:
            if entry.future.set_running_or_notify_cancel():
                entry.future.set_exception(ClosedError("the batcher was closed before this item ran"))
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _serve(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._is_closed:
                    self._changed.wait()
                if self._is_closed:
                    return
                batch = self._take()
            if batch:
                self._run(batch)

    def _take(self) -> list[_Entry[ItemT, ResultT]]:
        """Removes the first in line and all that fit it, in order; the caller holds the lock."""
        key = self._waiting[0].key
        batch: list[_Entry[ItemT, ResultT]] = []
        left: list[_Entry[ItemT, ResultT]] = []
        for entry in self._waiting:
            if len(batch) == self._max_batch_size or entry.key != key:
                left.append(entry)
            # False says that the caller was cancelled; from True on it can no longer be.
            elif entry.future.set_running_or_notify_cancel():
                batch.append(entry)
            else:
                self._num_dropped += 1
        self._waiting = left
        return batch

    def _run(self, batch: list[_Entry[ItemT, ResultT]]) -> None:
        error = self._run_once(batch)
        if error is None:
            return
        unfinished = [entry for entry in batch if entry.is_open]
        if len(batch) == 1:
            self._fail(unfinished, error)
            return
        for entry in unfinished:
            lone_error = self._run_once([entry]) if entry.is_open else None
            if lone_error is not None:
                self._fail([entry], lone_error)

    def _run_once(self, batch: list[_Entry[ItemT, ResultT]]) -> Exception | None:
        """Runs the batch and delivers results as they come; returns what went wrong."""
        started_at = time.monotonic()
        with self._changed:
            number = self._num_batches
            self._num_batches += 1
            self._num_items += len(batch)
            self._running = batch
        try:
            for index, result in self._work([entry.item for entry in batch], lambda index: batch[index].is_wanted):
                entry = batch[index]
                if not entry.is_wanted:
                    continue
                run = BatchRun(
                    batch=number,
                    batch_size=len(batch),
                    queue_s=started_at - entry.submitted_at,
                    run_s=time.monotonic() - started_at,
                )
                entry.future.set_result(Batched(result=result, run=run))
            missing = sum(entry.is_open for entry in batch)
            if missing:
                return RuntimeError(f"the batch ended without a result for {missing} of {len(batch)} items")
        except Exception as error:  # noqa: BLE001  the loop must outlive whatever a model raises; the caller gets it
            return error
        finally:
            with self._changed:
                self._running = []
        return None

    def _fail(self, entries: list[_Entry[ItemT, ResultT]], error: Exception) -> None:
        with self._changed:
            self._num_failed += len(entries)
        for entry in entries:
            entry.future.set_exception(error)
