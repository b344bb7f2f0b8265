"""Replicas of the ingress in this process, each on a thread and event loop of its own, over one store."""

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest

from mgie.config import ImageLimits
from serving.edits.backend import EditBackend, EditEvent, EditOutcome, ServiceStats
from serving.edits.call import EditCall
from serving.edits.cancellation import Board
from serving.edits.in_process import InProcessBackend
from serving.jobs.runner import JobSettings
from serving.jobs.store import JobStore
from serving.stages.diffusion import DiffusionStage
from serving.stages.messages import BundleInfo
from serving.stages.mllm import MLLMStage
from serving.storage.artifacts import ArtifactStore, open_blobs
from serving.storage.blobs import LocalBlobs
from serving.telemetry.metrics import Meter, unmetered
from serving.telemetry.tracing import NO_SPANS, Spans
from tests.live import api_over
from tests.waiting import POLL_S, until, until_async

TTL_S = 4000.0
LONG = {"steps": "1000"}  # ends by no means of its own
ASYNC = {"prefer": "respond-async"}
ENDED = ("done", "failed", "cancelled")


class Clock:
    def __init__(self) -> None:
        self.now_s = time.time()

    def __call__(self) -> float:
        return self.now_s


class Failing:
    """A backend that raises before the first edits, then works, and knows how many it had at a time."""

    def __init__(self, backend: EditBackend, *errors: Exception) -> None:
        self._backend, self.errors, self.num_calls = backend, list(errors), 0
        self.num_open = self.most_open = 0
        self.seeds: list[int] = []

    async def stream(self, call: EditCall, *, is_watched: bool = True) -> AsyncGenerator[EditEvent, None]:
        self.num_calls += 1
        if self.errors:
            raise self.errors.pop(0)
        self.seeds.append(call.options.seed)
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        try:
            async for event in self._backend.stream(call, is_watched=is_watched):
                yield event
        finally:
            self.num_open -= 1

    def check_room(self) -> None:
        self._backend.check_room()

    async def models(self) -> tuple[BundleInfo, ...]:
        return await self._backend.models()

    async def check_ready(self) -> None:
        await self._backend.check_ready()

    async def stats(self) -> ServiceStats:
        return await self._backend.stats()


class Held(Failing):
    """A backend that keeps the results of edits back until it is let go: they are under way as long as a test likes."""

    def __init__(self, backend: EditBackend) -> None:
        super().__init__(backend)
        self.may_end = threading.Event()

    async def stream(self, call: EditCall, *, is_watched: bool = True) -> AsyncGenerator[EditEvent, None]:
        async for event in super().stream(call, is_watched=is_watched):
            if isinstance(event, EditOutcome):
                await until_async(self.may_end.is_set)
            yield event


class Replica:
    """One ingress. Frozen it does nothing at all, as if its process had been killed, until it is thawed."""

    def __init__(self, api: Any, *, is_at_work: bool) -> None:
        self._api, self._is_at_work = api, is_at_work
        self._loop = asyncio.new_event_loop()
        self._thaw()
        self._context = api.router.lifespan_context(api) if is_at_work else None
        if self._context is not None:
            self._do(self._context.__aenter__())

    def _thaw(self) -> None:
        self._executor = ThreadPoolExecutor()
        self._loop.set_default_executor(self._executor)
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def _do(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def freeze(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._executor.shutdown()  # a heartbeat on its way to the store is there before a test moves the clock

    def thaw(self) -> None:
        self._thaw()

    def close(self) -> None:
        """As at the end of its process."""
        if not self._thread.is_alive():
            self._thaw()
        if self._context is not None:
            self._do(self._context.__aexit__(None, None, None))
            self._context = None
        self.freeze()

    def request(self, method: str, path: str, **content: Any) -> httpx2.Response:
        async def send() -> httpx2.Response:
            transport = httpx2.ASGITransport(self._api, raise_app_exceptions=False)
            async with httpx2.AsyncClient(transport=transport, base_url="http://testserver", timeout=None) as client:
                return await client.request(method, path, **content)

        response: httpx2.Response = self._do(send())
        return response

    def post(self, image: bytes, headers: dict[str, str] | None = None, **fields: str) -> httpx2.Response:
        data = {"prompt": "p", "steps": "1", "seed": "1", "deterministic": "true"} | fields
        return self.request(
            "POST", "/v1/images/edits", files={"image": image}, data=data, headers=ASYNC | (headers or {})
        )

    def accept(self, image: bytes, headers: dict[str, str] | None = None, **fields: str) -> str:
        """Id of a new job."""
        response = self.post(image, headers, **fields)
        assert response.status_code == 202, response.text
        return str(response.json()["id"])

    def job(self, job_id: str) -> dict[str, Any]:
        response = self.request("GET", f"/v1/edits/{job_id}")
        assert response.status_code == 200, response.text
        body: dict[str, Any] = response.json()
        return body

    def wait(self, job_id: str, *statuses: str) -> dict[str, Any]:
        """The job as soon as it has one of the statuses."""
        while (job := self.job(job_id))["status"] not in statuses:
            assert job["status"] not in ENDED, job
            time.sleep(POLL_S)
        return job


class Replicas:
    """Opens replicas over the same stages and the same store."""

    def __init__(self, backend: EditBackend, url: str) -> None:
        self.backend, self.url, self.clock = backend, url, Clock()
        self._opened: list[Replica] = []

    def artifacts(self) -> ArtifactStore:
        return ArtifactStore(open_blobs(self.url), ttl_s=TTL_S, clock=self.clock)

    def jobs(self) -> JobStore:
        return JobStore(self.artifacts(), limits=ImageLimits())

    def open(
        self,
        *,
        backend: EditBackend | None = None,
        board: Board | None = None,
        is_at_work: bool = True,
        meter: Meter = unmetered,
        spans: Spans = NO_SPANS,
        **settings: Any,
    ) -> Replica:
        """Another replica.

        Args:
            is_at_work: False: it accepts and answers, and runs nothing.
        """
        api = api_over(
            backend or self.backend,
            store=self.artifacts(),
            jobs=JobSettings(**{"poll_s": 0.03, "lease_s": 1.0} | settings),
            board=board,
            meter=meter,
            spans=spans,
        )
        replica = Replica(api, is_at_work=is_at_work)
        self._opened.append(replica)
        return replica

    def close(self) -> None:
        for replica in self._opened:
            replica.close()


def looked_at_the_line() -> None:
    """Returns when replicas that are at work have looked at the line again and again."""
    looks, names = list[int](), LocalBlobs.list
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            LocalBlobs, "list", lambda blobs, prefix, after="": looks.append(1) or names(blobs, prefix, after=after)
        )
        until(lambda: len(looks) > 3)


@pytest.fixture
def replicas(mllm: MLLMStage, diffusion: DiffusionStage, tmp_path: Path) -> Iterator[Replicas]:
    opened = Replicas(InProcessBackend(mllm, diffusion), str(tmp_path / "store"))
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def small(photo: Callable[..., bytes]) -> bytes:
    """A photo."""
    return photo(48, 32)
