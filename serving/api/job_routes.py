"""The HTTP side of jobs: accepting an edit as one, asking for it, following it, cancelling it."""

import asyncio
import contextlib
import json
import math
import re
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from mgie.errors import EngineFullError
from serving.api.responses import answer_error, documented, edit_response
from serving.edits.service import AcceptedEdit, DeliveredEdit, EditService
from serving.errors import BoardError, RequestError, quoted
from serving.jobs.runner import JobRunner, JobSettings
from serving.jobs.store import Job, JobRequest, JobStore, form_digest
from serving.jobs.view import JobView, view_job
from serving.jobs.webhooks import check_url
from serving.schema import EditForm, ErrorResponse, Priority
from serving.telemetry.metrics import JOBS, Meter
from serving.telemetry.tracing import trace_of

EVENTS_EVERY_S = 0.5  # between two looks at a job that somebody follows
ALIVE_EVERY_S = 15.0  # an event stream in which nothing happens says so, lest something on its way closes it

_KEY = re.compile(r"[\x21-\x7e]{1,255}")

# Of the edit route, for the OpenAPI document.
JOB_HEADERS = [
    {
        "name": "Prefer",
        "in": "header",
        "description": "`respond-async`: answer 202 with a job at once, see `/v1/edits/{id}`.",
        "schema": {"type": "string", "enum": ["respond-async"]},
    },
    {
        "name": "Idempotency-Key",
        "in": "header",
        "description": "With `respond-async`: the same key and request again is answered with the same job.",
        "schema": {"type": "string", "pattern": "^[!-~]{1,255}$"},
    },
]
JOB_ANSWERS: dict[int | str, dict[str, Any]] = {
    202: {"model": JobView, "description": "Accepted as a job, which is never lost."},
    422: {"model": ErrorResponse},
}


def told_result(accepted: AcceptedEdit, delivered: DeliveredEdit) -> dict[str, Any]:
    """The result of a job as its record keeps it."""
    return edit_response(accepted, delivered).model_dump(mode="json")


def told_error(error: Exception, job_id: str) -> tuple[int, dict[str, Any]]:
    """Status of an error in a job, and the error as its record keeps it."""
    answer = answer_error(error, f"of job {job_id[:8]}...")  # the whole id would open the job to readers of logs
    told: dict[str, Any] = json.loads(bytes(answer.body))["error"]
    return answer.status_code, told


def is_job(request: Request) -> bool:
    """Whether the answer to an edit is to be a job.

    Raises:
        RequestError: It is not, and there is an idempotency key, which only a job can have.
    """
    preferences = ",".join(request.headers.getlist("prefer")).split(",")
    if any(preference.partition(";")[0].strip().lower() == "respond-async" for preference in preferences):
        return True
    if "idempotency-key" in request.headers:
        raise _refused("Idempotency-Key", request.headers["idempotency-key"], "it goes with Prefer: respond-async only")
    return False


def check_no_job(form: EditForm) -> None:
    """Raises RequestError if a synchronous edit asks for what only jobs have."""
    if form.webhook_url is not None:
        raise _refused("webhook_url", form.webhook_url, "it goes with the header Prefer: respond-async only")


class JobApi:
    """What clients do with jobs.

    Args:
        jobs, runner: Of this replica.
        service: Checks what jobs are to do.
        settings: Settings of the runner.
        public_url: Where clients reach the service; None: as the request says.
        meter: Takes figures.
    """

    def __init__(
        self,
        jobs: JobStore,
        runner: JobRunner,
        service: EditService,
        *,
        settings: JobSettings,
        public_url: str | None,
        meter: Meter,
    ) -> None:
        self._jobs, self._runner, self._service = jobs, runner, service
        self._settings, self._public_url = settings, public_url
        self._meter = meter

    async def accept(self, request: Request, form: EditForm) -> Response:
        """202 of an edit that is to be a job; all that can be checked without the models is checked.

        Raises:
            RequestError: A job cannot be that.
            EngineFullError: There are too many jobs.
            MGIEError: As a synchronous edit.
        """
        key = request.headers.get("idempotency-key")
        timeout_s = self._settings.timeout_s if form.timeout_s is None else form.timeout_s
        if form.stream:
            raise _refused("stream", form.stream, "with Prefer: respond-async it must be false; follow the job instead")
        if timeout_s > self._settings.timeout_s:
            raise _refused("timeout_s", timeout_s, f"of a job it must be at most {self._settings.timeout_s:g}")
        if key is not None and _KEY.fullmatch(key) is None:
            raise _refused("Idempotency-Key", key, "it must be 1 to 255 visible ASCII characters")
        if form.webhook_url is not None:
            check_url(form.webhook_url, self._settings.webhooks)
        if self._runner.num_lined_up >= self._settings.max_queued:
            raise EngineFullError(
                f"{self._runner.num_lined_up} jobs have not ended; at most {self._settings.max_queued} may be"
            )
        base_url = self._public_url or str(request.base_url)
        priority: Priority = request.state.priority or "batch"
        accepted = await self._service.accept(
            form,
            edit_id=request.state.request_id,
            base_url=base_url,
            started_s=time.monotonic(),
            deadline=math.inf,  # counts from when it is run
            caller=request.state.caller,
            priority=priority,
            trace=trace_of(request.headers),
        )
        settings = {**accepted.bundle.defaults, **accepted.call.options.overrides}
        accepted_s = self._jobs.now_s()
        with accepted.charge.settled():
            job = await asyncio.to_thread(
                self._jobs.accept,
                JobRequest(
                    call=accepted.call,
                    square_crop=settings["square_crop"],
                    base_url=base_url,
                    wants_urls=accepted.base_url is not None,
                    owner=request.state.owner,
                    priority=priority,
                    timeout_s=timeout_s,
                    webhook_url=form.webhook_url,
                    key=key,
                    digest=form_digest(form),
                ),
            )
        if job.record.order.created_s < accepted_s:  # it was there already, and paid for
            accepted.charge.give_back()
        self._runner.wake()
        headers = {"location": f"/v1/edits/{job.id}", "preference-applied": "respond-async"}
        return JSONResponse(await self._view(job), status_code=202, headers=headers)

    def router(self) -> APIRouter:
        """Routes of jobs that were accepted."""
        router = APIRouter(prefix="/v1/edits")
        answer: dict[int | str, dict[str, Any]] = {200: {"model": JobView}}
        router.get("/{job_id}", summary="A job, and its result", responses=answer | documented(404, 503))(self.job)
        router.get(
            "/{job_id}/events",
            summary="A job at each change, until it has ended",
            response_class=StreamingResponse,
            responses={200: {"content": {"text/event-stream": {}}}, **documented(404, 503)},
        )(self.job_events)
        router.delete(
            "/{job_id}", summary="Cancel a job that has not ended", responses=answer | documented(404, 409, 503)
        )(self.cancel_job)
        return router

    async def job(self, job_id: str) -> Response:
        """200 with the job."""
        return JSONResponse(await self._view(await asyncio.to_thread(self._jobs.get, job_id)))

    async def job_events(self, request: Request, job_id: str) -> Response:
        """200 with a stream of its changes."""
        found = await asyncio.to_thread(self._jobs.get, job_id)
        headers = {"cache-control": "no-cache"}
        return StreamingResponse(self._events(request, found), media_type="text/event-stream", headers=headers)

    async def cancel_job(self, job_id: str) -> Response:
        """200 with the job, which is cancelled."""
        cancelled = await asyncio.to_thread(self._jobs.cancel, job_id)
        self._meter(JOBS, status=cancelled.record.status)
        self._runner.wake()  # it may have a webhook
        with contextlib.suppress(BoardError):  # who runs it notices with the next heartbeat
            await self._service.running.cancel(job_id)
        return JSONResponse(await self._view(cancelled))

    async def _view(self, job: Job) -> dict[str, Any]:
        return await asyncio.to_thread(
            view_job,
            self._jobs,
            job,
            position=self._runner.position(job),
            estimated_end_s=self._runner.estimated_end_s(job),
        )

    async def _events(self, request: Request, job: Job) -> AsyncIterator[str]:
        """Frames of a job; each tells all there is to know, so that none is missed who reads the last."""
        told, told_s, seen = None, time.monotonic(), job
        while not await request.is_disconnected():
            view = await self._view(seen)
            told_before, told = told, {name: value for name, value in view.items() if name != "estimated_end"}
            if told != told_before:
                yield f"event: job\ndata: {json.dumps(view)}\n\n"
                told_s = time.monotonic()
            if seen.record.has_ended:
                return
            await asyncio.sleep(EVENTS_EVERY_S)
            if time.monotonic() - told_s > ALIVE_EVERY_S:
                yield ": alive\n\n"
                told_s = time.monotonic()
            found = await asyncio.to_thread(self._jobs.find, job.id)
            if found is None:  # it has expired
                return
            seen = found


def _refused(name: str, value: object, allowed: str) -> RequestError:
    return RequestError(f"{name} is {quoted(value)}; {allowed}", param=name, code="unsupported_value")
