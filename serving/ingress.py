"""The HTTP side: routes over anything that can edit, and the one table from errors to status codes.

Knows neither Ray nor models: `app.py` puts an `EditBackend` made of deployment handles behind it, tests
one made of the same stages in process.
"""

import asyncio
import base64
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from starlette.datastructures import Headers, MutableHeaders, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mgie.config import ImageLimits
from mgie.errors import ConfigError, ImageError, ImageTooLargeError, MGIEError, PromptError
from serving.schema import (
    FORM_OVERHEAD_BYTES,
    MAX_FIELD_BYTES,
    MAX_FIELDS,
    MAX_IMAGES,
    BatchPlace,
    BodyTooLargeError,
    EditCall,
    EditDetails,
    EditedImage,
    EditForm,
    EditResponse,
    ErrorResponse,
    InputTokens,
    MediaTypeError,
    Model,
    ModelDetails,
    ModelList,
    RequestError,
    Timings,
    UnknownModelError,
    Usage,
    edit_call,
    form_schema,
    parse_edit_form,
    shown,
)
from serving.stages import DEFAULT_LIMITS, BundleInfo, Derived, DiffusionStage, MLLMStage, RenderedEdit, StageStats

logger = logging.getLogger("serving.ingress")

PAGE = Path(__file__).parent / "page"
READY_TIMEOUT_S = 5.0  # a stage that does not answer a question about itself within this is not ready


class StageUnavailableError(MGIEError):
    """A stage has no replica that answers, or lost them faster than the call could be retried."""


class DeadlineError(MGIEError):
    """An edit took longer than the service allows."""


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


class EditBackend(Protocol):
    """Anything that can edit."""

    async def edit(self, call: EditCall) -> EditOutcome:
        """Runs both stages. Cancelling it frees what it holds.

        Raises:
            MGIEError: See the table of this module.
        """
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
        derived = await self._mllm.derive(call.image, call.instruction, call.expressive)
        rendered = await self._diffusion.render(call.image, derived, **render_arguments(call))
        return EditOutcome(derived=derived, rendered=rendered)

    async def info(self) -> BundleInfo:
        """See `EditBackend`."""
        return same_bundle(await self._mllm.info(), await self._diffusion.info())

    async def stats(self) -> ServiceStats:
        """See `EditBackend`."""
        return ServiceStats(mllm=await self._mllm.stats(), diffusion=await self._diffusion.stats())


def render_arguments(call: EditCall) -> dict[str, Any]:
    """Keyword arguments of `DiffusionStage.render`."""
    return {
        "overrides": call.overrides,
        "seed": call.seed,
        "output_format": call.output_format,
        "output_quality": call.output_quality,
    }


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
    (ImageError, Answer(415, "invalid_image")),
    (PromptError, Answer(400, "invalid_prompt")),
    (ConfigError, Answer(400, "invalid_value")),
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
    kind = "invalid_request_error" if status < 500 else "server_error"
    body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return JSONResponse(body, status_code=status, headers=dict(headers or {}))


def answer_error(error: Exception, request_id: str) -> JSONResponse:
    """The answer to any exception; logs those that are our fault."""
    for kind, answer in ANSWERS:
        if isinstance(error, kind):
            param = _FORM_NAMES.get(error.param or "", error.param)
            code = error.code if isinstance(error, RequestError) and answer.status == 400 else answer.code
            return error_response(answer.status, str(error), param=param, code=code, headers=answer.headers)
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
        timeout_s: Deadline of an edit, from its first byte.
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
        responses={200: {"model": EditResponse}, **_documented(400, 404, 413, 415, 500, 503, 504)},
        openapi_extra={
            "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": form_schema()}}}
        },
    )
    async def edit_image(request: Request) -> Response:
        started_s = time.monotonic()
        deadline = asyncio.timeout(timeout_s)
        try:
            async with deadline:
                form = await read_form(request)
                bundle = await served.get()
                if form.model not in {None, bundle.name}:
                    raise UnknownModelError(
                        f"model is {shown(form.model)}; this service has {bundle.name!r}", param="model"
                    )
                call = edit_call(form)
                outcome = await backend.edit(call)
        except TimeoutError as error:
            if not deadline.expired():
                raise  # a timeout of something else
            raise DeadlineError(f"the edit took longer than {timeout_s:g} s and was given up") from error
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
    mllm_run, diffusion_run = derived.run.run, rendered.run.run
    num_input = guidance.prompt_tokens + guidance.image_tokens
    return EditResponse(
        created=int(time.time()),
        data=[EditedImage(b64_json=base64.b64encode(rendered.data).decode(), revised_prompt=guidance.expressive)],
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
                mllm_queue_s=mllm_run.queue_s,
                mllm_run_s=mllm_run.run_s,
                diffusion_queue_s=diffusion_run.queue_s,
                diffusion_run_s=diffusion_run.run_s,
                total_s=total_s,
            ),
            mllm=_place(derived.run.replica, mllm_run.batch, mllm_run.batch_size, outcome.retries.get("mllm", 0)),
            diffusion=_place(
                rendered.run.replica, diffusion_run.batch, diffusion_run.batch_size, outcome.retries.get("diffusion", 0)
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


def _place(replica: str, batch: int, size: int, retries: int) -> BatchPlace:
    return BatchPlace(replica=replica, batch=batch, size=size, retries=retries)


def _stats_body(stats: ServiceStats) -> dict[str, Any]:
    body = asdict(stats)
    for name, stage in (("mllm", stats.mllm), ("diffusion", stats.diffusion)):
        if stage is not None:
            body[name]["batches"]["mean_batch_size"] = stage.batches.mean_batch_size
    return body
