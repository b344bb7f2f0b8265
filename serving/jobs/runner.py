"""Runs jobs: in every replica of the ingress one runner, which finds them in the line and claims them by leases.

A lease is renewed by heartbeats, which also tell how far the job is. One that ran out, because its holder died, is taken
over by anybody. The results are stored first, then one conditional write ends the job: so of several who have run it,
one succeeds, and the others delete what they have made. Runs are seeded, so it does not matter which.

Knows neither HTTP nor Ray.
"""

import asyncio
import contextlib
import logging
import random
import secrets
import time
from bisect import bisect_left
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from mgie.engine.handle import Stepped
from mgie.errors import DeadlineError, EngineFullError
from serving.deadline import within
from serving.edits.backend import EditOutcome
from serving.edits.results import ResultStore
from serving.edits.service import AcceptedEdit, DeliveredEdit, EditService, named_bundle
from serving.errors import CancelledEditError, JobFailedError, StoreError
from serving.jobs.deliveries import Deliverer
from serving.jobs.record import JobRecord, Lease
from serving.jobs.store import Job, JobStore, QueueEntry
from serving.jobs.webhooks import WebhookSettings
from serving.stages.messages import Derived
from serving.telemetry.metrics import JOB_RETRIES, JOB_SECONDS, JOBS, JOBS_LINED_UP, Meter, unmetered

HEARTBEATS_PER_LEASE = 4  # three may fail
MAX_DELIVERIES = 8  # webhooks called at a time
LONGEST_PAUSE_S = 15.0  # before a job is tried again
COMMIT_PAUSES_S = (0.2, 1.0, 3.0)  # between tries to write the end of a job
TROUBLE_S = 10.0  # until a place is looked at again that could not be read
SERVICE_WEIGHT = 0.2  # of the newest job in the moving average of durations

logger = logging.getLogger("serving.jobs")

Change = Callable[[JobRecord], JobRecord | None]


@dataclass(frozen=True, kw_only=True)
class JobSettings:
    """How jobs are run."""

    timeout_s: float = 3600.0
    "from acceptance until a job is given up, unless it asks for less"
    max_running: int = 4
    "at a time in one replica"
    max_queued: int = 10_000
    "not ended; more are refused"
    lease_s: float = 6.0
    "for which a replica has a job to itself, if it does not renew"
    poll_s: float = 1.0
    "between two looks at the line"
    max_failures: int = 5
    "leases that ran out and failures without a known reason, until a job is given up"
    webhooks: WebhookSettings | None = None
    "None: no webhook is called, nor those of jobs that were accepted when it was otherwise"


@dataclass(kw_only=True)
class _Hold:
    """A job that this replica runs."""

    job: Job
    lease: Lease
    step: int = 0
    num_steps: int | None = None
    has_news: asyncio.Event = field(default_factory=asyncio.Event)
    "it has come to another stage"

    def is_ours(self, record: JobRecord) -> bool:
        return record.lease is not None and record.lease.holder == self.lease.holder


@dataclass(frozen=True, kw_only=True)
class _Done:
    """A run whose images are stored, and nobody knows of them yet."""

    result: dict[str, Any]
    results: list[str]
    files: list[str]


class JobRunner:
    """Runs jobs as long as `at_work` is open.

    Args:
        jobs: Where they are.
        service: What edits; knows the models, and the edits that can be called off.
        settings: See there.
        tell_result: Words the result of an edit that is done for clients.
        tell_error: The same of an error in the job of an id, after its HTTP status: 429 or below 500 if it is not ours.
        meter: Takes figures.
    """

    def __init__(
        self,
        jobs: JobStore,
        service: EditService,
        *,
        settings: JobSettings,
        tell_result: Callable[[AcceptedEdit, DeliveredEdit], dict[str, Any]],
        tell_error: Callable[[Exception, str], tuple[int, dict[str, Any]]],
        meter: Meter = unmetered,
    ) -> None:
        self._jobs, self._service, self._settings = jobs, service, settings
        self._tell_result, self._tell_error = tell_result, tell_error
        self._meter = meter
        self._kept = ResultStore(jobs.artifacts)
        self._deliverer = Deliverer(jobs, settings.webhooks, meter)
        self._wake = asyncio.Event()
        self._is_closing = False
        self._line: list[str] = []  # names of places, as last listed
        self._look_s: Mapping[str, float] = {}  # by place: when it may be worth reading, Unix time
        self._running: dict[str, asyncio.Task[None]] = {}  # by id of the job
        self._deliveries: dict[str, asyncio.Task[None]] = {}
        self._service_s: float | None = None  # how long a job takes

    @contextlib.asynccontextmanager
    async def at_work(self) -> AsyncIterator[None]:
        """Meanwhile jobs are run; at the end those that are running are given back."""
        async with self._deliverer.open():
            self._is_closing = False
            chore = asyncio.create_task(self._work())
            try:
                yield
            finally:
                self._is_closing = True  # not cancelled: a job that it is just claiming would be left with its lease
                self.wake()
                await asyncio.wait([chore])
                tasks = [*self._running.values(), *self._deliveries.values()]
                for task in tasks:
                    task.cancel()
                if tasks:
                    await asyncio.wait(tasks)

    def wake(self) -> None:
        """There is something to do: look at once."""
        self._wake.set()

    # ---- what is to be expected

    @property
    def num_lined_up(self) -> int:
        """Jobs that have not ended, as last seen."""
        return len(self._line)

    def position(self, job: Job) -> int:
        """Jobs before this one that have not ended, as last seen."""
        return bisect_left(self._line, QueueEntry.of(job).name)

    def estimated_end_s(self, job: Job) -> float | None:
        """Unix time, from the time that jobs took here of late; None: not known.

        Other replicas run jobs, too, so that it may well be sooner.
        """
        if self._service_s is None:
            return None
        now_s, record = self._jobs.now_s(), job.record
        if record.status == "queued":
            rounds = self.position(job) // self._settings.max_running + 1
            return max(now_s, record.not_before_s) + rounds * self._service_s
        end_s = (record.started_s or now_s) + self._service_s
        return end_s if end_s > now_s else None  # it takes longer than others did

    # ---- finding

    async def _work(self) -> None:
        while not self._is_closing:
            self._wake.clear()
            try:
                await self._look()
            except StoreError as error:
                logger.warning("the line of jobs cannot be read: %s", error)
            except Exception:  # a runner that ended would leave lying what was accepted
                logger.exception("the line of jobs could not be worked on")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._settings.poll_s * random.uniform(0.8, 1.2)):  # noqa: S311
                    await self._wake.wait()

    async def _look(self) -> None:
        """One look at the line; begins what can be begun."""
        places = await asyncio.to_thread(self._jobs.line)
        self._line = [place.name for place in places if not place.is_delivery]
        self._meter(JOBS_LINED_UP, len(self._line))
        known = self._look_s
        self._look_s = look_s = {place.name: known.get(place.name, 0.0) for place in places}
        for place in places:
            now_s = self._jobs.now_s()
            if look_s[place.name] > now_s or self._is_closing:
                continue
            if place.is_delivery:
                is_free = len(self._deliveries) < MAX_DELIVERIES
            else:
                is_free = len(self._running) < self._settings.max_running or place.ends_s <= now_s
            if not is_free or place.job_id in (self._deliveries if place.is_delivery else self._running):
                continue
            try:
                look_s[place.name] = await self._visit(place)
            except StoreError as error:
                logger.warning("a job cannot be read: %s", error)
                look_s[place.name] = now_s + TROUBLE_S

    async def _visit(self, place: QueueEntry) -> float:
        """Does what is due at a place; returns when to come again."""
        lease = Lease(holder=secrets.token_hex(8), until_s=self._jobs.now_s() + self._settings.lease_s)
        job = await asyncio.to_thread(
            self._deliverer.claim if place.is_delivery else partial(self._claim, lease), place
        )
        if job is None:
            self.wake()  # a job that was ended here may have a webhook
            return lease.until_s
        if isinstance(job, float):
            return job
        if place.is_delivery:
            self._begin(self._deliveries, job.id, self._deliverer.deliver(job, place))
        else:
            self._begin(self._running, job.id, self._run(_Hold(job=job, lease=lease)))
        return 0.0

    def _begin(self, tasks: dict[str, asyncio.Task[None]], job_id: str, work: Coroutine[Any, Any, None]) -> None:
        def ended(task: asyncio.Task[None]) -> None:
            del tasks[job_id]
            self.wake()
            if not task.cancelled() and (error := task.exception()) is not None:
                logger.error("a job was left to another runner", exc_info=error)

        tasks[job_id] = asyncio.create_task(work)
        tasks[job_id].add_done_callback(ended)

    def _claim(self, lease: Lease, place: QueueEntry) -> Job | float | None:
        """The job, if it is ours to run now; else when to look again; None: it has ended, or could only be ended."""
        job = self._jobs.find(place.job_id)
        if job is None:
            self._jobs.remove(place)
            return None
        now_s = self._jobs.now_s()

        def change(record: JobRecord) -> JobRecord | None:
            if record.has_ended or record.due_s() > now_s:
                return None
            begun = record.claimed(lease, now_s=now_s)
            if record.order.ends_s <= now_s:
                return self._failed(job.id, record, _overdue(record))
            if begun.failures >= self._settings.max_failures:
                return self._failed(job.id, record, _failed_too_often(begun.failures))
            return begun

        claimed = self._jobs.update(job, change)
        found = claimed or self._jobs.find(job.id)
        if found is None:
            return None
        if found.record.has_ended:  # also by one that died before it could settle it
            if claimed is not None:
                self._meter(JOBS, status=found.record.status)
            self._jobs.settle(found)
            return None
        if claimed is not None and claimed.record.attempts > 1:
            self._meter(JOB_RETRIES)
        return claimed or found.record.due_s()

    # ---- running

    async def _run(self, hold: _Hold) -> None:
        job_id = hold.job.id
        work = asyncio.create_task(self._service.running.run(job_id, self._edit(hold)))
        beats = asyncio.create_task(self._beat(hold))
        try:
            await asyncio.wait((work, beats), return_when=asyncio.FIRST_COMPLETED)
            if work.done():  # else the lease was lost, or the job ended from elsewhere
                await self._commit(hold, work)
        except asyncio.CancelledError:
            with contextlib.suppress(StoreError):  # then it runs out
                await asyncio.to_thread(self._write, hold, JobRecord.put_back)
            raise
        finally:
            for task in (work, beats):
                task.cancel()
            await asyncio.wait((work, beats))

    async def _beat(self, hold: _Hold) -> None:
        """Renews the lease; returns when it is lost."""

        def change(record: JobRecord) -> JobRecord | None:
            lease = hold.lease.model_copy(update={"until_s": self._jobs.now_s() + self._settings.lease_s})
            is_rendering = hold.num_steps is not None
            news = {"step": hold.step, "num_steps": hold.num_steps, "status": "rendering"} if is_rendering else {}
            return record.model_copy(update={"lease": lease, **news})

        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._settings.lease_s / HEARTBEATS_PER_LEASE):
                    await hold.has_news.wait()
            hold.has_news.clear()
            try:
                if await asyncio.to_thread(self._write, hold, change) is None:
                    return
            except StoreError as error:
                logger.warning("the lease of a job cannot be renewed: %s", error)

    def _write(self, hold: _Hold, change: Change) -> Job | None:
        """Changes a job if it still is ours."""
        job = self._jobs.update(hold.job, lambda record: change(record) if hold.is_ours(record) else None)
        if job is not None:
            hold.job = job
        return job

    async def _edit(self, hold: _Hold) -> tuple[AcceptedEdit, EditOutcome]:
        """The edit, whose images are not stored yet."""
        order = hold.job.record.order
        left_s = order.ends_s - self._jobs.now_s()
        async with within(left_s, _overdue(hold.job.record)):
            image, mask = await asyncio.to_thread(self._jobs.pictures, hold.job)
            started_s = time.monotonic()
            call = order.edit_call(image=image, mask=mask, deadline=started_s + left_s)
            bundle = named_bundle(await self._service.models(), call.options.model)
            accepted = AcceptedEdit(
                id=hold.job.id, call=call, bundle=bundle, base_url=order.base_url, started_s=started_s
            )
            outcome: EditOutcome | None = None
            async with contextlib.aclosing(self._service.events(accepted)) as events:
                async for event in events:
                    if isinstance(event, Derived):
                        hold.num_steps = dict(bundle.defaults, **call.options.overrides)["steps"]
                        hold.has_news.set()
                    elif isinstance(event, Stepped):
                        hold.step, hold.num_steps = event.step, event.num_steps
                    elif isinstance(event, EditOutcome):
                        outcome = event
        assert outcome is not None  # the last event of every backend
        return accepted, outcome

    async def _store(self, hold: _Hold, accepted: AcceptedEdit, outcome: EditOutcome) -> _Done:
        stored = await asyncio.to_thread(self._kept.store, accepted.call.options, outcome, is_durable=True)
        kept_until = self._jobs.expires_s(hold.job) if accepted.call.options.keeps_lossless else None
        delivered = DeliveredEdit(outcome=outcome, urls=stored.files, kept_until=kept_until)
        return _Done(
            result=self._tell_result(accepted, delivered),
            results=list(stored.lossless),
            files=sorted({*stored.files, *stored.lossless}),
        )

    async def _commit(self, hold: _Hold, work: asyncio.Task[tuple[AcceptedEdit, EditOutcome]]) -> None:
        """Stores the images of a run, and writes what became of it."""
        done: _Done | None = None
        change: Change
        try:
            done = await self._store(hold, *work.result())
            change = partial(self._done, done)
        except CancelledEditError:
            change = self._cancelled
        except Exception as error:  # noqa: BLE001  whatever it is, the job ends or is tried again
            change = self._after_error(hold.job.id, error)
        for pause_s in (*COMMIT_PAUSES_S, None):
            try:
                job = await asyncio.to_thread(self._write, hold, change)
                break
            except StoreError as error:
                if pause_s is None:  # the lease runs out, and another tries; what was stored expires
                    raise
                logger.warning("what became of a job cannot be written yet: %s", error)
                await asyncio.sleep(pause_s)
        await asyncio.to_thread(self._tidy, hold.job.id, job, done)

    def _tidy(self, job_id: str, written: Job | None, done: _Done | None) -> None:
        """After the end was written, here or by another."""
        job = written or self._jobs.find(job_id)
        # A write may have succeeded though its answer was lost: then nothing was written by the last try.
        is_ours = job is not None and done is not None and job.record.result == done.result
        if done is not None and not is_ours:
            self._jobs.delete_images(done.files)
        if job is not None and job.record.has_ended:
            if written is not None or is_ours:
                self._meter(JOBS, status=job.record.status)
            if is_ours:
                ended_s = job.record.ended_s or 0.0
                self._meter(JOB_SECONDS, ended_s - job.record.order.created_s)
                seconds = ended_s - (job.record.started_s or 0.0)
                average_s = seconds if self._service_s is None else self._service_s
                self._service_s = average_s + SERVICE_WEIGHT * (seconds - average_s)
            self._jobs.settle(job)

    def _done(self, done: _Done, record: JobRecord) -> JobRecord:
        return record.ended("done", now_s=self._jobs.now_s(), result=done.result, results=done.results)

    def _failed(self, job_id: str, record: JobRecord, error: Exception) -> JobRecord:
        return record.ended("failed", now_s=self._jobs.now_s(), error=self._tell_error(error, job_id)[1])

    def _cancelled(self, record: JobRecord) -> JobRecord:
        return record.ended("cancelled", now_s=self._jobs.now_s())

    def _after_error(self, job_id: str, error: Exception) -> Change:
        """Ends the job if the error is the user's, or for good; else it is tried again after a pause."""
        status, told = self._tell_error(error, job_id)
        is_final = (status < 500 and status != 429) or isinstance(error, DeadlineError)
        failures = int(status == 500)  # a known outage is none of the job's doing
        least_s = error.retry_after_s if isinstance(error, EngineFullError) else 0.0

        def change(record: JobRecord) -> JobRecord:
            if is_final:
                return record.ended("failed", now_s=self._jobs.now_s(), error=told)
            if record.failures + failures >= self._settings.max_failures:
                return self._failed(job_id, record, _failed_too_often(record.failures + failures))
            pause_s = min(LONGEST_PAUSE_S, 0.25 * 2 ** min(record.attempts, 10)) * random.uniform(0.75, 1.25)  # noqa: S311
            return record.put_back(not_before_s=self._jobs.now_s() + max(pause_s, least_s), failures=failures)

        if not is_final:
            logger.warning("a job is tried again after %s", type(error).__name__)
        return change


def _overdue(record: JobRecord) -> DeadlineError:
    allowed_s = record.order.ends_s - record.order.created_s
    return DeadlineError(f"the job was not done within {allowed_s:g} s and was given up")


def _failed_too_often(failures: int) -> JobFailedError:
    return JobFailedError(f"the server failed on this job {failures} times, and gave it up")
