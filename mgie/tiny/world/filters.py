"""Pixel operations: the optimisations of photos as exact functions of a picture's pixels, at any size.

They are what the goals are made with, and what an edit of a real photo is measured against. `amount` 1 is the
plain request; 0.5 "a little", 1.5 "a lot"; 0 changes nothing. Pixels are [H, W, 3], sRGB, 0 to 1; a result may
leave that range before it is stored.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from mgie.tiny.world.paint import DUSK_GAIN, DUSK_LIFT, NIGHT_GAIN, NIGHT_LIFT, RGB, Pixels

Floats = npt.NDArray[np.float32]

FilterName = Literal[
    "brighter",
    "darker",
    "more_contrast",
    "less_contrast",
    "more_saturation",
    "less_saturation",
    "warmer",
    "cooler",
    "sharpen",
    "blur",
    "vignette",
    "black_and_white",
    "sepia",
    "vintage",
    "professional",
    "denoise",
    "night",
    "dusk",
    "noise",
]

_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # Rec. 601
_LEVEL_PERCENTILES = (1.0, 99.0)


@dataclass(frozen=True)
class Filter:
    """A pixel operation and how strong it is."""

    name: FilterName
    amount: float = 1.0


def apply_filter(pixels: Pixels, chosen: Filter) -> Pixels:
    """The filtered picture, [H, W, 3]."""
    out = _FILTERS[chosen.name](pixels.astype(np.float32) * np.float32(1 / 255), chosen.amount)
    return (np.clip(out, 0, 1) * 255 + 0.5).astype(np.uint8)


def luminance(x: Floats) -> Floats:
    """Brightness of pixels, [H, W, 1]."""
    return (x @ _LUMA)[..., None]


def smoothed(x: Floats, radius: float) -> Floats:
    """Gaussian blur; `radius` in sides of the picture (its standard deviation)."""
    radius_px = radius * min(x.shape[:2])
    image = Image.fromarray((np.clip(x, 0, 1) * 255 + 0.5).astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(radius_px)), dtype=np.float32) * np.float32(1 / 255)


def _gained(x: Floats, gain: RGB, lift: RGB, amount: float) -> Floats:
    seen = x * np.array(gain, dtype=np.float32) + np.array(lift, dtype=np.float32) / np.float32(255)
    return x + (seen - x) * np.float32(amount)


def _contrast(x: Floats, factor: float) -> Floats:
    return (x - 0.5) * np.float32(factor) + 0.5


def _saturation(x: Floats, factor: float) -> Floats:
    grey = luminance(x)
    return grey + (x - grey) * np.float32(factor)


def _vignette(x: Floats, amount: float) -> Floats:
    rows = np.linspace(-1, 1, x.shape[0], dtype=np.float32)[:, None]
    columns = np.linspace(-1, 1, x.shape[1], dtype=np.float32)[None, :]
    distance = (rows**2 + columns**2) / 2
    fall: Floats = np.clip((distance - 0.12) / 0.88, 0, 1)
    dimming: Floats = np.float32(min(0.78 * amount, 0.95)) * fall * (2 - fall)
    return x * (1 - dimming)[..., None]


def _sepia(x: Floats, amount: float) -> Floats:
    tinted = luminance(x) ** np.float32(0.9) * np.array([1.08, 0.9, 0.68], dtype=np.float32)
    return x + (tinted - x) * np.float32(min(amount, 1.0))


def _vintage(x: Floats, amount: float) -> Floats:
    faded = _saturation(x, 0.6) * np.array([0.78, 0.74, 0.62], dtype=np.float32)
    faded += np.array([0.17, 0.13, 0.12], dtype=np.float32)
    return x + (faded - x) * np.float32(amount)


def _professional(x: Floats, amount: float) -> Floats:
    """Levels: each channel is stretched, so that casts go too, then colours get a little stronger."""
    sample = x[:: max(1, x.shape[0] // 64), :: max(1, x.shape[1] // 64)].reshape(-1, 3)
    low, high = np.percentile(sample, _LEVEL_PERCENTILES, axis=0).astype(np.float32)
    shared_low, shared_high = low.min(), high.max()
    low, high = 0.6 * low + 0.4 * shared_low, 0.6 * high + 0.4 * shared_high
    leveled = (x - low) / np.maximum(high - low, 0.2) * 0.96 + 0.02
    return x + (_saturation(leveled, 1.12) - x) * np.float32(amount)


def _sharpen(x: Floats, amount: float) -> Floats:
    return x + np.float32(2.2 * amount) * (x - smoothed(x, 0.012))


def _night(x: Floats, amount: float) -> Floats:
    dark = _gained(np.clip(x, 0, 1) ** np.float32(1.5), NIGHT_GAIN, NIGHT_LIFT, 1.0)  # a bright sky gets dark, too
    return x + (dark - x) * np.float32(amount)


def _noise(x: Floats, amount: float) -> Floats:
    """Grain like that of a photo taken in the dark; the same for every picture of a size."""
    grain = np.random.default_rng(20240507).standard_normal(x.shape, dtype=np.float32)
    return x + grain * np.float32(0.1 * amount)


_FILTERS: dict[FilterName, Callable[[Floats, float], Floats]] = {
    "brighter": lambda x, a: np.clip(x, 0, 1) ** np.float32(1 / (1 + 0.75 * a)),
    "darker": lambda x, a: x * np.float32(1 - min(0.45 * a, 0.9)),
    "more_contrast": lambda x, a: _contrast(x, 1 + 0.65 * a),
    "less_contrast": lambda x, a: _contrast(x, 1 - min(0.5 * a, 0.9)),
    "more_saturation": lambda x, a: _saturation(x, 1 + 0.9 * a),
    "less_saturation": lambda x, a: _saturation(x, 1 - min(0.6 * a, 0.95)),
    "warmer": lambda x, a: _gained(x, (1.14, 1.0, 0.72), (6, 2, 0), a),
    "cooler": lambda x, a: _gained(x, (0.76, 0.97, 1.14), (0, 2, 8), a),
    "sharpen": _sharpen,
    "blur": lambda x, a: smoothed(x, 0.022 * a),
    "vignette": _vignette,
    "black_and_white": lambda x, a: x + (luminance(x) - x) * np.float32(min(a, 1.0)),
    "sepia": _sepia,
    "vintage": _vintage,
    "professional": _professional,
    "denoise": lambda x, a: smoothed(x, 0.006 * a),
    "night": _night,
    "dusk": lambda x, a: _gained(x, DUSK_GAIN, DUSK_LIFT, a),
    "noise": _noise,
}
