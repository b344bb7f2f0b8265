"""Whether a model works: proven by what it does for edits, or, when it has nothing to do, by a trial.

Knows nothing of models, Ray or HTTP.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable


class Health:
    """The health of one model.

    A trial that raises fails its own check only, so that one hiccup replaces no replica. One that hangs fails all later
    checks at once, until the model does something again: whoever counts failed checks need not wait for a hanging one
    each time.

    Args:
        trial: Has the model do a little real work.
        period_s: For how long work that was done proves that the model works.
        timeout_s: When a trial is taken to hang.
        clock: Seconds, as `time.monotonic`.
    """

    def __init__(
        self,
        trial: Callable[[], Awaitable[object]],
        *,
        period_s: float,
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._trial, self._period_s, self._timeout_s, self._clock = trial, period_s, timeout_s, clock
        self._worked_s: float | None = None
        self._hangs = False

    def note_work(self) -> None:
        """The model has done something just now; from any thread."""
        self._worked_s, self._hangs = self._clock(), False

    async def check(self) -> None:
        """Returns if the model works.

        Raises:
            RuntimeError: It does not.
        """
        if self._hangs:
            raise RuntimeError("the model has done nothing since a trial of it hung")
        started_s = self._clock()
        if self._worked_s is not None and started_s - self._worked_s < self._period_s:
            return
        deadline = asyncio.timeout(self._timeout_s)
        try:
            async with deadline:
                await self._trial()
        except Exception as error:  # whatever a model raises
            if isinstance(error, TimeoutError) and deadline.expired():
                if self._worked_s is not None and self._worked_s > started_s:
                    return  # it is slow, and works
                self._hangs = True
                raise RuntimeError(f"a trial of the model was not done within {self._timeout_s:g} s") from error
            raise RuntimeError(f"a trial of the model failed: {error}") from error
        self.note_work()
