"""What the service answers: the one table from errors to status codes, and the body of a finished edit."""

import base64
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from mgie.errors import (
    ClosedError,
    ConfigError,
    DeadlineError,
    EngineFullError,
    ImageError,
    ImageTooLargeError,
    MaskError,
    MGIEError,
    PromptError,
)
from serving.edits.service import AcceptedEdit, DeliveredEdit
from serving.errors import (
    BoardError,
    BodyTooLargeError,
    CancelledEditError,
    ContentPolicyError,
    JobEndedError,
    JobFailedError,
    KeyReusedError,
    LimitError,
    MediaTypeError,
    MixedVersionsError,
    ModelUnavailableError,
    NotFoundError,
    RequestError,
    StageUnavailableError,
    StoreError,
    UnknownKeyError,
    quoted,
)
from serving.schema import (
    BatchPlace,
    EditDetails,
    EditedImage,
    EditResponse,
    EnginePlace,
    ErrorResponse,
    InputTokens,
    Timings,
    Usage,
)

logger = logging.getLogger("serving.api.responses")


@dataclass(frozen=True)
class Answer:
    """How one class of errors is answered."""

    status: int
    code: str
    headers: Mapping[str, str] = field(default_factory=dict)
    message: str | None = None
    "said instead of the error's own, which is for operators and goes to the log"


_SOON = {"retry-after": "1"}
# OpenAI's clients retry 409 and 5xx twice: without the header a slow edit would be run three times.
_NO_RETRY = {"x-should-retry": "false"}

# The one table. The first class that fits counts; what is not listed is a 500 without internals.
ANSWERS: tuple[tuple[type[MGIEError], Answer], ...] = (
    (UnknownKeyError, Answer(401, "invalid_api_key", {"www-authenticate": "Bearer"})),
    (LimitError, Answer(429, "rate_limited")),
    (NotFoundError, Answer(404, "not_found")),
    (MediaTypeError, Answer(415, "unsupported_media_type")),
    (BodyTooLargeError, Answer(413, "body_too_large")),
    (KeyReusedError, Answer(422, "idempotency_key_reused")),
    (JobEndedError, Answer(409, "job_ended", _NO_RETRY)),
    (RequestError, Answer(400, "invalid_value")),
    (ImageTooLargeError, Answer(413, "image_too_large")),
    (MaskError, Answer(400, "invalid_mask")),
    (ImageError, Answer(415, "invalid_image")),
    (PromptError, Answer(400, "invalid_prompt")),
    (ConfigError, Answer(400, "invalid_value")),
    (ContentPolicyError, Answer(400, "content_policy_violation")),
    (EngineFullError, Answer(429, "engine_full")),
    (StageUnavailableError, Answer(503, "stage_unavailable", _SOON)),
    (MixedVersionsError, Answer(503, "stage_unavailable", _SOON)),
    (ClosedError, Answer(503, "stage_unavailable", _SOON, "a stage has been stopped; try again")),
    (ModelUnavailableError, Answer(503, "model_unavailable", _SOON)),
    (BoardError, Answer(503, "board_unavailable", _SOON)),
    (StoreError, Answer(503, "store_unavailable", _NO_RETRY, "the store of results is in trouble")),
    (JobFailedError, Answer(500, "job_failed", _NO_RETRY)),
    (CancelledEditError, Answer(409, "cancelled", _NO_RETRY)),
    (DeadlineError, Answer(504, "deadline_exceeded", _NO_RETRY)),
)


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Errors of a route, for the OpenAPI document."""
    return {status: {"model": ErrorResponse} for status in statuses}


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
            code = (error.code if isinstance(error, RequestError) else None) or answer.code
            headers = dict(answer.headers)
            if isinstance(error, EngineFullError | LimitError):
                headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
            if answer.message is not None:
                logger.error("request %s failed", request_id, exc_info=error)
            return error_response(answer.status, answer.message or str(error), param=param, code=code, headers=headers)
    if isinstance(error, HTTPException):
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "bad_request")
        return error_response(error.status_code, str(error.detail), code=code, headers=error.headers)
    if isinstance(error, RequestValidationError):
        problems = [{name: problem[name] for name in ("loc", "msg")} for problem in error.errors()]
        return error_response(422, f"the request is not valid: {quoted(problems)}", code="unprocessable")
    logger.error("request %s failed", request_id, exc_info=error)
    return error_response(500, "the server failed on this request; its x-request-id finds the reason in the log")


# Results ------------------------------------------------------------------------------------------------


def edit_response(accepted: AcceptedEdit, delivered: DeliveredEdit) -> EditResponse:
    """The 200 answer of an edit."""
    options, bundle, outcome = accepted.call.options, accepted.bundle, delivered.outcome
    derived, rendered = outcome.derived, outcome.rendered
    num_input = derived.prompt_tokens + derived.image_tokens
    return EditResponse(
        created=int(time.time()),
        data=[EditedImage(url=url, revised_prompt=derived.expressive) for url in delivered.urls]
        or [
            EditedImage(b64_json=base64.b64encode(image).decode(), revised_prompt=derived.expressive)
            for image in rendered.images
        ],
        output_format=options.output_format,
        size=f"{rendered.width}x{rendered.height}",
        quality="auto",
        background="opaque",
        usage=Usage(
            input_tokens=num_input,
            output_tokens=derived.output_tokens,
            total_tokens=num_input + derived.output_tokens,
            input_tokens_details=InputTokens(text_tokens=derived.prompt_tokens, image_tokens=derived.image_tokens),
        ),
        mgie=EditDetails(
            id=accepted.id,
            kept_until=delivered.kept_until,
            seed=options.seed,
            **asdict(rendered.settings),
            model=bundle.name,
            bundle=derived.bundle,
            trained=bundle.trained,
            used_fallback=derived.used_fallback,
            work_size="{}x{}".format(*rendered.work_wh),
            timings=Timings(
                mllm_queue_s=derived.run.queue_s if derived.run else 0.0,
                mllm_run_s=derived.run.run_s if derived.run else 0.0,
                diffusion_queue_s=rendered.run.waiting_s,
                diffusion_run_s=rendered.run.join_s
                - rendered.run.waiting_s
                + rendered.run.denoise_s
                + rendered.run.decode_s,
                total_s=time.monotonic() - accepted.started_s,
            ),
            mllm=BatchPlace(
                replica=derived.replica,
                cached=derived.run is None,
                batch=derived.run.batch if derived.run else None,
                size=derived.run.batch_size if derived.run else 0,
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
