"""Waiting for what will come, however slow the machine is: pytest's time limit of a test ends what never comes."""

import asyncio
import time
from collections.abc import Callable

POLL_S = 0.01


def until(is_so: Callable[[], object], *, poll_s: float = POLL_S) -> None:
    """Returns when it is so; asks again and again, for what tells nobody of it."""
    while not is_so():
        time.sleep(poll_s)


async def until_async(is_so: Callable[[], object], *, poll_s: float = POLL_S) -> None:
    """The same, while the event loop goes on."""
    while not is_so():  # noqa: ASYNC110  threads and processes set no event of this loop
        await asyncio.sleep(poll_s)


def pass_time(seconds: float) -> None:
    """Moves the clock of the running event loop, by which deadlines of its tasks end."""
    loop = asyncio.get_running_loop()
    clock = loop.time
    loop.time = lambda: clock() + seconds  # type: ignore[method-assign]
