"""`python -m serving.demo`: one real edit over HTTP on a private local cluster, or with `--keep` a service to play with.

The cluster has its own folder and token and listens on this machine only; nothing of it is left behind. The
only file of `serving` that prints.
"""

import contextlib
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import time
from base64 import b64decode
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import httpx2
import ray
import tyro
from PIL import Image, ImageDraw, ImageFont
from ray import serve

from mgie.errors import MGIEError
from mgie.images import EditMetadata, read_image, write_image
from mgie.tiny.world import make_sample
from serving.app import app
from serving.args import ServingArgs

HOST = "127.0.0.1"
USUAL_PORT = 8000
EDIT_TIMEOUT_S = 600.0
OBJECT_STORE_BYTES = 256 * 2**20  # holds photos and guidance; Ray's default takes a third of the memory
PANEL_SIDE_PX = 512  # longer side of each half of the before/after picture
MARGIN_PX = 16
TEXT_PX = 16

_TOKEN = secrets.token_hex(32)  # one for all clusters of this process: Ray keeps the first for the process's life


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Edits one photo over HTTP on a private local cluster, or serves until stopped."""

    photo: Annotated[Path | None, tyro.conf.Positional] = None
    "photo to edit (PNG, JPEG or WebP); none: a landscape drawn by this program"
    instruction: str = "make it night"
    "what to change"
    out: Path = Path("out")
    "folder for the pictures"
    seed: int = 0
    "of the noise; the same seed gives the same picture"
    keep: bool = False
    "send no edit, leave the service running and stop with Ctrl-C"
    port: int | None = None
    "HTTP port; none: a free one"
    bundle: str = "tiny"
    "folder, hub id, s3:// address, or the name of an embedded bundle"
    device: str = "auto"
    "auto, cpu, mps, cuda or cuda:N"


def main(config: DemoConfig) -> None:
    """Runs the demo; see `DemoConfig`.

    Raises:
        MGIEError: The photo or the bundle cannot be used.
        OSError: The photo cannot be read, the pictures cannot be written, or the port is taken.
        httpx2.HTTPError: The service did not answer as it should.
    """
    source = draw_landscape() if config.photo is None else config.photo.read_bytes()
    read_image(source)  # a wrong file fails before a cluster is started for it
    num_gpus = 0.5 if config.device.startswith("cuda") else 0.0  # both stages share one GPU
    args = ServingArgs(bundle=config.bundle, device=config.device, mllm_num_gpus=num_gpus, diffusion_num_gpus=num_gpus)
    print("starting Ray Serve on this machine, about half a minute ...", flush=True)
    port = config.port or free_port(prefer_usual=config.keep)
    if config.keep and config.port is None and port != USUAL_PORT:
        print(f"port {USUAL_PORT} is in use, taking {port}", flush=True)
    with local_service(args, port=port) as address:
        if config.keep:
            print(f"serving at {address}  (page: {address}/  API docs: {address}/docs)  stop with Ctrl-C", flush=True)
            warn_if_untrained(
                httpx2.get(f"{address}/v1/models", timeout=30).raise_for_status().json()["data"][0]["mgie"]
            )
            signal.pause()
            return
        print(f"sending the edit {config.instruction!r} to {address}/v1/images/edits ...", flush=True)
        answer = send_edit(address, source, config.instruction, seed=config.seed)
    edited = b64decode(answer["data"][0]["b64_json"])
    expressive = answer["data"][0]["revised_prompt"]
    config.out.mkdir(parents=True, exist_ok=True)
    pictures = {"edited.png": edited, "before_after.png": before_after(source, edited, config.instruction, expressive)}
    for name, data in pictures.items():
        (config.out / name).write_bytes(data)
    details = answer["mgie"]
    print(f"instruction:            {config.instruction}")
    print(f"expressive instruction: {expressive or '(the model wrote no words)'}")
    print(
        f"edited in {details['timings']['total_s']:.1f} s, {answer['size']}, seed {details['seed']}, {details['steps']} steps"
    )
    warn_if_untrained(details)
    if details["used_fallback"]:
        print("note: the model wrote no usable visual tokens; a fallback guided the edit, which may ignore the words")
    for name in pictures:
        print(f"wrote {config.out / name}")


def warn_if_untrained(details: dict[str, Any]) -> None:
    """Says plainly what an untrained bundle is worth."""
    if not details["trained"]:
        print(
            f"note: bundle {details['bundle']} is UNTRAINED (random weights): pictures and words mean nothing; "
            "this only shows that everything works"
        )


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


def before_after(source: bytes, edited: bytes, instruction: str, expressive: str) -> bytes:
    """Both pictures side by side, the words under them; PNG."""
    panels = [read_image(source), read_image(edited)]
    for panel in panels:
        panel.thumbnail((PANEL_SIDE_PX, PANEL_SIDE_PX))
    font = ImageFont.load_default(TEXT_PX)
    width = sum(panel.width for panel in panels) + 3 * MARGIN_PX
    top = MARGIN_PX + TEXT_PX + MARGIN_PX // 2
    words = [
        *wrap(f"Instruction: {instruction}", font, width - 2 * MARGIN_PX),
        *wrap(f"Expressive instruction: {expressive or '(none)'}", font, width - 2 * MARGIN_PX),
    ]
    line_px = TEXT_PX * 3 // 2
    height = top + max(panel.height for panel in panels) + MARGIN_PX + line_px * len(words) + MARGIN_PX
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    left = MARGIN_PX
    for title, panel in zip(("Before", "After"), panels, strict=True):
        pen.text((left, MARGIN_PX), title, fill="black", font=font)
        sheet.paste(panel, (left, top))
        left += panel.width + MARGIN_PX
    for number, line in enumerate(words):
        y = top + max(panel.height for panel in panels) + MARGIN_PX + number * line_px
        pen.text((MARGIN_PX, y), line, fill="black", font=font)
    return write_image(sheet, format="png", metadata=EditMetadata(seed=0, bundle="", software="MGIE demo"))


def wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width_px: int) -> list[str]:
    """Lines of at most `width_px`, broken at spaces; a longer word stands alone."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width_px:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def draw_landscape(width: int = 512, height: int = 512) -> bytes:
    """A house by the water on a summer's day, drawn as the tiny models' world is; PNG."""
    side = max(width, height)
    scene = make_sample(11, "test", 37, side_px=side).source
    left, top = (side - width) // 2, (side - height) // 2
    return write_image(scene.crop((left, top, left + width, top + height)), format="png")


def _stop(_: int, __: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)  # `docker stop`, `kill`: end as with Ctrl-C
    started_s = time.monotonic()
    try:
        main(tyro.cli(DemoConfig))
    except KeyboardInterrupt:
        print(f"\nstopped after {time.monotonic() - started_s:.0f} s")
    except (MGIEError, OSError, httpx2.HTTPError) as error:
        sys.exit(f"error: {error}")
