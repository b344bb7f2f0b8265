"""Samples: pictures, masks and all words of an edit, each from (seed, split, number) alone, in any order.

**Splits.** The random numbers of a sample are keyed by its split, so no scene is in two. Test samples are of three
sorts in turn (`HeldOut`): "scene" differs from training by its scene only, "wording" is said in words that training
never has, "combination" is a change that training never has, of parts that it has (a purple car, when it has other
purple things and other cars). Validation is like training.
"""

import zlib
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from mgie.errors import ConfigError
from mgie.tiny.world.ambiguities import AMBIGUITIES, sample_ambiguous
from mgie.tiny.world.answers import describe, express
from mgie.tiny.world.draw import draw_scene
from mgie.tiny.world.edits import Edit, Picture
from mgie.tiny.world.filters import apply_filter
from mgie.tiny.world.instructions import instruct
from mgie.tiny.world.nouns import caption
from mgie.tiny.world.operations import OPERATIONS, Family
from mgie.tiny.world.paint import Pixels
from mgie.tiny.world.photos import draw_photo
from mgie.tiny.world.scene import Scene, pick

Split = Literal["train", "val", "test"]
HeldOut = Literal["", "scene", "wording", "combination"]

SIDE_PX = 128
AMBIGUOUS_SHARE = 0.28
_SPLIT_KEYS: dict[Split, int] = {"train": 0, "val": 1, "test": 2}
_TEST_SORTS: tuple[HeldOut, ...] = ("scene", "scene", "wording", "combination")
_HELD_OUT_ONE_IN = 8
_MAX_TRIES = 200
# An edit must be seen: this share of the pixels changes by this much on average, 0 to 255.
_MIN_CHANGED_SHARE, _MIN_CHANGE = 0.004, 8.0


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One edit with everything that is known of it. Pictures are drawn when they are asked for."""

    edit: Edit
    side_px: int
    instruction: str
    "the user's words"
    verbose: str
    "2 to 4 sentences: what the picture would be like"
    expressive: str
    "the change in one sentence, at most 32 words"
    held_out: HeldOut
    "what training has never seen of it"

    @property
    def operation(self) -> str:
        """Name of the operation."""
        return self.edit.operation

    @property
    def family(self) -> Family:
        """Family of the operation."""
        return OPERATIONS[self.edit.operation].family

    @property
    def is_ambiguous(self) -> bool:
        """Whether one must look at the picture to know what is asked."""
        return bool(self.edit.ambiguity)

    @property
    def source_caption(self) -> str:
        """What the source shows."""
        return caption(self.edit.source)

    @property
    def goal_caption(self) -> str:
        """What the goal shows; a filter is named after what the source shows."""
        shown = caption(self.edit.goal)
        if self.edit.filter is None:
            return shown
        return f"{shown}, {self.edit.operation.replace('_', ' ')}"

    @cached_property
    def source_pixels(self) -> Pixels:
        """[S, S, 3]."""
        pixels = draw_picture(self.edit.source, self.side_px)
        return apply_filter(pixels, self.edit.spoil) if self.edit.spoil else pixels

    @cached_property
    def goal_pixels(self) -> Pixels:
        """[S, S, 3]."""
        if self.edit.filter:
            return apply_filter(self.source_pixels, self.edit.filter)
        return draw_picture(self.edit.goal, self.side_px)

    @cached_property
    def changed(self) -> npt.NDArray[np.bool_]:
        """Where source and goal differ, [S, S]."""
        return np.asarray((self.source_pixels != self.goal_pixels).any(axis=-1))

    @property
    def source(self) -> Image.Image:
        """The picture before."""
        return Image.fromarray(self.source_pixels)

    @property
    def goal(self) -> Image.Image:
        """The picture after."""
        return Image.fromarray(self.goal_pixels)

    @property
    def mask(self) -> Image.Image:
        """White where source and goal differ (mode L)."""
        return Image.fromarray(self.changed.astype(np.uint8) * 255)


def draw_picture(picture: Picture, side_px: int) -> Pixels:
    """The pixels of a record, [side_px, side_px, 3]."""
    return draw_scene(picture, side_px) if isinstance(picture, Scene) else draw_photo(picture, side_px)


def is_held_out(combination: str) -> bool:
    """Whether a combination is in no training sample: one in eight, by its name."""
    return combination != "" and zlib.crc32(combination.encode()) % _HELD_OUT_ONE_IN == 0


def make_sample(seed: int, split: Split, number: int, *, side_px: int = SIDE_PX) -> Sample:
    """Sample `number` of a split: the same for the same arguments, whatever else was made.

    Raises:
        ConfigError: `side_px` is below 32, or `number` or `seed` below 0.
    """
    if side_px < 32:
        raise ConfigError(f"side_px is {side_px}; it must be at least 32", param="side_px")
    if min(seed, number) < 0:
        raise ConfigError(f"seed and number are {seed} and {number}; they must be at least 0", param="number")
    rng = np.random.default_rng([seed, _SPLIT_KEYS[split], number])
    held_out: HeldOut = _TEST_SORTS[number % len(_TEST_SORTS)] if split == "test" else ""
    for _ in range(_MAX_TRIES):
        edit = _sample_edit(rng)
        if edit is None or is_held_out(edit.combination) != (held_out == "combination"):
            continue
        sample = Sample(
            edit=edit,
            side_px=side_px,
            instruction=instruct(rng, edit, is_held_out=held_out == "wording"),
            verbose=describe(rng, edit),
            expressive=express(rng, edit),
            held_out=held_out,
        )
        if _is_seen(sample):
            return sample
    raise AssertionError(f"no sample {number} of {split} in {_MAX_TRIES} tries")


def _sample_edit(rng: np.random.Generator) -> Edit | None:
    """An edit of any kind."""
    if rng.random() < AMBIGUOUS_SHARE:
        name = pick(rng, tuple(AMBIGUITIES), [one.weight for one in AMBIGUITIES.values()])
        return sample_ambiguous(rng, name)
    name = pick(rng, tuple(OPERATIONS), [one.weight for one in OPERATIONS.values()])
    return OPERATIONS[name].make(rng)


def _is_seen(sample: Sample) -> bool:
    """Whether the change is large enough to be seen."""
    changed = sample.changed
    if changed.mean() < _MIN_CHANGED_SHARE:
        return False
    difference = np.abs(sample.source_pixels[changed].astype(np.int16) - sample.goal_pixels[changed])
    return bool(difference.mean() >= _MIN_CHANGE)
