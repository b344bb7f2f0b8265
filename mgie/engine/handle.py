"""What a caller holds of an edit that runs elsewhere: its result, how far it is, and the means to call it off.

Knows nothing of models. Whoever does the work never waits for a reader: of progress only the newest is kept, and
previews are few.
"""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from typing import Literal

from PIL import Image

Phase = Literal["waiting", "encoding", "denoising", "decoding", "done", "failed", "cancelled"]


@dataclass(frozen=True, kw_only=True)
class EditProgress:
    """How far an edit is."""

    phase: Phase
    position: int | None
    "place in the line, from 0; None once it is out of it"
    step: int
    "steps that each of its images has done"
    num_steps: int
    "steps that each needs"


@dataclass(frozen=True, kw_only=True)
class EditRun:
    """How an edit that is done was run. Times are seconds."""

    waiting_s: float
    "in line"
    encode_s: float
    "from leaving the line until it could take its first step"
    join_s: float
    "from submission to its first step"
    join_steps: int
    "steps of others that were begun between its being encoded and its first step"
    denoise_s: float
    "from its first step to its last"
    decode_s: float
    "from its last step to its result"
    mean_batch_size: float
    "samples per step, over its own steps"


@dataclass(frozen=True, kw_only=True)
class Started:
    """The edit has left the line."""


@dataclass(frozen=True, kw_only=True)
class Stepped:
    """A denoising step was done."""

    step: int
    num_steps: int


@dataclass(frozen=True, kw_only=True)
class Previewed:
    """What the first image is going to be."""

    image: Image.Image
    number: int
    "from 0"
    step: int


@dataclass(frozen=True, kw_only=True)
class Done:
    """The last event of an edit that went well."""

    images: list[Image.Image]


@dataclass(frozen=True, kw_only=True)
class Failed:
    """The last event of any other; CancelledError for one that was called off."""

    error: BaseException


EditEvent = Started | Stepped | Previewed | Done | Failed


class EventQueue:
    """Events that one reader has not taken yet: the newest `Stepped` only, and all others."""

    def __init__(self) -> None:
        self._events: list[EditEvent] = []
        self._changed = threading.Condition()
        self._wake: Callable[[], object] | None = None

    def put(self, event: EditEvent) -> None:
        """Never waits."""
        with self._changed:
            if isinstance(event, Stepped):
                self._events = [kept for kept in self._events if not isinstance(kept, Stepped)]
            self._events.append(event)
            self._changed.notify()
            wake = self._wake
        if wake is not None:
            wake()

    def take(self, *, wait: bool) -> list[EditEvent]:
        """All events that are there, oldest first."""
        with self._changed:
            while wait and not self._events:
                self._changed.wait()
            events, self._events = self._events, []
            return events

    def on_event(self, wake: Callable[[], object]) -> None:
        """Has `wake` called after each event from now on, from the thread that puts it."""
        with self._changed:
            self._wake = wake


class EditHandle:
    """One edit as its caller sees it. Its events are for one reader, who takes them by `events` or by `stream`.

    Args:
        result: The images in the order of their seeds, or why there are none. Cancelling it (as `asyncio` does to
            what a cancelled task awaits through `asyncio.wrap_future`) calls the edit off.
        events: Where the engine puts them. progress, run: Ask the engine.
    """

    def __init__(
        self,
        *,
        result: "Future[list[Image.Image]]",
        events: EventQueue,
        progress: Callable[[], EditProgress],
        run: Callable[[], EditRun],
    ) -> None:
        self.result, self._events, self._progress, self._run = result, events, progress, run

    @property
    def progress(self) -> EditProgress:
        """How far the edit is."""
        return self._progress()

    @property
    def run(self) -> EditRun:
        """How the edit was run; only once it is done."""
        return self._run()

    def cancel(self) -> bool:
        """Calls the edit off: it takes part in no step that is not running yet. False where it has ended already."""
        return self.result.cancel()

    def events(self) -> Iterator[EditEvent]:
        """Events until the last, `Done` or `Failed`; blocks between them."""
        while True:
            for event in self._events.take(wait=True):
                yield event
                if isinstance(event, Done | Failed):
                    return

    async def stream(self) -> AsyncIterator[EditEvent]:
        """The same from a coroutine. Giving up reading does not call the edit off."""
        loop, woken = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads any more
                loop.call_soon_threadsafe(woken.set)

        self._events.on_event(wake)
        while True:
            for event in self._events.take(wait=False):
                yield event
                if isinstance(event, Done | Failed):
                    return
            await woken.wait()
            woken.clear()


def last_event(result: "Future[list[Image.Image]]") -> Done | Failed:
    """The event that says how a finished edit ended."""
    if result.cancelled():
        return Failed(error=CancelledError())
    error = result.exception()
    return Done(images=result.result()) if error is None else Failed(error=error)


@dataclass(frozen=True, kw_only=True)
class StepDone:
    """A denoising step."""

    seconds: float
    rows: int


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """What the engine has done and is doing. Each submitted edit but probes is in exactly one of the seven counts."""

    num_done: int
    num_failed: int
    num_cancelled: int
    num_overdue: int
    num_refused: int
    "for want of room"
    num_waiting: int
    num_in_flight: int
    "admitted and not done: being encoded, denoised or decoded"
    pixels_in_flight: int
    work_done: int
    "pixel-steps: work pixels times rows of each step and image"
    work_left: int
    "pixel-steps still to come, of all edits that have not ended"
    num_denoising: int
    "samples that take turns"
    num_steps: int
    "batches run, those that failed not counted"
    mean_batch_size: float
    "samples per batch; 0 before the first"
    max_batch_rows: int
    "as given, or what was left of it when memory ran out; it grows back by and by"
    num_out_of_memory: int
    "calls of the model that failed for want of memory; most are made again, with fewer samples or alone"
    max_steps_after_end: int
    "most steps that an edit took part in after its caller or its deadline had ended it"
