"""Pictures of edits by a model that trains: what is drawn, and by which words."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mgie.bundle.bundle import open_bundle
from mgie.config import TrainingConfig, Variant
from mgie.data.collate import EditExample
from mgie.training.variants import load_training_model
from pipelines.training.sample_sheet import SampleEditor, draw_sheet

SIDE_PX = 64


def _example(instruction: str, expressive: str = "The sky would be dark.") -> EditExample:
    noise = np.random.default_rng(0).integers(0, 256, (2, 80, 70, 3), dtype=np.uint8)
    source, goal = (Image.fromarray(pixels) for pixels in noise)
    return EditExample(source=source, goal=goal, instruction=instruction, expressive=expressive)


@pytest.mark.parametrize(("variant", "bundle"), [("e2e", "random"), ("lgie", "random"), ("ft", "random-ip2p")])
def test_a_sheet_follows_the_weights_and_nothing_else(variant: Variant, bundle: str) -> None:
    opened = open_bundle(bundle)
    made = load_training_model(opened, TrainingConfig(variant=variant, image_side_px=SIDE_PX), device="cpu")
    edit = SampleEditor(opened, made, variant, [_example("make it night")], num_steps=2)
    first, again = edit(), edit()
    assert first.tobytes() == again.tobytes()
    with torch.no_grad():
        made.model.unet.conv_out.weight.add_(0.1)
    changed = np.abs(np.asarray(edit(), dtype=int) - np.asarray(first)).sum(axis=(0, 2))
    where = np.flatnonzero(changed)
    assert 2 * SIDE_PX < where.min() <= where.max() < 3 * SIDE_PX + 20, "the edited image alone, third in its row"


def test_words_that_the_model_cannot_take_are_said_in_the_picture() -> None:
    opened = open_bundle("random-ip2p")
    made = load_training_model(opened, TrainingConfig(variant="ft", image_side_px=SIDE_PX), device="cpu")
    examples = [_example("a", expressive="word " * 200), _example("b")]
    sheet = np.asarray(SampleEditor(opened, made, "ft", examples, num_steps=1)())
    row, third = len(sheet) // 2, slice(2 * SIDE_PX + 12, 3 * SIDE_PX + 12)
    assert (sheet[:row, third] == 255).all(), "no edited image"
    assert not (sheet[row:, third] == 255).all()


def test_long_words_are_broken_into_lines_that_stay_in_their_row(tmp_path: Path) -> None:
    square = Image.new("RGB", (SIDE_PX, SIDE_PX), "red")
    sheet = np.asarray(draw_sheet([([square] * 3, "snow " * 100), ([square] * 3, "")]))
    row = len(sheet) // 2
    words = sheet[:, 3 * (SIDE_PX + 6) :]
    assert (words[:row] < 128).any()
    assert (words[row:] == 255).all()
    assert (words[:, -2:] == 255).all()
