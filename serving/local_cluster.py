"""A private one-machine cluster with the service on it, for `make demo`, `make serve`, tests and benchmarks."""

import contextlib
import logging
import os
import secrets
import shutil
import signal
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import httpx2
import ray
from ray import serve

from serving.app import app
from serving.args import ServingArgs

HOST = "127.0.0.1"
USUAL_PORT = 8000
EDIT_TIMEOUT_S = 600.0
OBJECT_STORE_BYTES = 256 * 2**20  # holds photos and conditions; Ray's default takes a third of the memory
_TOKEN = secrets.token_hex(32)  # one for all clusters of this process: Ray keeps the first for the process's life


@contextlib.contextmanager
def local_service(args: ServingArgs, *, port: int, num_cpus: int | None = None) -> Iterator[str]:
    """The application on a `local_cluster`; yields its address.

    Raises:
        MGIEError: The bundle cannot be used.
        OSError: The port is taken.
    """
    with local_cluster(port=port, num_cpus=num_cpus) as (address, folder):
        if args.artifacts is None:
            args = args.model_copy(update={"artifacts": str(folder / "results")})
        serve.run(app(args), name="mgie", logging_config={"log_level": "WARNING"})
        yield address


@contextlib.contextmanager
def local_cluster(*, port: int, num_cpus: int | None = None) -> Iterator[tuple[str, Path]]:
    """A private one-node cluster with Ray Serve; yields its HTTP address and its folder, which goes with it.

    Args:
        port: HTTP port.
        num_cpus: CPUs that Ray may give out; None: those of this machine, at least two.

    Raises:
        OSError: The port is taken.
    """
    with socket.socket() as probe:  # Ray would only say that its proxy died
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((HOST, port))
    # Not under $TMPDIR, which may be too long for the names of Unix sockets.
    folder = Path(tempfile.mkdtemp(prefix="mgie-", dir="/tmp"))
    # A token of our own: Ray would leave one in the home folder, readable by everybody. Ray reads the mode when it
    # is imported, too early for us; with the variable absent `ray.init` switches a local cluster to tokens itself.
    os.environ.pop("RAY_AUTH_MODE", None)
    os.environ["RAY_AUTH_TOKEN"] = _TOKEN
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(
            address="local",
            num_cpus=num_cpus or max(2, os.cpu_count() or 1),
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=str(folder),
        )
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        serve.start(http_options={"host": HOST, "port": port}, logging_config={"log_level": "WARNING"})
        signal.signal(signal.SIGTERM, _stop)  # again: Ray has put a handler of its own there, which aborts
        yield f"http://{HOST}:{port}", folder
    finally:
        # A second Ctrl-C must not leave half a cluster behind.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        ray.shutdown()  # ends all processes of the cluster; `serve.shutdown` before it would only print of its death
        shutil.rmtree(folder, ignore_errors=True)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def send_edit(address: str, image: bytes, instruction: str, *, seed: int) -> dict[str, Any]:
    """One edit over HTTP; returns the parsed answer.

    Raises:
        httpx2.HTTPError: It was not a 200.
    """
    response = httpx2.post(
        f"{address}/v1/images/edits",
        files={"image": ("photo", image)},
        data={"prompt": instruction, "seed": str(seed)},
        timeout=EDIT_TIMEOUT_S,
    )
    if response.is_error:
        raise httpx2.HTTPStatusError(
            f"status {response.status_code}: {response.text[:500]}", request=response.request, response=response
        )
    answer: dict[str, Any] = response.json()
    return answer


def free_port(*, prefer_usual: bool) -> int:
    """A TCP port that nobody listens on; with `prefer_usual` 8000 if it is one."""
    for port in (USUAL_PORT, 0) if prefer_usual else (0,):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((HOST, port))
            return int(probe.getsockname()[1])
    raise OSError(f"no free TCP port on {HOST}")


def _stop(_: int, __: FrameType | None) -> None:
    raise KeyboardInterrupt
