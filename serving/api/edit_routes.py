"""The HTTP side of edits: doing one while the client waits, cancelling it, reading a result that was kept."""

import asyncio
import time

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from serving.api.job_routes import JOB_ANSWERS, JOB_HEADERS, JobApi, check_no_job, is_job
from serving.api.middleware import cancel_on_disconnect
from serving.api.request_body import FORM_TYPE, JSON_TYPE, read_form
from serving.api.responses import documented, edit_response
from serving.api.sse import event_stream
from serving.args import ServingArgs
from serving.edits.cancellation import owned_id
from serving.edits.results import ResultStore
from serving.edits.service import EditService, edit_deadline
from serving.errors import RequestError
from serving.schema import EditResponse, form_schema, json_schema
from serving.storage.artifacts import ARTIFACT_PATH
from serving.telemetry.tracing import trace_of

EDITS_PATH = "/v1/images/edits"


class EditApi:
    """What clients do with edits.

    Args:
        service: What edits.
        jobs: Takes the edits that are to be jobs.
        kept: Where results are kept.
        args: Settings of the service.
    """

    def __init__(self, service: EditService, jobs: JobApi, kept: ResultStore, args: ServingArgs) -> None:
        self._service, self._jobs, self._kept, self._args = service, jobs, kept, args

    def router(self) -> APIRouter:
        """Routes of edits and of their results."""
        router = APIRouter()
        router.post(
            EDITS_PATH,
            summary="Edit a photo by instruction",
            responses={
                200: {"model": EditResponse, "content": {"text/event-stream": {}}},
                **JOB_ANSWERS,
                **documented(400, 404, 409, 413, 415, 422, 429, 500, 503, 504),
            },
            openapi_extra={
                "parameters": JOB_HEADERS,
                "requestBody": {
                    "required": True,
                    "content": {FORM_TYPE: {"schema": form_schema()}, JSON_TYPE: {"schema": json_schema()}},
                },
            },
        )(self.edit_image)
        router.delete(
            EDITS_PATH + "/{edit_id}",
            summary="Cancel an edit that runs",
            description="Named by the `x-request-id` of its request; its own client gets status 409.",
            status_code=204,
            responses=documented(404, 503),
        )(self.cancel_edit)
        router.get(
            ARTIFACT_PATH + "/{name}",
            summary="A result that was kept",
            response_class=Response,
            responses={200: {"content": {"image/*": {}}}, **documented(404, 503)},
        )(self.kept_file)
        return router

    async def edit_image(self, request: Request) -> Response:
        """200 with the results, a stream of events, or 202 with a job."""
        started_s, timeout_s = time.monotonic(), self._args.timeout_s
        async with edit_deadline(timeout_s, started_s):
            wants_job = is_job(request)
            if not wants_job:
                self._service.check_room()  # before the body is read: under overload a refusal has to be cheap
            form = await read_form(request)
            if self._args.log_prompts:
                request.state.logged_words = {"prompt": form.prompt, "expressive": form.expressive}
            if wants_job:
                return await self._jobs.accept(request, form)
        check_no_job(form)
        allowed_s = timeout_s if form.timeout_s is None else form.timeout_s
        if allowed_s > timeout_s:
            raise RequestError(f"timeout_s is {allowed_s:g}; it must be at most {timeout_s:g}", param="timeout_s")
        async with edit_deadline(allowed_s, started_s):
            accepted = await self._service.accept(
                form,
                edit_id=request.state.request_id,
                base_url=self._args.public_url or str(request.base_url),
                started_s=started_s,
                deadline=started_s + allowed_s,
                caller=request.state.caller,
                priority=request.state.priority or "interactive",
                trace=trace_of(request.headers),
            )
            if form.stream:
                return await event_stream(request, accepted, self._service)
            work = self._service.running.run(accepted.owned_id, self._service.edit(accepted))
            delivered = await cancel_on_disconnect(request, work)
        absent = "b64_json" if delivered.urls else "url"
        return JSONResponse(edit_response(accepted, delivered).model_dump(exclude={"data": {"__all__": {absent}}}))

    async def cancel_edit(self, edit_id: str, request: Request) -> None:
        """204: it is cancelled."""
        if not await self._service.running.cancel(owned_id(edit_id, request.state.owner)):
            raise HTTPException(404, "no edit of this id is running; it may have ended")

    async def kept_file(self, name: str) -> Response:
        """200 with the file."""
        artifact, data = await asyncio.to_thread(self._kept.read, name)
        left_s = max(0, int(artifact.expires_s - time.time()))
        headers = {"cache-control": f"private, max-age={left_s}, immutable", "x-content-type-options": "nosniff"}
        return Response(data, media_type=artifact.content_type, headers=headers)
