"""How many replicas a stage needs, going by work instead of by the number of requests.

Work is pixel-steps (diffusion stage) or tokens (MLLM stage): an edit of 100 steps is ten of 10, which a count of requests
does not see. Each replica reports how much it has left, how much it ever took, and how much it does per second
(`WorkMeter`); the policy (`WorkPolicy`) asks for as many as clear what is left in the time given and keep up with what
arrives. Knows no Ray: Serve calls the policy with a context of its own and puts delays and bounds around it.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

RATE_AVERAGED_S = 10.0  # of busy time: older work hardly counts for the rate
MIN_BUSY_S = 0.05  # a shorter time says nothing about a rate
COLD_STARTS_AVERAGED = 3  # later ones count more


@dataclass(frozen=True, kw_only=True)
class Work:
    """The work of one replica at one moment."""

    left: float
    "accepted and not done"
    taken: float
    "accepted since the replica began"
    rate: float
    "done per second when it is busy; 0 before anything was done"
    per_edit: float
    "mean seconds of an edit; 0 before the first"


class WorkMeter:
    """Measures how fast a replica works, and says how much there is.

    The rate is averaged over the time in which there was something to do. Only a replica with a line in front of it shows
    all that it can do: what one without a line does may raise the rate, and does not lower it.

    Args:
        clock: Seconds, as `time.monotonic`.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._num_open = self._num_taken = 0
        self._busy_s = self._seen_busy_s = self._seen_done = 0.0
        self._changed_s = clock()
        self._average: float | None = None
        self._rate = 0.0

    @contextmanager
    def edit(self) -> Iterator[None]:
        """Meanwhile the replica has an edit; on the thread of the event loop only."""
        self._count(1)
        self._num_taken += 1
        try:
            yield
        finally:
            self._count(-1)

    def measure(self, *, done: float, left: float, has_line: bool) -> Work:
        """The work of this moment.

        Args:
            done: Since the replica began.
            left: Accepted and not done.
            has_line: Some of it cannot be begun before other is done.
        """
        self._count(0)
        busy_s = self._busy_s - self._seen_busy_s
        if busy_s >= MIN_BUSY_S:
            rate = (done - self._seen_done) / busy_s
            weight = 1 - math.exp(-busy_s / RATE_AVERAGED_S)
            self._average = rate if self._average is None else self._average + weight * (rate - self._average)
            self._rate = self._average if has_line else max(self._rate, self._average)
            self._seen_busy_s, self._seen_done = self._busy_s, done
        taken = done + left
        return Work(left=left, taken=taken, rate=self._rate, per_edit=taken / self._num_taken if self._num_taken else 0)

    def _count(self, change: int) -> None:
        now_s = self._clock()
        if self._num_open:
            self._busy_s += now_s - self._changed_s
        self._num_open += change
        self._changed_s = now_s


def desired_replicas(
    *, num_running: int, num_asked: int, left: float, arriving: float, rate: float, clear_s: float, cold_start_s: float
) -> int:
    """Replicas that clear what is left in `clear_s` and keep up with what arrives.

    With L left, A arriving per second, R the rate of one and n running, the first c seconds (a cold start) are up to those
    that run: what is then left, B = max(0, L + (A - n R) c), is all that new ones can help with.

        up = ceil((A + B / clear_s) / R)        down = ceil((A + L / clear_s) / R)

    More than `up` would come too late to be of use, fewer than `down` would not be done in time; between the two nothing
    changes.

    Args:
        num_running: Replicas that work.
        num_asked: Those, and others that are on their way.
        left, arriving, rate: Work, work per second, work per second of one replica; the rate is above 0.
        clear_s: Above 0. cold_start_s: From asking for a replica until it works.
    """
    late = max(0.0, left + (arriving - num_running * rate) * cold_start_s)
    up = math.ceil((arriving + late / clear_s) / rate)
    down = math.ceil((arriving + left / clear_s) / rate)
    return max(up, min(num_asked, down))


class ColdStarts:
    """How long replicas take to come, learned from those that came.

    Args:
        guess_s: Before the first has come.
    """

    def __init__(self, guess_s: float) -> None:
        self._average_s = guess_s
        self._asked_s: float | None = None

    def seconds(self, now_s: float, *, num_running: int, num_asked: int) -> float:
        """The average, or for how long one is overdue; to be called again and again."""
        if num_asked <= num_running:
            if self._asked_s is not None:
                self._average_s += (now_s - self._asked_s - self._average_s) / COLD_STARTS_AVERAGED
            self._asked_s = None
            return self._average_s
        if self._asked_s is None:
            self._asked_s = now_s
        return max(self._average_s, now_s - self._asked_s)


class TimeSeriesPoint(Protocol):
    """A value that a replica reported."""

    timestamp: float
    value: float


class AutoscalingContext(Protocol):
    """What Serve tells a policy (`ray.serve.config.AutoscalingContext`)."""

    current_num_replicas: int
    "that run"
    target_num_replicas: int
    "those, and others that are on their way"
    current_time: float | None

    @property
    def total_queued_requests(self) -> float:
        """Edits that wait for a replica, averaged over the look-back period."""
        ...

    @property
    def raw_metrics(self) -> Mapping[str, Mapping[Any, Sequence[TimeSeriesPoint]]] | None:
        """What replicas reported in the look-back period: by figure and replica, oldest first."""
        ...


class WorkPolicy:
    """The autoscaling policy of a stage whose replicas report `Work`.

    Args:
        clear_s: Seconds in which what is left should be done; above 0.
        cold_start_s: A guess of how long a replica takes to come; what is seen replaces it.
    """

    def __init__(self, *, clear_s: float, cold_start_s: float) -> None:
        self._clear_s = clear_s
        self._cold_starts = ColdStarts(cold_start_s)
        # Of the last replica that knew them: there may be none now.
        self._rate = self._per_edit = 0.0

    def __call__(self, situation: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        """Replicas wanted, before delays and bounds; and what Serve should keep, nothing."""
        reported = situation.raw_metrics or {}

        def newest(figure: str) -> list[float]:
            return [points[-1].value for points in reported.get(figure, {}).values() if points]

        def mean_known(figure: str, otherwise: float) -> float:
            known = [value for value in newest(figure) if value > 0]
            return sum(known) / len(known) if known else otherwise

        self._rate, self._per_edit = mean_known("rate", self._rate), mean_known("per_edit", self._per_edit)
        num_running, num_asked = situation.current_num_replicas, situation.target_num_replicas
        assert situation.current_time is not None  # Serve always gives it
        cold_start_s = self._cold_starts.seconds(situation.current_time, num_running=num_running, num_asked=num_asked)
        # An average: what waits for a moment only, such as an operator's question, comes to less than one.
        queued = round(situation.total_queued_requests)
        left = sum(newest("left")) + queued * self._per_edit
        if not self._rate:  # nothing is known yet: who waits needs one replica
            return max(num_asked, 1 if queued or left else 0), {}
        arriving = sum(growth(points) for points in reported.get("taken", {}).values())
        desired = desired_replicas(
            num_running=num_running,
            num_asked=num_asked,
            left=left,
            arriving=arriving,
            rate=self._rate,
            clear_s=self._clear_s,
            cold_start_s=cold_start_s,
        )
        return desired, {}


def growth(points: Sequence[TimeSeriesPoint]) -> float:
    """Per second, of a total over time; 0 of fewer than two points, or where it fell."""
    if len(points) < 2:
        return 0.0
    seconds = points[-1].timestamp - points[0].timestamp
    return max(0.0, points[-1].value - points[0].value) / seconds if seconds > 0 else 0.0
