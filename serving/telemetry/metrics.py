"""Every figure that the service exports: its name, what it means, its tags and buckets. The only home of each.

Who has a figure to tell gets a `Meter`. `app.py` gives one that writes to Ray's exporter, which tags each figure with
deployment, replica and application itself; without one nothing is measured. No tag holds words of a user, a key or the id
of an edit: figures are seen by more people than edits are, and every new value of a tag costs memory for ever.
"""

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

SAMPLE_PERIOD_S = 2.0  # of what is looked at again and again, rather than told when it happens

# Of queues, derivations and whole edits: from a cached answer to the longest deadline that people set.
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)
_STEP_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0)
_JOB_SECONDS = (1.0, 2.0, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0, 1280.0, 2560.0, 5120.0)
_ROWS = (3.0, 6.0, 9.0, 12.0, 18.0, 24.0, 36.0, 48.0, 72.0, 96.0)


@dataclass(frozen=True)
class Metric:
    """One figure."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    tags: tuple[str, ...] = ()
    "besides Ray's own"
    boundaries: tuple[float, ...] = ()
    "upper ends of a histogram's buckets"

    @property
    def series(self) -> tuple[str, ...]:
        """The names under which Prometheus finds it."""
        endings = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_count", "_sum")}
        return tuple(f"ray_{self.name}{ending}" for ending in endings[self.kind])


EDITS = Metric(
    "mgie_edits",
    "counter",
    "Requests to edit that were answered, by status and by the code of the error (ok where there was none)",
    tags=("status", "code"),
)
EDIT_SECONDS = Metric(
    "mgie_edit_seconds",
    "histogram",
    "From the first byte of a request to edit to the last of its answer, by status",
    tags=("status",),
    boundaries=_SECONDS,
)
RETRIES = Metric("mgie_stage_retries", "counter", "Stage calls repeated because a replica died", tags=("stage",))
QUEUE_SECONDS = Metric(
    "mgie_queue_seconds", "histogram", "How long an edit waited in a stage before it was worked at", boundaries=_SECONDS
)
DERIVE_SECONDS = Metric(
    "mgie_derive_seconds", "histogram", "From the start of an edit's MLLM batch to its condition", boundaries=_SECONDS
)
STEP_SECONDS = Metric("mgie_step_seconds", "histogram", "Time of a denoising step", boundaries=_STEP_SECONDS)
STEP_ROWS = Metric(
    "mgie_step_rows", "histogram", "Rows of a denoising step; an image takes up to three", boundaries=_ROWS
)
STEPS = Metric("mgie_steps", "counter", "Denoising steps")
CANCELS = Metric("mgie_cancels", "counter", "Edits that left a stage because they were called off")
CACHE_REQUESTS = Metric(
    "mgie_cache_requests",
    "counter",
    "Conditions that were asked for: hit, joined (it was being derived for another), miss",
    tags=("result",),
)
WAITING = Metric("mgie_waiting_edits", "gauge", "Edits in line in a stage replica")
RUNNING = Metric("mgie_running_edits", "gauge", "Edits that a stage replica works at")
PIXELS_IN_FLIGHT = Metric(
    "mgie_pixels_in_flight", "gauge", "Work pixels x rows x images that a diffusion replica holds"
)
LOADED_BUNDLES = Metric("mgie_loaded_bundles", "gauge", "Bundles that a stage replica has in memory")
WORK_LEFT = Metric(
    "mgie_work_left", "gauge", "Work accepted and not done: tokens (MLLM stage) or pixel-steps (diffusion stage)"
)
WORK_RATE = Metric("mgie_work_rate", "gauge", "Work that a busy stage replica does per second, in the same units")
JOBS = Metric("mgie_jobs", "counter", "Jobs that ended, by how: done, failed, cancelled", tags=("status",))
JOB_SECONDS = Metric(
    "mgie_job_seconds", "histogram", "From the acceptance of a job to its end, of those done", boundaries=_JOB_SECONDS
)
JOB_RETRIES = Metric("mgie_job_retries", "counter", "Jobs begun again: a run failed, or what ran it died")
JOBS_LINED_UP = Metric(
    "mgie_jobs_lined_up", "gauge", "Jobs of the whole service that have not ended, as a replica last saw them"
)
WEBHOOKS = Metric(
    "mgie_webhooks", "counter", "Calls of webhooks: delivered, pending (tried again later), given_up", tags=("status",)
)

METRICS = tuple(one for one in list(vars().values()) if isinstance(one, Metric))


class Meter(Protocol):
    """Takes figures; from any thread, in microseconds."""

    def __call__(self, metric: Metric, value: float = 1.0, **tags: str) -> None:
        """Adds to a counter, sets a gauge, or puts a value into a histogram."""
        ...


def unmetered(metric: Metric, value: float = 1.0, **tags: str) -> None:
    """The `Meter` of those who measure nothing."""


Sample = tuple[Metric, float, dict[str, str]]


class Sampler:
    """Reports what can only be looked at, again and again, on a thread of its own.

    Args:
        look: The figures of this moment; of a counter all that there ever was.
        meter: Takes gauges as they are, and of counters what they have grown since the last time.
        period_s: Between two looks.
    """

    def __init__(
        self, look: Callable[[], Iterable[Sample]], meter: Meter, *, period_s: float = SAMPLE_PERIOD_S
    ) -> None:
        self._look, self._meter, self._period_s = look, meter, period_s
        self._told: dict[tuple[str, tuple[str, ...]], float] = {}
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)
        self._thread.start()

    def sample(self) -> None:
        """Looks once."""
        for metric, value, tags in self._look():
            if metric.kind != "counter":
                self._meter(metric, value, **tags)
                continue
            place = (metric.name, tuple(tags.values()))
            grown = value - self._told.get(place, 0.0)
            if grown > 0:
                self._told[place] = value
                self._meter(metric, grown, **tags)

    def close(self) -> None:
        """Looks a last time and ends the thread."""
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closed.wait(self._period_s):
            self.sample()
        self.sample()
