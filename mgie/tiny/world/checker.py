"""The object check: was the right thing changed, and nothing else? Read off the edited picture.

Source and goal are divided into cells: pixels that show the same part of the same thing (or background) before and
after, the large ones also by place. Of each cell the mean colour is measured, of the whole picture also how much
fine detail and noise it has. Where source and goal differ, the edited picture must have gone most of the way and not
elsewhere; where they do not, it must be like the source. So a blurred edit passes and a missing, misplaced or
additional one fails. Colours are sRGB, 0 to 1.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mgie.errors import ImageError
from mgie.tiny.world.draw import draw_regions
from mgie.tiny.world.edits import Picture
from mgie.tiny.world.filters import smoothed
from mgie.tiny.world.paint import Pixels
from mgie.tiny.world.samples import Sample
from mgie.tiny.world.scene import Scene
from mgie.tiny.world.things import FIRST_THING_REGION

Floats = npt.NDArray[np.float32]

_GRID = 4  # large cells are divided by place into this many rows and columns
_SOFTNESS = 0.014  # of the blur before measuring, in sides: its standard deviation
_USUAL_SPREAD = 0.2  # standard deviation of all values of a picture by day
_DETAIL_OPERATIONS = frozenset({"sharpen", "blur", "denoise"})
_MIN_CELL_SHARE = 0.0012  # of the picture: 20 pixels at 128 px
_CHANGED = 0.05  # distance of mean colours from which on a cell counts as changed by the edit
_MIN_PROGRESS, _MAX_PROGRESS = 0.52, 1.6  # along the way from source to goal
_MAX_ASIDE = 0.35  # distance from the line between them, as a share of that way
_MAX_STRAY = 0.075  # a cell that should stay may change by this much
_BYSTANDER_SHARE, _MAX_BYSTANDER_STRAY = 0.003, 0.15  # no cell of this share of the picture may change more than this
_MIN_CHANGED_SHARE = 0.8  # of the changed cells, weighted by area and change, that must be right
_MIN_KEPT_SHARE = 0.93  # of the unchanged area


@dataclass(frozen=True, kw_only=True)
class Check:
    """What the object check found."""

    change: float
    "share of what should change that did, 0 to 1"
    kept: float
    "share of what should stay that did, 0 to 1"
    num_strays: int
    "parts of the picture that should stay and have clearly changed"

    @property
    def is_right(self) -> bool:
        """Whether the right thing was changed and nothing else."""
        return self.change >= _MIN_CHANGED_SHARE and self.kept >= _MIN_KEPT_SHARE and self.num_strays == 0


def check_edit(sample: Sample, edited: Pixels) -> Check:
    """Compares an edited picture with what the sample asks for.

    Args:
        edited: [S, S, 3] of the sample's side.

    Raises:
        ImageError: `edited` has another shape.
    """
    if edited.shape != sample.source_pixels.shape:
        raise ImageError(f"edited picture has shape {edited.shape}; the sample's is {sample.source_pixels.shape}")
    source, goal, result = (
        pixels.astype(np.float32) / np.float32(255) for pixels in (sample.source_pixels, sample.goal_pixels, edited)
    )
    cells = _cells(sample)
    area = np.bincount(cells).astype(np.float32)
    is_large = area >= _MIN_CELL_SHARE * cells.size
    # All three are softened alike, so that an edited picture which is a little soft is measured like the others.
    before, after, found = (_means(smoothed(one, _SOFTNESS), cells, area)[is_large] for one in (source, goal, result))
    area = area[is_large]
    tolerance = min(1.0, float(goal.std()) / _USUAL_SPREAD)  # the colours of a night are nearer to each other
    way = np.linalg.norm(after - before, axis=1)
    is_changed = way >= min(_CHANGED, 0.5 * float(way.max()))  # the largest change counts, however small
    weight = np.where(is_changed, np.sqrt(area) * way, 0)
    if sample.operation in _DETAIL_OPERATIONS:
        change = _detail_progress(source, goal, result)
    else:
        is_right = _went_along(before, after, found)
        change = float((weight * is_right).sum() / max(weight.sum(), 1e-6))
    stray = np.where(is_changed, 0, np.linalg.norm(found - after, axis=1))
    num_still = max(float(area[~is_changed].sum()), 1e-6)
    return Check(
        change=change,
        kept=1 - float(area[stray > tolerance * _MAX_STRAY].sum()) / num_still,
        num_strays=int(((stray > tolerance * _MAX_BYSTANDER_STRAY) & (area >= _BYSTANDER_SHARE * cells.size)).sum()),
    )


def _went_along(before: Floats, after: Floats, found: Floats) -> npt.NDArray[np.bool_]:
    """Per cell: whether the change is most of that from source to goal and not elsewhere."""
    way = after - before
    length = np.maximum(np.linalg.norm(way, axis=1), 1e-6)
    progress = ((found - before) * way).sum(axis=1) / length**2
    aside = np.linalg.norm(found - before - progress[:, None] * way, axis=1) / length
    return np.asarray((progress >= _MIN_PROGRESS) & (progress <= _MAX_PROGRESS) & (aside <= _MAX_ASIDE))


def _detail_progress(source: Floats, goal: Floats, result: Floats) -> float:
    """1 where the fine detail of the result is nearer to the goal's than to the source's, else 0."""
    before, after, found = (
        float(np.log(np.abs(one - smoothed(one, 0.012)).mean() + 1e-4)) for one in (source, goal, result)
    )
    progress = (found - before) / (after - before) if after != before else 0.0
    return float(_MIN_PROGRESS <= progress <= _MAX_PROGRESS + 0.4)


def _cells(sample: Sample) -> npt.NDArray[np.int64]:
    """Number of the cell that each pixel is in, from 0, [S * S]."""
    side = sample.side_px
    before, after = (_regions(picture, side) for picture in (sample.edit.source, sample.edit.goal))
    steps = np.arange(side) * _GRID // side
    place = steps[:, None] * _GRID + steps[None, :]
    is_background = (before < FIRST_THING_REGION) & (after < FIRST_THING_REGION)
    keys = (before * 256 + after) * (_GRID * _GRID) + np.where(is_background, place, 0)
    return np.asarray(np.unique(keys.reshape(-1), return_inverse=True)[1])


def _regions(picture: Picture, side_px: int) -> npt.NDArray[np.int64]:
    if isinstance(picture, Scene):
        return draw_regions(picture, side_px).astype(np.int64)
    return np.zeros((side_px, side_px), dtype=np.int64)


def _means(pixels: Floats, cells: npt.NDArray[np.int64], area: Floats) -> Floats:
    """Mean colour of each cell, [N, 3]; `area` [N] is how many pixels it has."""
    sums = [np.bincount(cells, weights=pixels[..., channel].reshape(-1)) for channel in range(3)]
    return (np.stack(sums, axis=1) / area[:, None]).astype(np.float32)
