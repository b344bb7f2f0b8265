"""A real service with an embedded bundle on a port of this machine, in this process."""

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp

from mgie.bundle.embedded import EmbeddedName, ensure_bundle
from serving.api.configured import configured_api
from serving.api.routes import build_api
from serving.edits.in_process import InProcessBackend
from serving.edits.results import ResultStore
from serving.stages.diffusion import DiffusionStage
from serving.stages.mllm import MLLMStage
from serving.storage.artifacts import ArtifactStore


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


def keeping_api(backend: InProcessBackend, folder: Path) -> FastAPI:
    """The HTTP application over a backend; results are kept in the folder."""
    return build_api(backend, timeout_s=60, kept=ResultStore(ArtifactStore.open(str(folder), ttl_s=3600)))


def usual_api(backend: InProcessBackend, folder: Path) -> FastAPI:
    """What `make serve` serves, over a backend in this process; results are kept in the folder."""
    from serving.demo import DemoConfig, serving_args  # and Ray with it

    args = serving_args(DemoConfig(keep=True)).model_copy(update={"artifacts": str(folder)})
    return configured_api(args, backend)


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
