"""A job as clients see it: in answers, in events and in webhooks. Knows nothing of HTTP."""

import base64
from typing import Any, Literal

from pydantic import BaseModel, Field

from serving.jobs.record import Status
from serving.jobs.store import Job, JobStore
from serving.schema import EditResponse, ErrorDetail


class WebhookView(BaseModel):
    """How far the call of a job's webhook is."""

    status: Literal["pending", "delivered", "given_up"]
    tries: int


class JobView(BaseModel):
    """`GET /v1/edits/{id}`. Times are Unix seconds; what is not known yet is null."""

    id: str = Field(description="Opens the job to whoever knows it.")
    object: Literal["image_edit.job"] = "image_edit.job"
    status: Status
    position: int | None = Field(description="While queued: jobs before it that have not ended.")
    step: int | None = Field(description="While rendering: denoising steps done.")
    num_steps: int | None = Field(description="While rendering: denoising steps in all.")
    created_at: int
    started_at: int | None = Field(description="When it was begun last.")
    ended_at: int | None
    estimated_end: int | None = Field(description="From how long jobs took of late, as if one replica ran them all.")
    expires_at: int = Field(description="When the job and its result are deleted.")
    attempts: int = Field(description="Times that it was begun: more than one after something broke down.")
    webhook: WebhookView | None
    result: EditResponse | None = Field(description="When done: what a synchronous edit answers.")
    error: ErrorDetail | None = Field(description="When failed.")


def view_job(
    jobs: JobStore,
    job: Job,
    *,
    position: int | None = None,
    estimated_end_s: float | None = None,
    has_files: bool = True,
) -> dict[str, Any]:
    """A `JobView` as JSON. Blocks while it reads results.

    Args:
        has_files: Whether it holds the results themselves, if they were asked for rather than addresses of them.

    Raises:
        NotFoundError: The job expired in this moment.
        StoreError: The store is in trouble.
    """
    record = job.record
    is_rendering = record.status == "rendering"
    view = JobView(
        id=job.id,
        status=record.status,
        position=position if record.status == "queued" else None,
        step=record.step if is_rendering else None,
        num_steps=record.num_steps if is_rendering else None,
        created_at=int(record.order.created_s),
        started_at=record.started_s and int(record.started_s),
        ended_at=record.ended_s and int(record.ended_s),
        estimated_end=None if estimated_end_s is None or record.has_ended else int(estimated_end_s),
        expires_at=jobs.expires_s(job),
        attempts=record.attempts,
        webhook=record.webhook and WebhookView(status=record.webhook.status, tries=record.webhook.tries),
        result=None,
        error=record.error and ErrorDetail.model_validate(record.error),
    )
    return view.model_dump() | {"result": _result(jobs, job, has_files=has_files)}


def _result(jobs: JobStore, job: Job, *, has_files: bool) -> dict[str, Any] | None:
    """The answer with addresses or files in place of the ids of artifacts."""
    record = job.record
    if record.result is None:
        return None

    def image(item: dict[str, Any]) -> dict[str, Any]:
        shown = {"revised_prompt": item["revised_prompt"]}
        if record.order.wants_urls:
            return shown | {"url": jobs.artifacts.url(item["url"], record.order.base_url)}
        if has_files:
            return shown | {"b64_json": base64.b64encode(jobs.artifacts.read(item["url"])[1]).decode()}
        return shown

    data: Any = record.result["data"]
    return record.result | {"data": [image(item) for item in data]}
