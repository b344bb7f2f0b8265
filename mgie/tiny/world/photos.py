"""Photo-like pictures that have no things to name: for learning what pictures look like, and for optimisations.

Each is made from a record of its style, its colours by name, and a seed. Knows nothing of edits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from numpy.random import Generator
from PIL import Image, ImageDraw

from mgie.tiny.world.draw import draw_scene, to_bytes
from mgie.tiny.world.paint import OVERSAMPLING, PALETTE, RGB, Pixels, mix, smooth_noise
from mgie.tiny.world.scene import COLORS, Color, pick, sample_scene

Style = Literal["leaves", "shapes", "texture", "gradient", "view", "closeup"]
STYLES: tuple[Style, ...] = get_args(Style)
"leaves: overlapping discs of all sizes (dead leaves); view: a soft landscape; closeup: a part of a scene, enlarged"

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Photo:
    """Everything that decides a photo-like picture."""

    seed: int
    style: Style
    colors: tuple[Color, ...]
    "those that it is mostly made of"


def sample_photo(rng: Generator) -> Photo:
    """A photo of any style."""
    style = pick(rng, STYLES, (0.24, 0.14, 0.14, 0.1, 0.2, 0.18))
    colors = tuple(COLORS[int(i)] for i in rng.permutation(len(COLORS))[: int(rng.integers(2, 4))])
    return Photo(seed=int(rng.integers(2**31)), style=style, colors=colors)


def draw_photo(photo: Photo, side_px: int) -> Pixels:
    """The picture, [side_px, side_px, 3]: its subject, uneven light, a lens and a film."""
    rng = np.random.default_rng([photo.seed, 1])
    pixels = _STYLES[photo.style](photo, rng, side_px)
    film = np.random.default_rng([photo.seed, 2])
    light = smooth_noise(film, side_px, (3, 5))[..., None]
    pixels = np.clip(pixels, 0, 1) * (1 + 0.09 * light)
    exposure, cast = film.uniform(0.8, 1.08), film.normal(0, 0.03, 3)
    pixels = pixels * ((1 + cast) * exposure).astype(np.float32)
    pixels += film.standard_normal((side_px, side_px, 3), dtype=np.float32) * np.float32(film.uniform(0.004, 0.03))
    return to_bytes(pixels)


def _tone(rng: Generator, photo: Photo) -> RGB:
    """A natural shade of one of the photo's colours."""
    color = mix(PALETTE[pick(rng, photo.colors)], (128, 124, 116), float(rng.uniform(0.0, 0.45)))
    factor = float(rng.uniform(0.45, 1.2))
    return (color[0] * factor, color[1] * factor, color[2] * factor)


def _whole(color: RGB) -> tuple[int, int, int]:
    return (min(255, int(color[0])), min(255, int(color[1])), min(255, int(color[2])))


def _leaves(photo: Photo, rng: Generator, side_px: int) -> Floats:
    side = side_px * OVERSAMPLING
    image = Image.new("RGB", (side, side), _whole(_tone(rng, photo)))
    draw = ImageDraw.Draw(image)
    radii = np.sort(0.02 / rng.uniform(0.04, 1, 240) ** 0.8)[::-1]  # scale-free, as sizes in photos are
    for radius, (x, y) in zip(radii, rng.uniform(-0.05, 1.05, (240, 2)), strict=True):
        r = float(radius) * side * 0.8
        box = (float(x) * side - r, float(y) * side - r, float(x) * side + r, float(y) * side + r)
        draw.ellipse(box, fill=_whole(_tone(rng, photo)))
    return _reduced(image)


def _shapes(photo: Photo, rng: Generator, side_px: int) -> Floats:
    """Blurred shapes: a small picture, enlarged."""
    small = 48
    image = Image.new("RGB", (small, small), _whole(_tone(rng, photo)))
    draw = ImageDraw.Draw(image)
    for x, y, w, h in rng.uniform(0, 1, (12, 4)):
        box = (
            float(x) * small - 4,
            float(y) * small - 4,
            (float(x) + 0.1 + 0.4 * float(w)) * small,
            (float(y) + 0.1 + 0.4 * float(h)) * small,
        )
        (draw.ellipse if w > 0.4 else draw.rectangle)(box, fill=_whole(_tone(rng, photo)))
    return _enlarged(image, side_px)


def _texture(photo: Photo, rng: Generator, side_px: int) -> Floats:
    first, second = (np.array(_tone(rng, photo), dtype=np.float32) / 255 for _ in range(2))
    share = np.clip(0.5 + 0.4 * smooth_noise(rng, side_px, (4, 9, 20, 44, 90)), 0, 1)[..., None]
    return np.asarray(first + (second - first) * share + 0.05 * smooth_noise(rng, side_px, (70, 110))[..., None])


def _gradient(photo: Photo, rng: Generator, side_px: int) -> Floats:
    corners = np.array([[_whole(_tone(rng, photo)) for _ in range(3)] for _ in range(3)], dtype=np.uint8)
    return _enlarged(Image.fromarray(corners), side_px)


def _view(photo: Photo, rng: Generator, side_px: int) -> Floats:
    """Sky, ridges one behind the other, haze."""
    side = side_px * OVERSAMPLING
    sky = mix(_tone(rng, photo), (178, 206, 232), 0.6)
    image = Image.new("RGB", (side, side), _whole(sky))
    draw = ImageDraw.Draw(image)
    xs = np.linspace(0, 1, 40)
    for layer in range(5):
        near = layer / 4
        color = mix(sky, mix(_tone(rng, photo), (70, 92, 62), 0.4), 0.25 + 0.75 * near)
        ridge = np.full(len(xs), 0.35 + 0.14 * layer)
        for k in (1, 2, 4, 8):
            ridge += rng.normal(0, 0.09 / k) * np.sin(xs * 6.3 * k * rng.uniform(0.5, 1) + rng.uniform(0, 6.3))
        points = [(float(x) * side, float(y) * side) for x, y in zip(xs, ridge, strict=True)]
        draw.polygon([*points, (side, side), (0, side)], fill=_whole(color))
    return np.asarray(_reduced(image) * (1 + 0.05 * smooth_noise(rng, side_px, (12, 30, 70))[..., None]))


def _closeup(photo: Photo, rng: Generator, side_px: int) -> Floats:
    share = float(rng.uniform(0.4, 0.75))
    x, y = (float(one) * (1 - share) for one in rng.uniform(0, 1, 2))
    scene = sample_scene(np.random.default_rng([photo.seed, 3]))
    whole = Image.fromarray(draw_scene(scene, side_px))
    box = (x * side_px, y * side_px, (x + share) * side_px, (y + share) * side_px)
    return np.asarray(whole.resize((side_px, side_px), Image.Resampling.BICUBIC, box), dtype=np.float32) / np.float32(
        255
    )


def _reduced(image: Image.Image) -> Floats:
    return np.asarray(image.reduce(OVERSAMPLING), dtype=np.float32) / np.float32(255)


def _enlarged(image: Image.Image, side_px: int) -> Floats:
    return np.asarray(image.resize((side_px, side_px), Image.Resampling.BICUBIC), dtype=np.float32) / np.float32(255)


_STYLES: dict[Style, Callable[[Photo, Generator, int], Floats]] = {
    "leaves": _leaves,
    "shapes": _shapes,
    "texture": _texture,
    "gradient": _gradient,
    "view": _view,
    "closeup": _closeup,
}
