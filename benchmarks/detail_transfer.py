"""Detail transfer against scaling up the model's picture, on real photos with operations whose exact result is known.

    python benchmarks/detail_transfer.py ../shared/data/demo_inputs [--bundle tiny]

Each photo and what an operation makes of it are brought to 128 px and lose there what a small VAE and a diffusion model
lose: blur, JPEG, and a slow drift of colour in the edited one. `--bundle` takes that bundle's VAE in place of blur and
JPEG. From the two small pictures and the photo three ways make the full-size result: scaling the edited one up, adding
the difference of the two scaled up, and detail transfer. Mean absolute distance to the exact result, colours 0 to 100.

The last line is JSON: the mean over all operations by detail transfer, and by scaling up.
"""

import argparse
import io
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from mgie.bundle.bundle import open_bundle
from mgie.images.detail_transfer import transfer_detail
from mgie.images.files import read_image
from mgie.images.geometry import resize
from mgie.images.pixels import from_signed, to_signed
from mgie.tiny.world.filters import Filter, FilterName, apply_filter

OPERATIONS: tuple[FilterName, ...] = (
    "brighter", "darker", "black_and_white", "warmer", "night", "more_contrast", "sepia", "professional",
)  # fmt: skip
WORK_WH = (128, 128)
DRIFT = 0.03  # standard deviation, of 2

Lossy = Callable[[Image.Image], Tensor]


def simulated(image: Image.Image) -> Tensor:
    """At work size, blurred and through JPEG: about 23 dB on these photos, [-1, 1]."""
    file = io.BytesIO()
    resize(image, WORK_WH).filter(ImageFilter.GaussianBlur(1.2)).save(file, "JPEG", quality=35)
    return to_signed(read_image(file.getvalue()))


def through_vae(bundle: str) -> Lossy:
    """At work size, encoded and decoded by a bundle's VAE."""
    vae = open_bundle(bundle).load_renderer(device="cpu").vae

    @torch.inference_mode()
    def reconstruct(image: Image.Image) -> Tensor:
        latents = vae.condition_latents(to_signed(resize(image, WORK_WH))[None])
        return vae.decode(latents * vae.scaling_factor)[0].float()

    return reconstruct


def add_change(source: Image.Image, guide: Tensor, edited: Tensor) -> Image.Image:
    """The source plus the change scaled up bilinearly."""
    change = F.interpolate((edited - guide)[None], source.size[::-1], mode="bilinear")[0]
    return from_signed(to_signed(source) + change)


def distance(a: Image.Image, b: Image.Image) -> float:
    """Mean absolute difference, 0 to 100."""
    return float(np.abs(np.asarray(a).astype(float) - np.asarray(b)).mean() / 2.55)


def main() -> None:
    """Parses the arguments, prints a row per operation."""
    parser = argparse.ArgumentParser(description="Detail transfer against plain upscaling on real photos.")
    parser.add_argument("photos", type=Path, help="folder of .jpg photos")
    parser.add_argument("--bundle", help="take this bundle's VAE; default: a simulated one")
    arguments = parser.parse_args()
    photos = [read_image(path.read_bytes()) for path in sorted(arguments.photos.glob("*.jpg"))]
    if not photos:
        parser.error(f"{arguments.photos} holds no .jpg")
    lossy = simulated if arguments.bundle is None else through_vae(arguments.bundle)
    ways = ("copy", "plain", "change", "detail")
    print(f"{len(photos)} photos, L1 x 100   " + "".join(f"{way:>9}" for way in ways))
    means: dict[str, list[float]] = {way: [] for way in ways}
    seconds = []
    for name in OPERATIONS:
        found: dict[str, list[float]] = {way: [] for way in ways}
        for number, source in enumerate(photos):
            exact = Image.fromarray(apply_filter(np.asarray(source), Filter(name)))
            drift = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(number)) * DRIFT
            guide, edited = lossy(source), lossy(exact) + F.interpolate(drift, WORK_WH[::-1], mode="bicubic")[0]
            started = time.perf_counter()
            ours = transfer_detail(source, guide=guide, edited=edited)
            seconds.append(time.perf_counter() - started)
            plain = resize(from_signed(edited), source.size)
            results = (source, plain, add_change(source, guide, edited), ours)
            for way, result in zip(ways, results, strict=True):
                found[way].append(distance(result, exact))
        print(f"{name:24}" + "".join(f"{statistics.mean(found[way]):9.2f}" for way in ways))
        for way in ways:
            means[way].append(statistics.mean(found[way]))
    ours_mean, plain_mean = (statistics.mean(means[way]) for way in ("detail", "plain"))
    print(f"{'mean':24}" + "".join(f"{statistics.mean(means[way]):9.2f}" for way in ways))
    print(f"detail transfer takes {statistics.median(seconds):.3f} s at {photos[0].width}x{photos[0].height} px")
    print(
        json.dumps(
            {
                "name": "detail_transfer",
                "unit": "L1 x 100 to the exact operation",
                "ours": round(ours_mean, 2),
                "reference": round(plain_mean, 2),
                "ratio": round(plain_mean / ours_mean, 2),
            }
        )
    )


if __name__ == "__main__":
    main()
