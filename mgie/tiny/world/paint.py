"""Colours, light, and the two canvases that one drawing code draws on: the picture, and the map of its regions.

A `Light` turns the colour of a material into the colour that is seen: time of day, weather, depth of fog. A
`Painter` scales unit coordinates to pixels; `Picture` draws at twice the side, for smooth edges, `RegionMap` writes
the number of the region instead of colours. Knows nothing of what is drawn.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from mgie.tiny.world.scene import Color, Time, Weather

RGB = tuple[float, float, float]
"Of a material, 0 to 255."
Point = tuple[float, float]
Pixels = npt.NDArray[np.uint8]
"[H, W, 3], sRGB."

PALETTE: dict[Color, RGB] = {
    "red": (208, 46, 42),
    "orange": (242, 136, 32),
    "yellow": (248, 214, 56),
    "green": (44, 146, 74),
    "blue": (44, 98, 212),
    "purple": (132, 62, 176),
    "pink": (246, 138, 180),
    "white": (244, 242, 236),
    "black": (40, 40, 46),
    "brown": (136, 88, 52),
}
OVERSAMPLING = 2


def mix(first: RGB, second: RGB, share: float) -> RGB:
    """Between two colours; `share` of the second."""
    return (
        first[0] + (second[0] - first[0]) * share,
        first[1] + (second[1] - first[1]) * share,
        first[2] + (second[2] - first[2]) * share,
    )


def scaled(color: RGB, factor: float) -> RGB:
    """Darker (below 1) or lighter."""
    return (color[0] * factor, color[1] * factor, color[2] * factor)


def luma(color: RGB) -> float:
    """Brightness, 0 to 255 (Rec. 601)."""
    return 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]


NIGHT_GAIN: RGB = (0.43, 0.47, 0.67)
NIGHT_LIFT: RGB = (4, 6, 18)
DUSK_GAIN: RGB = (0.92, 0.70, 0.60)
DUSK_LIFT: RGB = (14, 2, 10)


@dataclass(frozen=True)
class Light:
    """How materials look: grey as the sun goes, times gain, plus lift, behind fog."""

    gain: RGB = (1, 1, 1)
    lift: RGB = (0, 0, 0)
    greyness: float = 0.0
    fog: RGB = (206, 210, 212)
    fog_density: float = 0.0

    def shade(self, color: RGB, depth: float) -> RGB:
        """The colour that is seen.

        Args:
            depth: 0 = near, 1 = at the horizon.
        """
        color = mix(color, (luma(color),) * 3, self.greyness)
        gain, lift = self.gain, self.lift
        color = (color[0] * gain[0] + lift[0], color[1] * gain[1] + lift[1], color[2] * gain[2] + lift[2])
        return self.veil(color, depth)

    def veil(self, color: RGB, depth: float) -> RGB:
        """A colour behind fog only: of what shines by itself."""
        return mix(color, self.fog, self.fog_density * (0.3 + 0.7 * depth)) if self.fog_density else color


def light_of(time: Time, weather: Weather) -> Light:
    """The light of an hour and a weather."""
    gain, lift = {
        "day": ((1.0, 1.0, 1.0), (0.0, 0.0, 0.0)),
        "dusk": (DUSK_GAIN, DUSK_LIFT),
        "night": (NIGHT_GAIN, NIGHT_LIFT),
    }[time]
    dimming = {"clear": 1.0, "cloudy": 0.86, "rain": 0.76, "snow": 0.9, "fog": 0.92}[weather]
    if time == "night":
        dimming = (1 + dimming) / 2
    greyness = {"clear": 0.0, "cloudy": 0.15, "rain": 0.3, "snow": 0.2, "fog": 0.3}[weather]
    fog = {"day": (208.0, 212.0, 214.0), "dusk": (196.0, 158.0, 148.0), "night": (66.0, 72.0, 96.0)}[time]
    density = {"clear": 0.0, "cloudy": 0.0, "rain": 0.14, "snow": 0.16, "fog": 0.8}[weather]
    return Light(gain=scaled(gain, dimming), lift=lift, greyness=greyness, fog=fog, fog_density=density)


class Painter:
    """Unit coordinates to pixels, and materials to what is written there.

    Args:
        side_px: Side of the canvas.
        mode: "picture" writes seen colours, "regions" writes `region` wherever the paint covers.
    """

    def __init__(self, side_px: int, mode: Literal["picture", "regions"], light: Light) -> None:
        self._scale = side_px * (OVERSAMPLING if mode == "picture" else 1)
        self._is_picture = mode == "picture"
        self.image = Image.new("RGB" if self._is_picture else "L", (self._scale, self._scale))
        self._draw = ImageDraw.Draw(self.image, "RGBA" if self._is_picture else None)
        self.light = light
        self.depth = 0.0
        self.region = 0
        self._min_width = max(1, self._scale // 256)
        self.place(0, 0)

    def place(
        self, x: float, y: float, *, size: float = 1.0, is_flipped: bool = False, is_upright: bool = False
    ) -> None:
        """Sets the origin and unit of what is drawn next.

        Args:
            is_upright: y grows upwards.
        """
        self._x, self._y = x, y
        self._size_x = -size if is_flipped else size
        self._size_y = -size if is_upright else size
        self._size = size

    def fill(self, color: RGB, opacity: float, *, shines: bool = False) -> tuple[int, ...] | int:
        """What is written for a material."""
        if not self._is_picture:
            return self.region
        red, green, blue = self.light.veil(color, self.depth) if shines else self.light.shade(color, self.depth)
        seen = (min(255, int(red)), min(255, int(green)), min(255, int(blue)))
        return seen if opacity >= 1 else (*seen, int(255 * opacity))

    def _covers(self, opacity: float) -> bool:
        return self._is_picture or opacity >= 0.5

    def _at(self, x: float, y: float) -> Point:
        return (self._x + self._size_x * x) * self._scale, (self._y + self._size_y * y) * self._scale

    def polygon(self, points: Sequence[Point], color: RGB, *, opacity: float = 1.0, shines: bool = False) -> None:
        """A filled polygon."""
        if self._covers(opacity):
            self._draw.polygon([self._at(x, y) for x, y in points], fill=self.fill(color, opacity, shines=shines))

    def box(
        self,
        left: float,
        top: float,
        right: float,
        bottom: float,
        color: RGB,
        *,
        opacity: float = 1.0,
        shines: bool = False,
    ) -> None:
        """A filled rectangle between two corners, in any order."""
        if self._covers(opacity):
            (x0, y0), (x1, y1) = self._at(left, top), self._at(right, bottom)
            corners = (min(x0, x1), min(y0, y1), max(x0, x1) - 1, max(y0, y1) - 1)
            if corners[2] >= corners[0] and corners[3] >= corners[1]:
                self._draw.rectangle(corners, fill=self.fill(color, opacity, shines=shines))

    def ellipse(
        self,
        x: float,
        y: float,
        radius_x: float,
        radius_y: float,
        color: RGB,
        *,
        opacity: float = 1.0,
        shines: bool = False,
    ) -> None:
        """A filled ellipse."""
        if self._covers(opacity):
            center_x, center_y = self._at(x, y)
            half_w, half_h = radius_x * self._size * self._scale, radius_y * self._size * self._scale
            bounds = (center_x - half_w, center_y - half_h, center_x + half_w, center_y + half_h)
            self._draw.ellipse(bounds, fill=self.fill(color, opacity, shines=shines))

    def disc(
        self, x: float, y: float, radius: float, color: RGB, *, opacity: float = 1.0, shines: bool = False
    ) -> None:
        """A filled circle."""
        self.ellipse(x, y, radius, radius, color, opacity=opacity, shines=shines)

    def line(
        self, points: Sequence[Point], width: float, color: RGB, *, opacity: float = 1.0, shines: bool = False
    ) -> None:
        """A line of a width."""
        if self._covers(opacity):
            width_px = max(self._min_width, round(width * self._size * self._scale))
            fill = self.fill(color, opacity, shines=shines)
            self._draw.line([self._at(x, y) for x, y in points], fill=fill, width=width_px)

    def pixels(self) -> npt.NDArray[np.float32]:
        """The picture at its side, smoothed, [S, S, 3], 0 to 1."""
        small = self.image.reduce(OVERSAMPLING)
        return np.asarray(small, dtype=np.float32) * np.float32(1 / 255)

    def regions(self) -> Pixels:
        """The region map, [S, S]."""
        return np.asarray(self.image)


def add_glow(pixels: npt.NDArray[np.float32], middle: Point, radius: float, color: RGB, strength: float) -> None:
    """Adds a round glow in place; `middle` and `radius`, where it ends, in sides."""
    (x, y), side = middle, pixels.shape[0]
    reach = radius * side
    top, bottom = max(0, math.floor(y * side - reach)), min(side, math.ceil(y * side + reach))
    left, right = max(0, math.floor(x * side - reach)), min(side, math.ceil(x * side + reach))
    if top >= bottom or left >= right:
        return
    rows = (np.arange(top, bottom, dtype=np.float32) + 0.5 - y * side) / reach
    columns = (np.arange(left, right, dtype=np.float32) + 0.5 - x * side) / reach
    fall = np.maximum(0, 1 - rows[:, None] ** 2 - columns[None, :] ** 2) ** 2
    pixels[top:bottom, left:right] += fall[..., None] * (np.asarray(color, dtype=np.float32) * (strength / 255))


@functools.cache
def scattered(count: int, seed: int) -> tuple[tuple[float, float, float], ...]:
    """Points of chance in the unit cube that are the same in every picture.

    Stars, drops, flakes and flowers stand in fixed patterns: where they come with an edit, a model can learn them,
    which it could not if they were drawn anew each time.
    """
    points = np.random.default_rng(seed).uniform(0, 1, (count, 3))
    return tuple((float(x), float(y), float(z)) for x, y, z in points)


def smooth_noise(rng: np.random.Generator, side_px: int, cells: Sequence[int]) -> npt.NDArray[np.float32]:
    """Noise of several scales, [S, S], about -1 to 1: each has half the weight of the one before.

    Args:
        cells: Grid cells per side, coarse to fine; they look alike at any side of the picture.
    """
    out = np.zeros((side_px, side_px), dtype=np.float32)
    weight = 1.0
    for count in cells:
        grid = Image.fromarray(rng.standard_normal((count, count), dtype=np.float32))
        out += weight * np.asarray(grid.resize((side_px, side_px), Image.Resampling.BICUBIC))
        weight *= 0.6
    return out
