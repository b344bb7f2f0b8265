"""Framing, resizing and crops of pictures. Knows nothing of files and tensors."""

import math
from dataclasses import dataclass

from PIL import Image

from mgie.errors import ConfigError

PUBLISHED_SIDE_PX = 512  # training images pass through this size before any other


@dataclass(frozen=True)
class Framing:
    """How a source is brought to the model and its result back."""

    source_wh: tuple[int, int]
    work_wh: tuple[int, int]
    square_crop: bool

    @property
    def output_wh(self) -> tuple[int, int]:
        """Size of the result: the source's, or with `square_crop` that of its centre square."""
        side = min(self.source_wh)
        return (side, side) if self.square_crop else self.source_wh


def plan_framing(
    source_wh: tuple[int, int], *, work_area_px: int, multiple_px: int, square_crop: bool = False
) -> Framing:
    """Picks the work size: sides multiples of `multiple_px`, area at most 1.1 x `work_area_px`.

    Of the sizes possible it minimises |log(aspect / source aspect)| + |log(area / work_area_px)| / 4:
    a slight distortion, undone when the result is scaled back, costs less than a much smaller area.
    Sources too slender for any such size get the most slender one.

    Raises:
        ConfigError: `multiple_px` below 1, or its square larger than `work_area_px`.
    """
    if multiple_px < 1:
        raise ConfigError(f"multiple_px is {multiple_px}; it must be at least 1", param="multiple_px")
    if work_area_px < multiple_px**2:
        allowed = f"it must be at least multiple_px squared = {multiple_px**2}"
        raise ConfigError(f"work_area_px is {work_area_px}; {allowed}", param="work_area_px")
    aspect = 1.0 if square_crop else source_wh[0] / source_wh[1]
    max_cells = int(1.1 * work_area_px) // multiple_px**2  # area in cells of multiple_px x multiple_px

    def cost(cells: tuple[int, int]) -> float:
        columns, rows = cells
        area = columns * rows * multiple_px**2
        return abs(math.log(columns / rows / aspect)) + abs(math.log(area / work_area_px)) / 4

    # For each number of columns only the rows next to the source's aspect can be best.
    candidates = {
        (columns, min(max(1, rows), max_cells // columns))
        for columns in range(1, max_cells + 1)
        for rows in (math.floor(columns / aspect), math.ceil(columns / aspect))
    }
    columns, rows = min(sorted(candidates), key=cost)
    return Framing(source_wh, (columns * multiple_px, rows * multiple_px), square_crop)


def framed(image: Image.Image, framing: Framing) -> Image.Image:
    """What the model is to see of the source, at its own size: all of it, or its centre square."""
    return center_square(image) if framing.square_crop else image


def center_square(image: Image.Image) -> Image.Image:
    """The largest centred square; an odd pixel is left over on the right or at the bottom."""
    return center_crop(image, min(image.size), min(image.size))


def center_crop(image: Image.Image, width: int, height: int) -> Image.Image:
    """The rectangle of this size around the centre."""
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def resize(image: Image.Image, wh: tuple[int, int]) -> Image.Image:
    """Bicubic, antialiased when shrinking; the filter of the published pipeline."""
    return image.resize(wh, Image.Resampling.BICUBIC)


def training_pixels(image: Image.Image, side_px: int) -> Image.Image:
    """The published training chain: centre square, 512 px, then `side_px`; two resizes, as the weights saw it."""
    return resize(resize(center_square(image), (PUBLISHED_SIDE_PX, PUBLISHED_SIDE_PX)), (side_px, side_px))
