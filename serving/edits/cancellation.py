"""Calling an edit off by its id, from any replica of the ingress.

Every ingress replica knows the edits that it runs itself. One board, shared by all, passes a request to the others:
each replica listens to it all the time, in long polls, and tells with the next poll what became of the last. So an
edit costs the board nothing, and a board that is gone fails no edit: what cannot be called off meanwhile is only
what runs in another replica than the one asked.

Knows neither HTTP nor Ray: `app.py` makes the board a deployment, tests use it as it is.
"""

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from serving.errors import BoardError, CancelledEditError

T = TypeVar("T")

logger = logging.getLogger("serving.edits.cancellation")

POLL_S = 10.0  # a poll that found nothing to do ends, so that the board notices who is gone
FORGET_S = 2 * POLL_S  # a replica not heard of for so long has ended
ANSWER_S = 3.0  # in which every replica should say whether the edit was its own
RETRY_S = 0.5  # before a board that failed is asked again
SETTLE_S = 5.0  # until every replica has found a board that took the place of another


def owned_id(edit_id: str, owner: str) -> str:
    """Names an edit among those of all owners, which are names of API keys or "": clients may choose the ids."""
    return f"{owner}/{edit_id}" if owner else edit_id


class Board(Protocol):
    """What replicas of the ingress share."""

    async def listen(self, replica: str, answers: Mapping[int, bool]) -> Sequence[tuple[int, str]]:
        """Numbers and edit ids of requests to call off, as soon as there are any, or none after `POLL_S`.

        Args:
            replica: Who listens.
            answers: To the requests of the last poll, by their numbers: whether the edit ran there.
        """
        ...

    async def cancel(self, edit_id: str) -> bool | None:
        """Whether some replica ran the edit and has called it off; None: not all have answered in time."""
        ...


@dataclass(kw_only=True)
class _Listener:
    heard_s: float
    requests: "asyncio.Queue[tuple[int, str]]" = field(default_factory=asyncio.Queue)


@dataclass(kw_only=True)
class _Request:
    asked: set[str]
    "replicas that have not answered yet"
    outcome: "asyncio.Future[bool]"


class CancelBoard:
    """The one board of an application; see `Board`.

    Args:
        clock: Seconds, as `time.monotonic`.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._listeners: dict[str, _Listener] = {}
        self._requests: dict[int, _Request] = {}
        self._num_requests = 0
        self._started_s = clock()

    async def listen(self, replica: str, answers: Mapping[int, bool]) -> list[tuple[int, str]]:
        """See `Board`."""
        listener = self._listeners.setdefault(replica, _Listener(heard_s=0.0))
        listener.heard_s = self._clock()
        for number, was_running in answers.items():
            if number in self._requests:
                self._note(self._requests[number], replica, was_running=was_running)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(POLL_S):
                found = [await listener.requests.get()]
                while not listener.requests.empty():
                    found.append(listener.requests.get_nowait())
                return found
        return []

    async def cancel(self, edit_id: str) -> bool | None:
        """See `Board`."""
        now_s = self._clock()
        self._listeners = {
            name: listener for name, listener in self._listeners.items() if now_s - listener.heard_s < FORGET_S
        }
        self._num_requests += 1
        number = self._num_requests
        request = _Request(asked=set(self._listeners), outcome=asyncio.get_running_loop().create_future())
        self._requests[number] = request
        for listener in self._listeners.values():
            listener.requests.put_nowait((number, edit_id))
        try:
            async with asyncio.timeout(ANSWER_S):
                if request.asked and await request.outcome:
                    return True
        except TimeoutError:
            return None
        finally:
            del self._requests[number]
        # One that has just begun may not know all replicas yet.
        return False if now_s - self._started_s > SETTLE_S else None

    def _note(self, request: _Request, replica: str, *, was_running: bool) -> None:
        request.asked.discard(replica)
        if (was_running or not request.asked) and not request.outcome.done():
            request.outcome.set_result(was_running)


@dataclass(eq=False)
class _Running:
    task: asyncio.Task[Any]
    is_called_off: bool = False


class RunningEdits:
    """The edits of this process that can be called off.

    Args:
        board: How to reach those of other replicas; None: there are none.
    """

    def __init__(self, board: Board | None = None) -> None:
        self._board = board
        self._replica = secrets.token_hex(8)
        self._running: dict[str, set[_Running]] = {}

    async def run(self, edit_id: str, work: Coroutine[Any, Any, T]) -> T:
        """Awaits the work of an edit, which `cancel` ends; a repeated id stands for all its edits.

        Raises:
            CancelledEditError: It was called off.
            Exception: What the work raises.
        """
        task = asyncio.current_task()
        assert task is not None
        edit = _Running(task)
        self._running.setdefault(edit_id, set()).add(edit)
        try:
            return await work
        except asyncio.CancelledError:
            # As asyncio.timeout does: cancelled by somebody else as well, it stays cancelled.
            if edit.is_called_off and task.uncancel() == 0:
                raise CancelledEditError("the edit was cancelled by its id") from None
            raise
        finally:
            self._running[edit_id].remove(edit)
            if not self._running[edit_id]:
                del self._running[edit_id]

    async def cancel(self, edit_id: str) -> bool:
        """Calls an edit off, here or in another replica; False: it is unknown, or has ended.

        Raises:
            BoardError: It does not run here, and the others cannot be asked.
        """
        if self._cancel_here(edit_id):
            return True
        if self._board is None:
            return False
        is_cancelled = None
        with contextlib.suppress(TimeoutError):  # a board that is being replaced does not even refuse
            async with asyncio.timeout(2 * ANSWER_S):
                is_cancelled = await self._board.cancel(edit_id)
        if is_cancelled is None:
            raise BoardError("not every replica has said whether it runs the edit; try again")
        return is_cancelled

    async def listen(self) -> None:
        """Does what the board asks for; never returns."""
        answers: dict[int, bool] = {}
        while self._board is not None:
            try:
                requests = await self._board.listen(self._replica, answers)
            except Exception as error:  # noqa: BLE001  a board may die in many ways, and is replaced
                logger.warning("the board of cancels does not answer: %s", error)
                answers = {}
                await asyncio.sleep(RETRY_S)
                continue
            answers = {number: self._cancel_here(edit_id) for number, edit_id in requests}

    def _cancel_here(self, edit_id: str) -> bool:
        edits = self._running.get(edit_id, ())
        for edit in edits:
            if not edit.is_called_off:
                edit.is_called_off = True
                edit.task.cancel()
        return bool(edits)
