"""Whether a model works: proven by what it does for edits, or, when it has nothing to do, by a probe.

Knows nothing of models, Ray or HTTP.
"""

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from serving.deadline import within
from serving.telemetry.metrics import Meter, unmetered


class Health:
    """The health of one model.

    A probe that raises fails its own check only, so that one hiccup replaces no replica. One that hangs fails all later
    checks at once, until the model does something again: whoever counts failed checks need not wait for a hanging one
    each time.

    Args:
        probe: Has the model do a little real work.
        period_s: For how long work that was done proves that the model works.
        timeout_s: When a probe is taken to hang.
        clock: Seconds, as `time.monotonic`.
    """

    def __init__(
        self,
        probe: Callable[[], Awaitable[object]],
        *,
        period_s: float,
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._probe, self._period_s, self._timeout_s, self._clock = probe, period_s, timeout_s, clock
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
            raise RuntimeError("the model has done nothing since a probe of it hung")
        started_s = self._clock()
        if self._worked_s is not None and started_s - self._worked_s < self._period_s:
            return
        hung = RuntimeError(f"a probe of the model was not done within {self._timeout_s:g} s")
        try:
            async with within(self._timeout_s, hung):
                await self._probe()
        except Exception as error:  # whatever a model raises
            if error is not hung:
                raise RuntimeError(f"a probe of the model failed: {error}") from error
            if self._worked_s is not None and self._worked_s > started_s:
                return  # it is slow, and works
            self._hangs = True
            raise
        self.note_work()


@dataclass(frozen=True, kw_only=True)
class Monitoring:
    """How a stage is watched."""

    meter: Meter = unmetered
    "takes its figures"
    probe_period_s: float = 10.0
    "for how long work that was done proves that a model works; then a probe has to"
    probe_timeout_s: float = 30.0
    "when a probe is taken to hang"
    tracing: str | None = None
    "where its spans go; see `serving.telemetry.tracing.open_spans`"

    def health(self, probe: Callable[[], Awaitable[object]]) -> Health:
        """The health of a model that shows by `probe` that it works."""
        return Health(probe, period_s=self.probe_period_s, timeout_s=self.probe_timeout_s)


UNMONITORED = Monitoring()
