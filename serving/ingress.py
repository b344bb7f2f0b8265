"""The HTTP side: routes over anything that can edit, and the one table from errors to status codes.

Knows neither Ray nor models: `app.py` puts an `EditBackend` made of deployment handles behind it, tests
one made of the same stages in process.
"""

import asyncio
import base64
import contextlib
import json
import logging
import math
import re
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.datastructures import Headers, MutableHeaders, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mgie.config import ImageLimits
from mgie.errors import (
    ConfigError,
    DeadlineError,
    EngineFullError,
    ImageError,
    ImageTooLargeError,
    MaskError,
    MGIEError,
    PromptError,
)
from mgie.handle import Stepped
from serving.schema import (
    FORM_OVERHEAD_BYTES,
    MAX_FIELD_BYTES,
    MAX_FIELDS,
    MAX_IMAGES,
    BatchPlace,
    BodyTooLargeError,
    CompletedEvent,
    EditCall,
    EditDetails,
    EditedImage,
    EditForm,
    EditResponse,
    EnginePlace,
    ErrorResponse,
    InputTokens,
    MediaTypeError,
    Model,
    ModelDetails,
    ModelList,
    PartialEvent,
    RequestError,
    Timings,
    UnknownModelError,
    Usage,
    edit_call,
    form_schema,
    parse_edit_form,
    shown,
)
from serving.stages import (
    DEFAULT_LIMITS,
    BundleInfo,
    Derived,
    DiffusionStage,
    MLLMStage,
    Partial,
    RenderedEdit,
    RenderOptions,
    StageStats,
)

T = TypeVar("T")

logger = logging.getLogger("serving.ingress")

PAGE = Path(__file__).parent / "page"
READY_TIMEOUT_S = 5.0  # a stage that does not answer a question about itself within this is not ready


class StageUnavailableError(MGIEError):
    """A stage has no replica that answers, or lost them faster than the call could be retried."""


@dataclass(frozen=True, kw_only=True)
class EditOutcome:
    """What an `EditBackend` returns."""

    derived: Derived
    rendered: RenderedEdit
    retries: Mapping[str, int] = field(default_factory=dict)
    "by stage: calls repeated because a replica died"


@dataclass(frozen=True, kw_only=True)
class ServiceStats:
    """Figures for operators and load tests."""

    mllm: StageStats | None
    "of the one replica that answered; None: none did in time"
    diffusion: StageStats | None
    replicas: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    "by deployment: number of replicas by state"


EditEvent = Derived | Stepped | Partial | EditOutcome


class EditBackend(Protocol):
    """Anything that can edit."""

    async def edit(self, call: EditCall) -> EditOutcome:
        """Runs both stages. Cancelling it frees what it holds.

        Raises:
            MGIEError: See the table of this module.
        """
        ...

    def stream(self, call: EditCall) -> AsyncGenerator[EditEvent, None]:
        """The same step by step: `Derived` first, `EditOutcome` last. Closing it frees what it holds."""
        ...

    async def info(self) -> BundleInfo:
        """The served bundle, as both stages report it.

        Raises:
            StageUnavailableError: A stage does not answer, or they serve different bundles.
        """
        ...

    async def stats(self) -> ServiceStats:
        """Current figures."""
        ...


class InProcessBackend:
    """Both stages in this process: for tests and benchmarks."""

    def __init__(self, mllm: MLLMStage, diffusion: DiffusionStage) -> None:
        self._mllm = mllm
        self._diffusion = diffusion

    async def edit(self, call: EditCall) -> EditOutcome:
        """See `EditBackend`."""
        derived = await self._mllm.derive(call.image, call.instruction, call.expressive, timeout_s=seconds_left(call))
        rendered = await self._diffusion.render(call.image, derived, render_options(call), timeout_s=seconds_left(call))
        return EditOutcome(derived=derived, rendered=rendered)

    async def stream(self, call: EditCall) -> AsyncGenerator[EditEvent, None]:
        """See `EditBackend`."""
        derived = await self._mllm.derive(call.image, call.instruction, call.expressive, timeout_s=seconds_left(call))
        yield derived
        events = self._diffusion.render_stream(call.image, derived, render_options(call), timeout_s=seconds_left(call))
        async with contextlib.aclosing(events):
            async for event in events:
                yield EditOutcome(derived=derived, rendered=event) if isinstance(event, RenderedEdit) else event

    async def info(self) -> BundleInfo:
        """See `EditBackend`."""
        return same_bundle(await self._mllm.info(), await self._diffusion.info())

    async def stats(self) -> ServiceStats:
        """See `EditBackend`."""
        return ServiceStats(mllm=await self._mllm.stats(), diffusion=await self._diffusion.stats())


def render_options(call: EditCall) -> RenderOptions:
    """What the diffusion stage is asked for."""
    return RenderOptions(
        seed=call.seed,
        overrides=call.overrides,
        n=call.n,
        mask=call.mask,
        deterministic=call.deterministic,
        num_partials=call.num_partials,
        output_format=call.output_format,
        output_quality=call.output_quality,
    )


def seconds_left(call: EditCall) -> float:
    """Until its deadline. Clocks of machines differ: stages are told how long they have, not until when."""
    return call.deadline - time.monotonic()


def same_bundle(mllm: BundleInfo, diffusion: BundleInfo) -> BundleInfo:
    """Raises StageUnavailableError unless both stages serve the same bundle, as they do not during a roll-out."""
    if mllm.identity != diffusion.identity:
        raise StageUnavailableError(
            f"the MLLM stage serves bundle {mllm.identity} and the diffusion stage {diffusion.identity}; they must match"
        )
    return diffusion


# Errors -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """How one class of errors is answered."""

    status: int
    code: str
    headers: Mapping[str, str] = field(default_factory=dict)


# The one table. The first class that fits counts; what is not listed is a 500 without internals.
ANSWERS: tuple[tuple[type[MGIEError], Answer], ...] = (
    (UnknownModelError, Answer(404, "model_not_found")),
    (MediaTypeError, Answer(415, "unsupported_media_type")),
    (BodyTooLargeError, Answer(413, "body_too_large")),
    (RequestError, Answer(400, "invalid_value")),
    (ImageTooLargeError, Answer(413, "image_too_large")),
    (MaskError, Answer(400, "invalid_mask")),
    (ImageError, Answer(415, "invalid_image")),
    (PromptError, Answer(400, "invalid_prompt")),
    (ConfigError, Answer(400, "invalid_value")),
    (EngineFullError, Answer(429, "engine_full")),
    (StageUnavailableError, Answer(503, "stage_unavailable", {"retry-after": "1"})),
    # OpenAI's clients retry 5xx twice: without the header a slow edit would be run three times.
    (DeadlineError, Answer(504, "deadline_exceeded", {"x-should-retry": "false"})),
)

# Names inside the product -> names of the form.
_FORM_NAMES = {"instruction": "prompt", "format": "output_format", "quality": "output_compression"}


def error_response(
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """An error as OpenAI's clients expect it; all four keys are always there."""
    kind = "rate_limit_error" if status == 429 else "invalid_request_error" if status < 500 else "server_error"
    body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return JSONResponse(body, status_code=status, headers=dict(headers or {}))


def answer_error(error: Exception, request_id: str) -> JSONResponse:
    """The answer to any exception; logs those that are our fault."""
    for kind, answer in ANSWERS:
        if isinstance(error, kind):
            param = _FORM_NAMES.get(error.param or "", error.param)
            code = error.code if isinstance(error, RequestError) and answer.status == 400 else answer.code
            headers = dict(answer.headers)
            if isinstance(error, EngineFullError):
                headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
            return error_response(answer.status, str(error), param=param, code=code, headers=headers)
    if isinstance(error, HTTPException):
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "bad_request")
        return error_response(error.status_code, str(error.detail), code=code, headers=error.headers)
    if isinstance(error, RequestValidationError):
        return error_response(422, f"the request is not valid: {shown(error.errors())}", code="unprocessable")
    logger.error("request %s failed", request_id, exc_info=error)
    return error_response(500, "the server failed on this request; its x-request-id finds the reason in the log")


class BoundaryMiddleware:
    """What holds for every request: a limit on its body, an id, and no exception that leaves the application.

    Args:
        app: The application inside.
        max_body_bytes: Checked against Content-Length at once, and against what is really read.
        adds_request_id: False behind Ray Serve's proxy, which adds the header itself.
    """

    def __init__(self, app: ASGIApp, *, max_body_bytes: int, adds_request_id: bool) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._adds_request_id = adds_request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        is_usable = re.fullmatch(r"[\w.-]{1,128}", given) is not None or not self._adds_request_id
        request_id = given if is_usable else str(uuid.uuid4())
        scope.setdefault("state", {})["request_id"] = request_id
        num_read = 0
        has_started = False

        async def limited_receive() -> Message:
            nonlocal num_read
            message = await receive()
            num_read += len(message.get("body", b""))
            if num_read > self._max_body_bytes:
                raise self._too_large(num_read)
            return message

        async def send_with_id(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                if self._adds_request_id:
                    MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        announced = headers.get("content-length", "")
        if announced.isdigit() and int(announced) > self._max_body_bytes:
            await answer_error(self._too_large(int(announced)), request_id)(scope, receive, send_with_id)
            return
        try:
            await self._app(scope, limited_receive, send_with_id)
        except ClientDisconnect:
            logger.info("the client of request %s went away", request_id)
        except Exception as error:  # the last line of defence: a client gets JSON, never a traceback
            if has_started:
                raise
            await answer_error(error, request_id)(scope, receive, send_with_id)

    def _too_large(self, num_bytes: int) -> BodyTooLargeError:
        return BodyTooLargeError(f"the body is {num_bytes} bytes or more; at most {self._max_body_bytes} are allowed")


# Routes -------------------------------------------------------------------------------------------------


def build_api(
    backend: EditBackend,
    *,
    timeout_s: float,
    limits: ImageLimits = DEFAULT_LIMITS,
    adds_request_id: bool = True,
) -> FastAPI:
    """The HTTP application.

    Args:
        backend: What edits.
        timeout_s: Deadline of an edit, from its first byte; a request may ask for a shorter one.
        limits: Of the image; the body may be slightly larger.
        adds_request_id: See `BoundaryMiddleware`.
    """
    api = FastAPI(
        title="MGIE image editing",
        description="Edits photos by instruction; the edit endpoint speaks OpenAI's image edit protocol.",
        version="1",
    )
    api.add_middleware(
        BoundaryMiddleware, max_body_bytes=limits.max_bytes + FORM_OVERHEAD_BYTES, adds_request_id=adds_request_id
    )
    for kind in (MGIEError, HTTPException, RequestValidationError):
        api.add_exception_handler(kind, _handle)
    served = _CachedInfo(backend)
    started_at = int(time.time())

    @api.post(
        "/v1/images/edits",
        summary="Edit a photo by instruction",
        responses={200: {"model": EditResponse}, **_documented(400, 404, 413, 415, 429, 500, 503, 504)},
        openapi_extra={
            "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": form_schema()}}}
        },
    )
    async def edit_image(request: Request) -> Response:
        started_s = time.monotonic()
        allowed_s = timeout_s
        deadline = asyncio.timeout_at(asyncio.get_running_loop().time() + timeout_s)
        try:
            async with deadline:
                form = await read_form(request)
                if form.timeout_s is not None:
                    if form.timeout_s > timeout_s:
                        raise RequestError(
                            f"timeout_s is {form.timeout_s:g}; it must be at most {timeout_s:g}", param="timeout_s"
                        )
                    allowed_s = form.timeout_s
                    ends_s = deadline.when()
                    assert ends_s is not None
                    deadline.reschedule(ends_s - timeout_s + allowed_s)
                bundle = await served.get()
                if form.model not in {None, bundle.name}:
                    raise UnknownModelError(
                        f"model is {shown(form.model)}; this service has {bundle.name!r}", param="model"
                    )
                call = edit_call(form, deadline=started_s + allowed_s)
                if form.stream:
                    return await _event_stream(request, call, backend, bundle)
                outcome = await _unless_gone(request, backend.edit(call))
        except TimeoutError as error:
            if not deadline.expired():
                raise  # a timeout of something else
            raise DeadlineError(f"the edit took longer than {allowed_s:g} s and was given up") from error
        answer = edit_response(call, outcome, bundle, total_s=time.monotonic() - started_s)
        return JSONResponse(answer.model_dump())

    @api.get("/v1/models", summary="What is served", response_model=ModelList, responses=_documented(503))
    async def list_models() -> ModelList:
        bundle = await _soon(served.get)
        details = ModelDetails(
            bundle=bundle.identity,
            trained=bundle.trained,
            made_by=bundle.made_by,
            work_area_px=bundle.work_area_px,
            defaults=dict(bundle.defaults),
        )
        return ModelList(data=[Model(id=bundle.name, created=started_at, owned_by="mgie", mgie=details)])

    @api.get("/healthz", summary="The process runs")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @api.get("/readyz", summary="Both stages answer", responses=_documented(503))
    async def readyz() -> dict[str, str]:
        await _soon(backend.info)
        return {"status": "ready"}

    @api.get("/stats", summary="Batches and replicas, for operators")
    async def stats() -> JSONResponse:
        return JSONResponse(_stats_body(await backend.stats()))

    @api.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(
            PAGE / "index.html", headers={"content-security-policy": "default-src 'self'; img-src 'self' blob: data:"}
        )

    api.mount("/page", StaticFiles(directory=PAGE), name="page")
    return api


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Awaits the work, and cancels it as soon as the client has gone away.

    Ray Serve does that too, but a client can switch it off by a header.

    Raises:
        ClientDisconnect: The client has gone.
        Exception: What the work raises.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        watch.cancel()
        task.cancel()
        await asyncio.wait((task, watch))


async def _event_stream(request: Request, call: EditCall, backend: EditBackend, bundle: BundleInfo) -> Response:
    """Server-sent events of an edit; what fails before the words are derived still gets a status of its own.

    A slow reader makes only this queue longer: the edit goes on.
    """
    frames: asyncio.Queue[str | Exception | None] = asyncio.Queue()
    started_s = time.monotonic()

    async def produce() -> None:
        deadline = asyncio.timeout(seconds_left(call))
        try:
            async with deadline, contextlib.aclosing(backend.stream(call)) as events:
                async for event in events:
                    for frame in sse_frames(call, event, bundle, total_s=time.monotonic() - started_s):
                        frames.put_nowait(frame)
        except Exception as error:  # noqa: BLE001  whatever it is, the client is told in the API's form
            is_late = isinstance(error, TimeoutError) and deadline.expired()
            frames.put_nowait(DeadlineError("the edit took too long and was given up") if is_late else error)

    def ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            task.exception()  # ClientDisconnect: nobody is there to be told
        frames.put_nowait(None)

    producer = asyncio.create_task(_unless_gone(request, produce()))
    producer.add_done_callback(ended)
    try:
        first = await frames.get()
    except asyncio.CancelledError:
        producer.cancel()
        raise
    if first is None:
        raise ClientDisconnect
    if isinstance(first, Exception):
        raise first

    async def body() -> AsyncIterator[str]:
        frame: str | Exception | None = first
        try:
            while frame is not None:
                if isinstance(frame, Exception):
                    answer = answer_error(frame, request.state.request_id)
                    frame = f"data: {bytes(answer.body).decode()}\n\n"
                yield frame
                frame = await frames.get()
        finally:
            producer.cancel()

    return StreamingResponse(body(), media_type="text/event-stream", headers={"cache-control": "no-cache"})


def sse_frames(call: EditCall, event: EditEvent, bundle: BundleInfo, *, total_s: float) -> list[str]:
    """An event as it is sent: named events for pictures, comments, which clients skip, for the rest."""
    if isinstance(event, Derived):
        return [f": expressive {json.dumps(event.guidance.expressive)}\n\n"]
    if isinstance(event, Stepped):
        return [f": step {event.step}/{event.num_steps}\n\n"]
    bodies: list[PartialEvent | CompletedEvent]
    if isinstance(event, Partial):
        bodies = [
            PartialEvent(
                b64_json=base64.b64encode(event.data).decode(),
                partial_image_index=event.number,
                created_at=int(time.time()),
                size=f"{event.width}x{event.height}",
                output_format=call.output_format,
            )
        ]
    else:
        answer = edit_response(call, event, bundle, total_s=total_s)
        common = answer.model_dump(exclude={"created", "data"})
        bodies = [
            CompletedEvent(b64_json=result.b64_json, created_at=answer.created, **common) for result in answer.data
        ]
    return [f"event: {body.type}\ndata: {body.model_dump_json()}\n\n" for body in bodies]


async def read_form(request: Request) -> EditForm:
    """Reads and checks the multipart form of an edit.

    Raises:
        RequestError: See `parse_edit_form`; MediaTypeError for any other kind of body.
        HTTPException: The multipart framing is broken, or there are too many parts (400).
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type == "application/json":
        raise MediaTypeError("the JSON variant of this endpoint is not supported yet; send multipart/form-data")
    if media_type != "multipart/form-data":
        raise MediaTypeError(f"content-type is {shown(media_type)}; it must be multipart/form-data")
    async with request.form(max_files=MAX_IMAGES, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD_BYTES) as form:
        fields = [
            (name, await value.read() if isinstance(value, UploadFile) else value) for name, value in form.multi_items()
        ]
    return parse_edit_form(fields)


def edit_response(call: EditCall, outcome: EditOutcome, bundle: BundleInfo, *, total_s: float) -> EditResponse:
    """The 200 answer of an edit."""
    derived, rendered = outcome.derived, outcome.rendered
    guidance, settings = derived.guidance, rendered.settings
    num_input = guidance.prompt_tokens + guidance.image_tokens
    return EditResponse(
        created=int(time.time()),
        data=[
            EditedImage(b64_json=base64.b64encode(image).decode(), revised_prompt=guidance.expressive)
            for image in rendered.images
        ],
        output_format=call.output_format,
        size=f"{rendered.width}x{rendered.height}",
        quality="auto",
        background="opaque",
        usage=Usage(
            input_tokens=num_input,
            output_tokens=guidance.output_tokens,
            total_tokens=num_input + guidance.output_tokens,
            input_tokens_details=InputTokens(text_tokens=guidance.prompt_tokens, image_tokens=guidance.image_tokens),
        ),
        mgie=EditDetails(
            id=f"edit_{uuid.uuid4().hex}",
            seed=call.seed,
            sampler=settings.sampler,
            steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            image_guidance_scale=settings.image_guidance_scale,
            square_crop=settings.square_crop,
            detail_transfer=settings.detail_transfer,
            model=bundle.name,
            bundle=guidance.bundle,
            trained=bundle.trained,
            used_fallback=guidance.used_fallback,
            work_size="{}x{}".format(*rendered.work_wh),
            timings=Timings(
                mllm_queue_s=derived.run.queue_s,
                mllm_run_s=derived.run.run_s,
                diffusion_queue_s=rendered.run.waiting_s,
                diffusion_run_s=rendered.run.join_s
                - rendered.run.waiting_s
                + rendered.run.denoise_s
                + rendered.run.decode_s,
                total_s=total_s,
            ),
            mllm=BatchPlace(
                replica=derived.replica,
                batch=derived.run.batch,
                size=derived.run.batch_size,
                retries=outcome.retries.get("mllm", 0),
            ),
            diffusion=EnginePlace(
                replica=rendered.replica,
                mean_batch_size=rendered.run.mean_batch_size,
                join_steps=rendered.run.join_steps,
                retries=outcome.retries.get("diffusion", 0),
            ),
        ),
    )


class _CachedInfo:
    """The served bundle, asked for once: it cannot change under a running application."""

    def __init__(self, backend: EditBackend) -> None:
        self._backend = backend
        self._info: BundleInfo | None = None

    async def get(self) -> BundleInfo:
        if self._info is None:
            self._info = await self._backend.info()
        return self._info


async def _soon(question: Callable[[], Awaitable[BundleInfo]]) -> BundleInfo:
    try:
        async with asyncio.timeout(READY_TIMEOUT_S):
            return await question()
    except TimeoutError as error:
        raise StageUnavailableError(f"a stage did not answer within {READY_TIMEOUT_S:g} s") from error


async def _handle(request: Request, error: Exception) -> Response:
    return answer_error(error, request.state.request_id)


def _documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorResponse} for status in statuses}


def _stats_body(stats: ServiceStats) -> dict[str, Any]:
    body = asdict(stats)
    for name, stage in (("mllm", stats.mllm), ("diffusion", stats.diffusion)):
        if stage is not None:
            body[name]["work"]["mean_batch_size"] = stage.work.mean_batch_size
    return body
