"""One way to give up what takes too long."""

import asyncio
import contextlib
from collections.abc import AsyncIterator


@contextlib.asynccontextmanager
async def within(left_s: float | None, late: Exception) -> AsyncIterator[None]:
    """Raises `late` when the block takes longer; a timeout of anything else inside passes as it is.

    Args:
        left_s: Seconds; None: there is no limit.
        late: Made beforehand, so that it can be told from an error of the same class inside.
    """
    deadline = asyncio.timeout(left_s)
    try:
        async with deadline:
            yield
    except TimeoutError as error:
        if not deadline.expired():
            raise
        raise late from error
