"""`python -m serving.demo`: one real edit over HTTP on a private local cluster, or with `--keep` a service to play with.

The cluster has its own folder and token and listens on this machine only; nothing of it is left behind. The
only file of `serving` that prints.
"""

import signal
import sys
import time
from base64 import b64decode
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx2
import tyro
from PIL import Image, ImageDraw, ImageFont

from mgie.bundle.resolve import locate_bundle
from mgie.errors import MGIEError
from mgie.images.files import EditMetadata, read_image, write_image
from mgie.tiny.world import make_sample
from serving.args import ServingArgs
from serving.local_cluster import HOST, USUAL_PORT, _stop, free_port, local_service, send_edit

PANEL_SIDE_PX = 512  # longer side of each half of the before/after picture
MARGIN_PX = 16
TEXT_PX = 16
PATIENCE_S = 5.0  # with whatever has the usual port


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
    "seed of the noise; the same seed gives the same picture"
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
    args = serving_args(config)
    locate_bundle(config.bundle)  # so does a wrong bundle
    print("starting Ray Serve on this machine, about half a minute ...", flush=True)
    port = config.port or free_port(prefer_usual=config.keep)
    if config.keep and config.port is None and port != USUAL_PORT:
        print(f"{who_has(USUAL_PORT)}; this one gets port {port} and a Ray cluster of its own", flush=True)
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
    pictures = {} if config.photo else {"photo.png": source}  # one to go on with
    pictures |= {"edited.png": edited, "before_after.png": before_after(source, edited, config.instruction, expressive)}
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


def serving_args(config: DemoConfig) -> ServingArgs:
    """What `make demo` and `make serve` serve.

    Raises:
        ConfigError: The device is none.
    """
    num_gpus = 0.5 if config.device.startswith("cuda") else 0.0  # both stages share one GPU
    return ServingArgs(bundle=config.bundle, device=config.device, mllm_num_gpus=num_gpus, diffusion_num_gpus=num_gpus)


def who_has(port: int) -> str:
    """Who listens on a port of this machine: a service that runs already, and what it serves, or something else."""
    try:
        answer = httpx2.get(f"http://{HOST}:{port}/v1/models", timeout=PATIENCE_S).json()
        served = [f"{model['id']} ({model['mgie']['made_by']})" for model in answer["data"]]
    except (httpx2.HTTPError, ValueError, LookupError, TypeError):
        return f"port {port} is in use by something else than a service without keys"
    return f"a service runs already at http://{HOST}:{port} and serves {', '.join(served)}"


def warn_if_untrained(details: dict[str, Any]) -> None:
    """Says plainly what an untrained bundle is worth."""
    if not details["trained"]:
        print(
            f"note: bundle {details['bundle']} is UNTRAINED (random weights): pictures and words mean nothing; "
            "this only shows that everything works"
        )


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


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)  # `docker stop`, `kill`: end as with Ctrl-C
    started_s = time.monotonic()
    try:
        main(tyro.cli(DemoConfig))
    except KeyboardInterrupt:
        print(f"\nstopped after {time.monotonic() - started_s:.0f} s")
    except (MGIEError, OSError, httpx2.HTTPError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
