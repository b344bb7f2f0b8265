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

from mgie.errors import MGIEError
from serving.api.access_gate import AccessMiddleware, watched
from serving.api.edit_routes import EDITS_PATH, EditApi
from serving.api.info_routes import info_router
from serving.api.job_routes import JobApi, told_error, told_result
from serving.api.middleware import BoundaryMiddleware, RecordMiddleware
from serving.api.opened import Opened
from serving.api.page import add_page
from serving.api.responses import answer_error, documented
from serving.args import ServingArgs
from serving.edits.backend import EditBackend
from serving.edits.cancellation import Board
from serving.edits.results import ResultStore
from serving.edits.service import EditService
from serving.jobs.runner import JobRunner
from serving.jobs.store import JobStore
from serving.schema import FORM_OVERHEAD_BYTES
from serving.telemetry.metrics import Meter, unmetered

logger = logging.getLogger("serving.api.routes")


def build_api(
    backend: EditBackend,
    args: ServingArgs,
    opened: Opened,
    *,
    board: Board | None = None,
    meter: Meter = unmetered,
    adds_request_id: bool = True,
) -> FastAPI:
    """The HTTP application.

    Args:
        backend: What edits.
        args: Limits, deadlines and addresses; those of the stages are not looked at.
        opened: What was opened for them.
        board: Reaches the edits of other replicas of this application; None: there are none.
        meter: Takes figures of the answers.
        adds_request_id: See `BoundaryMiddleware`.
    """
    kept = ResultStore(opened.store, keeps_all=args.keep_results)
    service = EditService(
        backend,
        limits=args.limits,
        kept=kept,
        board=board,
        edit_limits=args.edit_limits,
        batch_patience_s=args.batch_patience_s,
        safety_check=opened.safety_check,
        spans=opened.spans,
    )
    jobs = JobStore(opened.store, limits=args.limits)
    runner = JobRunner(jobs, service, settings=opened.jobs, tell_result=told_result, tell_error=told_error, meter=meter)
    job_api = JobApi(jobs, runner, service, settings=opened.jobs, public_url=args.public_url, meter=meter)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if opened.keys is None:
            logger.warning("there are no API keys: the service is open to everybody who reaches its port")
        async with watched(opened.keys), service.at_work(), runner.at_work():
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
    api.add_middleware(AccessMiddleware, keys=opened.keys)
    api.add_middleware(
        BoundaryMiddleware, max_body_bytes=args.limits.max_bytes + FORM_OVERHEAD_BYTES, adds_request_id=adds_request_id
    )
    # Added last: outside of all others.
    api.add_middleware(RecordMiddleware, meter=meter, edits_path=EDITS_PATH)
    for kind in (MGIEError, HTTPException, RequestValidationError):
        api.add_exception_handler(kind, _handle)
    for router in (
        EditApi(service, job_api, kept, args).router(),
        info_router(service, backend, args.edit_limits),
        job_api.router(),
    ):
        api.include_router(router)
    add_page(api)
    return api


async def _handle(request: Request, error: Exception) -> Response:
    return answer_error(error, request.state.request_id)
