"""A real service with an embedded bundle on a port of this machine, in this process."""

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp

from mgie.tiny import EmbeddedName, ensure_bundle
from serving.artifacts import ArtifactStore
from serving.backend import InProcessBackend
from serving.diffusion_stage import DiffusionStage
from serving.ingress import build_api
from serving.kept import KeptResults
from serving.mllm_stage import MLLMStage

START_TIMEOUT_S = 30.0


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
    return build_api(backend, timeout_s=60, kept=KeptResults(ArtifactStore.open(str(folder), ttl_s=3600)))


@contextlib.contextmanager
def listening(app: ASGIApp, *, port: int = 0) -> Iterator[str]:
    """Serves the application on a port of this machine, 0: a free one; yields its address.

    Raises:
        TimeoutError: It did not start.
    """
    server = uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning", timeout_graceful_shutdown=2)
    )
    thread = threading.Thread(target=server.run, name="uvicorn")
    thread.start()
    try:
        give_up_s = time.monotonic() + START_TIMEOUT_S
        while not server.started:
            if not thread.is_alive() or time.monotonic() > give_up_s:
                raise TimeoutError("the server did not start")
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()
