"""The HTTP side: routes over anything that can edit.

Knows neither Ray nor models: `app.py` puts an `EditBackend` made of deployment handles behind it, tests
one made of the same stages in process.
"""

import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict
from typing import Any, TypeVar

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException

from mgie.config import ImageLimits
from mgie.errors import MGIEError
from serving.access.keys import KeyRing
from serving.access.limits import EditLimits
from serving.api.access_gate import AccessMiddleware, watched
from serving.api.job_routes import JOB_ANSWERS, JOB_HEADERS, ApiWording, JobApi, check_no_job, is_job
from serving.api.middleware import BoundaryMiddleware, LogMiddleware, MeterMiddleware, cancel_on_disconnect
from serving.api.page import add_page
from serving.api.request_body import FORM_TYPE, JSON_TYPE, read_form
from serving.api.responses import answer_error, edit_response
from serving.api.sse import event_stream
from serving.deadline import within
from serving.edits.backend import READY_TIMEOUT_S, EditBackend, ServiceStats
from serving.edits.cancellation import Board, owned_id
from serving.edits.results import ResultStore
from serving.edits.service import BATCH_PATIENCE_S, EditService, edit_deadline
from serving.errors import NotFoundError, RequestError, StageUnavailableError
from serving.jobs.runner import JobRunner, JobSettings
from serving.jobs.store import JobStore
from serving.schema import (
    FORM_OVERHEAD_BYTES,
    EditResponse,
    ErrorResponse,
    Model,
    ModelDetails,
    ModelList,
    form_schema,
    json_schema,
)
from serving.storage.artifacts import ARTIFACT_PATH
from serving.telemetry.metrics import Meter, unmetered
from serving.telemetry.tracing import NO_SPANS, Spans, trace_of

T = TypeVar("T")

logger = logging.getLogger("serving.api.routes")

EDITS_PATH = "/v1/images/edits"


def build_api(
    backend: EditBackend,
    *,
    timeout_s: float,
    limits: ImageLimits = ImageLimits(),  # noqa: B008  # frozen
    kept: ResultStore | None = None,
    jobs: JobStore | None = None,
    job_settings: JobSettings = JobSettings(),  # noqa: B008  frozen
    board: Board | None = None,
    public_url: str | None = None,
    adds_request_id: bool = True,
    meter: Meter = unmetered,
    spans: Spans = NO_SPANS,
    keys: KeyRing | None = None,
    edit_limits: EditLimits = EditLimits(),  # noqa: B008  frozen
    batch_patience_s: float = BATCH_PATIENCE_S,
    logs_prompts: bool = False,
) -> FastAPI:
    """The HTTP application.

    Args:
        backend: What edits.
        timeout_s: Deadline of an edit, from its first byte; a request may ask for a shorter one.
        limits: Of the image; the body may be slightly larger.
        kept: Where results are kept; None: what needs it is refused.
        jobs: Where jobs are; None: none are accepted.
        job_settings: How they are run.
        board: Reaches the edits of other replicas of this application.
        public_url: Where clients reach the service; None: as the request says.
        adds_request_id: See `BoundaryMiddleware`.
        meter: Takes figures of the answers.
        spans: Of the edits.
        keys: Who may use it; None: everybody.
        edit_limits: Of what one edit may ask for.
        batch_patience_s: See `EditService`.
        logs_prompts: Write the words of users into the log, too.
    """
    service = EditService(
        backend,
        limits=limits,
        kept=kept,
        board=board,
        edit_limits=edit_limits,
        batch_patience_s=batch_patience_s,
        spans=spans,
    )

    runner = desk = None
    if jobs is not None:
        runner = JobRunner(jobs, service, settings=job_settings, wording=ApiWording(), meter=meter)
        desk = JobApi(jobs, runner, service, settings=job_settings, public_url=public_url, meter=meter)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if keys is None:
            logger.warning("there are no API keys: the service is open to everybody who reaches its port")
        async with watched(keys), service.at_work(), runner.at_work() if runner else contextlib.nullcontext():
            yield

    api = FastAPI(
        title="MGIE image editing",
        description="Edits photos by instruction; the edit endpoint speaks OpenAI's image edit protocol.",
        version="1",
        lifespan=lifespan,
        responses=_documented(401, 429),
        # For the document alone: the gate has decided long before.
        dependencies=[Depends(HTTPBearer(auto_error=False, description="An API key, where the service has keys"))],
    )
    api.add_middleware(AccessMiddleware, keys=keys)
    api.add_middleware(
        BoundaryMiddleware, max_body_bytes=limits.max_bytes + FORM_OVERHEAD_BYTES, adds_request_id=adds_request_id
    )
    api.add_middleware(MeterMiddleware, meter=meter, path=EDITS_PATH)
    api.add_middleware(LogMiddleware)  # added last: outside of all others
    for kind in (MGIEError, HTTPException, RequestValidationError):
        api.add_exception_handler(kind, _handle)
    started_at = int(time.time())

    @api.post(
        EDITS_PATH,
        summary="Edit a photo by instruction",
        responses={
            200: {"model": EditResponse, "content": {"text/event-stream": {}}},
            **JOB_ANSWERS,
            **_documented(400, 404, 409, 413, 415, 422, 429, 500, 503, 504),
        },
        openapi_extra={
            "parameters": JOB_HEADERS,
            "requestBody": {
                "required": True,
                "content": {FORM_TYPE: {"schema": form_schema()}, JSON_TYPE: {"schema": json_schema()}},
            },
        },
    )
    async def edit_image(request: Request) -> Response:
        started_s = time.monotonic()
        async with edit_deadline(timeout_s, started_s):
            wants_job = is_job(request, has_jobs=desk is not None)
            if not wants_job:
                backend.check_room()  # before the body is read: under overload a refusal has to be cheap
            form = await read_form(request)
            if logs_prompts:
                request.state.logged_words = {"prompt": form.prompt, "expressive": form.expressive}
            if desk is not None and wants_job:
                return await desk.accept(request, form)
        check_no_job(form)
        allowed_s = timeout_s if form.timeout_s is None else form.timeout_s
        if allowed_s > timeout_s:
            raise RequestError(f"timeout_s is {allowed_s:g}; it must be at most {timeout_s:g}", param="timeout_s")
        async with edit_deadline(allowed_s, started_s):
            accepted = await service.accept(
                form,
                edit_id=request.state.request_id,
                base_url=public_url or str(request.base_url),
                started_s=started_s,
                deadline=started_s + allowed_s,
                caller=request.state.caller,
                priority=request.state.priority or "interactive",
                trace=trace_of(request.headers),
            )
            if form.stream:
                return await event_stream(request, accepted, service)
            work = service.running.run(accepted.owned_id, service.edit(accepted))
            delivered = await cancel_on_disconnect(request, work)
        absent = "b64_json" if delivered.urls else "url"
        return JSONResponse(edit_response(accepted, delivered).model_dump(exclude={"data": {"__all__": {absent}}}))

    @api.delete(
        EDITS_PATH + "/{edit_id}",
        summary="Cancel an edit that runs",
        description="Named by the `x-request-id` of its request; its own client gets status 409.",
        status_code=204,
        responses=_documented(404, 503),
    )
    async def cancel_edit(edit_id: str, request: Request) -> None:
        if not await service.running.cancel(owned_id(edit_id, request.state.owner)):
            raise HTTPException(404, "no edit of this id is running; it may have ended")

    @api.get(
        ARTIFACT_PATH + "/{name}",
        summary="A result that was kept",
        response_class=Response,
        responses={200: {"content": {"image/*": {}}}, **_documented(404, 503)},
    )
    async def kept_file(name: str) -> Response:
        if kept is None:
            raise NotFoundError("this service keeps no results")
        artifact, data = await kept.read(name)
        left_s = max(0, int(artifact.expires_s - time.time()))
        headers = {"cache-control": f"private, max-age={left_s}, immutable", "x-content-type-options": "nosniff"}
        return Response(data, media_type=artifact.content_type, headers=headers)

    @api.get("/v1/models", summary="What is served", response_model=ModelList, responses=_documented(503))
    async def list_models() -> ModelList:
        return ModelList(
            data=[
                Model(
                    id=bundle.name,
                    created=started_at,
                    owned_by="mgie",
                    mgie=ModelDetails(
                        bundle=bundle.identity,
                        trained=bundle.trained,
                        made_by=bundle.made_by,
                        work_area_px=bundle.work_area_px,
                        defaults=dict(bundle.defaults),
                        examples=list(bundle.examples),
                    ),
                )
                for bundle in await _or_unavailable(service.models)
            ]
        )

    @api.get("/healthz", summary="The process runs")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @api.get("/readyz", summary="Both stages answer", responses=_documented(503))
    async def readyz() -> dict[str, str]:
        await _or_unavailable(backend.check_ready)
        return {"status": "ready"}

    @api.get("/stats", summary="Batches and replicas, for operators")
    async def stats() -> JSONResponse:
        return JSONResponse(_stats_body(await backend.stats()))

    if desk is not None:
        api.include_router(desk.router())
    add_page(api)
    return api


async def _or_unavailable(question: Callable[[], Awaitable[T]]) -> T:
    async with within(READY_TIMEOUT_S, StageUnavailableError(f"a stage did not answer within {READY_TIMEOUT_S:g} s")):
        return await question()


async def _handle(request: Request, error: Exception) -> Response:
    return answer_error(error, request.state.request_id)


def _documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorResponse} for status in statuses}


def _stats_body(stats: ServiceStats) -> dict[str, Any]:
    body = asdict(stats)
    for name, stage in (("mllm", stats.mllm), ("diffusion", stats.diffusion)):
        if stage is not None:
            body[name]["work"]["mean_batch_size"] = stage.work.mean_batch_size
            if stage.cache is not None:
                body[name]["cache"]["hit_rate"] = stage.cache.hit_rate
    return body
