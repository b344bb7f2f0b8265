"""What the shipped bundle can do, on pictures that it was not trained on."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from mgie.editor import Editor
from mgie.tiny.world import make_sample, states_change

Floats = npt.NDArray[np.float64]
LUMA = np.array([0.299, 0.587, 0.114])


@pytest.fixture(scope="module")
def editor() -> Editor:
    return Editor.load("tiny", device="cpu")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("instruction", "measure", "sign"),
    [
        ("make the photo brighter", lambda x: (x @ LUMA).mean(), 1),
        ("make the photo darker", lambda x: (x @ LUMA).mean(), -1),
        ("make it black and white", lambda x: (x.max(axis=2) - x.min(axis=2)).mean(), -1),
        ("make the colours warmer", lambda x: (x[..., 0] - x[..., 2]).mean(), 1),
    ],
)
def test_whole_photos_change_the_way_that_is_asked(
    editor: Editor, instruction: str, measure: Callable[[Floats], float], sign: int
) -> None:
    changes = []
    for number in range(4):
        source = make_sample(21, "test", number).source
        result = editor.edit(source, instruction, seed=3)
        assert not result.edit_condition.used_fallback
        changes.append(measure(np.asarray(result.image) / 255.0) - measure(np.asarray(source) / 255.0))
    assert sign * np.mean(changes) > 0.02


@pytest.mark.slow
def test_edits_come_nearer_to_their_goals_than_the_source_is_and_say_what_they_do(editor: Editor) -> None:
    edited, copied, said = [], [], []
    for number in range(24):
        sample = make_sample(22, "test", number)
        result = editor.edit(sample.source, sample.instruction, seed=number)
        inside = sample.changed
        edited.append(np.abs(np.asarray(result.image) / 255.0 - sample.goal_pixels / 255.0)[inside].mean())
        copied.append(np.abs(sample.source_pixels / 255.0 - sample.goal_pixels / 255.0)[inside].mean())
        said.append(states_change(result.expressive, sample.edit))
    assert np.mean(edited) < 0.8 * np.mean(copied)
    assert np.mean(said) > 0.5
