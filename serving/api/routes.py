"""The HTTP side: routes over anything that can edit.

Knows neither Ray nor models: `app.py` puts an `EditBackend` made of deployment handles behind it, tests
one made of the same stages in process.
"""

import contextlib
import logging
from collections.abc import AsyncIterator

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException

from mgie.config import ImageLimits
from mgie.errors import MGIEError
from serving.access.keys import KeyRing
from serving.access.limits import EditLimits
from serving.api.access_gate import AccessMiddleware, watched
from serving.api.edit_routes import EDITS_PATH, EditApi
from serving.api.info_routes import info_router
from serving.api.job_routes import ApiWording, JobApi
from serving.api.middleware import BoundaryMiddleware, LogMiddleware, MeterMiddleware
from serving.api.page import add_page
from serving.api.responses import answer_error, documented
from serving.edits.backend import EditBackend
from serving.edits.cancellation import Board
from serving.edits.results import ResultStore
from serving.edits.service import BATCH_PATIENCE_S, EditService
from serving.jobs.runner import JobRunner, JobSettings
from serving.jobs.store import JobStore
from serving.schema import FORM_OVERHEAD_BYTES
from serving.telemetry.metrics import Meter, unmetered
from serving.telemetry.tracing import NO_SPANS, Spans

logger = logging.getLogger("serving.api.routes")


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
    runner = job_api = None
    if jobs is not None:
        runner = JobRunner(jobs, service, settings=job_settings, wording=ApiWording(), meter=meter)
        job_api = JobApi(jobs, runner, service, settings=job_settings, public_url=public_url, meter=meter)

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
        responses=documented(401, 429),
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
    edits = EditApi(service, job_api, kept, timeout_s=timeout_s, public_url=public_url, logs_prompts=logs_prompts)
    api.include_router(edits.router())
    api.include_router(info_router(service, backend, edit_limits))
    if job_api is not None:
        api.include_router(job_api.router())
    add_page(api)
    return api


async def _handle(request: Request, error: Exception) -> Response:
    return answer_error(error, request.state.request_id)
