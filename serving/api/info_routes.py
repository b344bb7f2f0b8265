"""What a service says of itself: what it serves, whether it is ready, its figures."""

import time
from collections.abc import Awaitable
from dataclasses import asdict
from typing import Any, TypeVar

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from serving.access.limits import EditLimits
from serving.api.responses import documented
from serving.deadline import within
from serving.edits.backend import READY_TIMEOUT_S, EditBackend, ServiceStats
from serving.edits.service import EditService
from serving.errors import StageUnavailableError
from serving.schema import Model, ModelDetails, ModelList

T = TypeVar("T")


def info_router(service: EditService, backend: EditBackend, limits: EditLimits) -> APIRouter:
    """Routes that edit nothing."""
    router = APIRouter()
    started_at = int(time.time())

    @router.get("/v1/models", summary="What is served", response_model=ModelList, responses=documented(503))
    async def list_models() -> ModelList:
        return ModelList(
            data=[
                Model(
                    id=bundle.name,
                    created=started_at,
                    owned_by="mgie",
                    mgie=ModelDetails(
                        bundle=bundle.identity,
                        limits={name.removeprefix("max_"): most for name, most in asdict(limits).items()},
                        **asdict(bundle),
                    ),
                )
                for bundle in await _or_unavailable(service.models())
            ]
        )

    @router.get("/healthz", summary="The process runs")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @router.get("/readyz", summary="Both stages answer", responses=documented(503))
    async def readyz() -> dict[str, str]:
        await _or_unavailable(backend.check_ready())
        return {"status": "ready"}

    @router.get("/stats", summary="Batches and replicas, for operators")
    async def stats() -> JSONResponse:
        return JSONResponse(_stats_body(await backend.stats()))

    return router


async def _or_unavailable(question: Awaitable[T]) -> T:
    async with within(READY_TIMEOUT_S, StageUnavailableError(f"a stage did not answer within {READY_TIMEOUT_S:g} s")):
        return await question


def _stats_body(stats: ServiceStats) -> dict[str, Any]:
    body = asdict(stats)
    for name, stage in (("mllm", stats.mllm), ("diffusion", stats.diffusion)):
        if stage is not None:
            body[name]["work"]["mean_batch_size"] = stage.work.mean_batch_size
            if stage.cache is not None:
                body[name]["cache"]["hit_rate"] = stage.cache.hit_rate
    return body
