"""A real service with an embedded bundle on a port of this machine, in this process."""

import contextlib
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp

from mgie.bundle.embedded import EmbeddedName, ensure_bundle
from serving.access.keys import KeyRing
from serving.api.opened import Opened
from serving.api.routes import build_api
from serving.args import ServingArgs
from serving.edits.backend import EditBackend
from serving.edits.cancellation import Board
from serving.edits.in_process import InProcessBackend
from serving.edits.safety import SafetyCheck
from serving.jobs.runner import JobSettings
from serving.stages.diffusion import DiffusionStage
from serving.stages.mllm import MLLMStage
from serving.storage.artifacts import ArtifactStore
from serving.telemetry.metrics import Meter, unmetered
from serving.telemetry.tracing import NO_SPANS, Spans


@contextlib.contextmanager
def open_backend(bundle: EmbeddedName) -> Iterator[InProcessBackend]:
    """Both real stages with an embedded bundle."""
    folder = str(ensure_bundle(bundle))
    mllm, diffusion = MLLMStage(folder, device="cpu"), DiffusionStage(folder, device="cpu")
    try:
        yield InProcessBackend(mllm, diffusion)
    finally:
        mllm.close()
        diffusion.close()


def api_over(
    backend: EditBackend,
    folder: str | Path | None = None,
    *,
    store: ArtifactStore | None = None,
    keys: KeyRing | None = None,
    jobs: JobSettings | None = None,
    check: SafetyCheck | None = None,
    spans: Spans = NO_SPANS,
    board: Board | None = None,
    meter: Meter = unmetered,
    **settings: Any,
) -> FastAPI:
    """The HTTP application over a backend in this process.

    Args:
        folder: Where results and jobs are kept; None: in one that goes with the application.
        store: The same, opened already.
        settings: Of `ServingArgs`; the times allowed are those of a slow machine.
    """
    temporary = tempfile.TemporaryDirectory() if folder is None and store is None else None
    place = temporary.name if temporary else folder
    opened = Opened(
        store=store or ArtifactStore.open(str(place), ttl_s=3600),
        keys=keys,
        jobs=jobs or JobSettings(),
        safety_check=check,
        spans=spans,
    )
    args = ServingArgs.model_validate({"timeout_s": 60, "max_steps": 1000} | settings)
    api = build_api(backend, args, opened, board=board, meter=meter)
    api.state.folder = temporary
    return api


def usual_api(backend: EditBackend, folder: Path) -> FastAPI:
    """What `make serve` serves, over a backend in this process; results are kept in the folder."""
    from serving.demo import DemoConfig, serving_args  # and Ray with it

    args = serving_args(DemoConfig(keep=True)).model_copy(update={"artifacts": str(folder)})
    return build_api(backend, args, Opened.of(args))


@contextlib.contextmanager
def listening(app: ASGIApp, *, port: int = 0) -> Iterator[str]:
    """Serves the application on a port of this machine, 0: a free one; yields its address.

    Raises:
        OSError: It did not start.
    """
    server = uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning", timeout_graceful_shutdown=2)
    )
    thread = threading.Thread(target=server.run, name="uvicorn")
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise OSError("the server did not start")
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()
