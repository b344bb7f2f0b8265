"""The object check: passes what is right, fails copies, other samples' goals and wrong edits of the same scene."""

import functools
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from mgie.errors import ImageError
from mgie.tiny.world import Sample, check_edit, make_sample
from mgie.tiny.world.draw import draw_scene
from mgie.tiny.world.paint import Pixels
from mgie.tiny.world.scene import COLORS, Scene, changed, without

pytestmark = pytest.mark.slow


@functools.cache
def _samples() -> list[Sample]:
    return [make_sample(2, "test", number) for number in range(120)]


def _share(edited: list[Pixels]) -> float:
    pairs = zip(_samples(), edited, strict=True)
    return float(np.mean([check_edit(sample, pixels).is_right for sample, pixels in pairs]))


def test_goals_pass() -> None:
    assert _share([sample.goal_pixels for sample in _samples()]) >= 0.99


def test_copies_of_the_source_fail() -> None:
    assert _share([sample.source_pixels for sample in _samples()]) <= 0.05


def test_goals_of_other_samples_fail() -> None:
    order = np.roll(np.arange(len(_samples())), 1 + int(np.random.default_rng(0).integers(len(_samples()) - 1)))
    assert _share([_samples()[i].goal_pixels for i in order]) <= 0.1


def test_goals_of_a_low_resolution_mostly_pass() -> None:
    """As a small model gives them: right, but soft."""

    def soft(pixels: Pixels) -> Pixels:
        small = Image.fromarray(pixels).resize((48, 48), Image.Resampling.BOX)
        return np.asarray(small.resize((128, 128), Image.Resampling.BICUBIC))

    assert _share([soft(sample.goal_pixels) for sample in _samples()]) >= 0.95


def _of(operation: str) -> list[tuple[Sample, Scene, Scene]]:
    found = []
    for sample in _samples():
        source, goal = sample.edit.source, sample.edit.goal
        if sample.operation == operation and isinstance(source, Scene) and isinstance(goal, Scene):
            found.append((sample, source, goal))
    assert len(found) >= 5
    return found


def test_a_wrong_colour_fails() -> None:
    """All but colours that are near the right one in the light of the scene (pink for white at sunset)."""
    is_refused = []
    for sample, source, goal in _of("recolor")[:8]:
        (thing,) = set(goal.things) - set(source.things)
        old = next(one.color for one in source.things if one.id == thing.id)
        for color in set(COLORS) - {old, thing.color}:
            edited = draw_scene(changed(goal, replace(thing, color=color)), sample.side_px)
            is_refused.append(not check_edit(sample, edited).is_right)
    assert len(is_refused) >= 40
    assert np.mean(is_refused) >= 0.85


def test_removing_another_thing_as_well_fails() -> None:
    is_refused = [
        not check_edit(sample, draw_scene(without(goal, thing), sample.side_px)).is_right
        for sample, _, goal in _of("remove")
        for thing in goal.in_row("front") + goal.in_row("back")
    ]
    assert len(is_refused) >= 10
    assert np.mean(is_refused) >= 0.85  # at night a dark pine is hardly missed


def test_the_right_edit_in_another_light_fails() -> None:
    for sample, _, goal in _of("remove"):
        other = "night" if goal.time == "day" else "day"
        assert not check_edit(sample, draw_scene(replace(goal, time=other), sample.side_px)).is_right


def test_a_picture_of_another_size_is_refused() -> None:
    with pytest.raises(ImageError, match="shape"):
        check_edit(_samples()[0], np.zeros((64, 64, 3), dtype=np.uint8))
