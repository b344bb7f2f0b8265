"""Masks: which latents they keep, and that no pixel outside them changes."""

import copy
import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mgie.bundle.bundle import Bundle
from mgie.config import EditSettings
from mgie.editor import Editor
from mgie.errors import ImageError
from mgie.images.files import read_mask
from mgie.images.geometry import Framing, center_square
from mgie.images.masks import check_mask, lay_over
from mgie.images.pictures import load_mask
from mgie.images.pixels import kept_latents
from mgie.inference.conditioner import EditCondition
from mgie.inference.renderer import Renderer, RenderRequest
from mgie.tiny.world import make_sample


def random_mask(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Rectangles, speckles or soft blobs."""
    kind = rng.integers(3)
    mask = np.zeros((height, width), dtype=np.uint8)
    if kind == 0:
        x, y = rng.integers(width), rng.integers(height)
        mask[y : y + rng.integers(1, height + 1), x : x + rng.integers(1, width + 1)] = 255
    elif kind == 1:
        mask[rng.random((height, width)) < 0.1] = 255
    else:
        coarse = rng.integers(0, 256, (3, 3), dtype=np.uint8) * (rng.random((3, 3)) < 0.5)
        mask = np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR))
    mask[height // 2, width // 2] = 255  # at least one pixel, in the centre square too
    return Image.fromarray(mask)


@pytest.fixture(scope="module")
def renderer(random_bundle: Bundle) -> Renderer:
    renderer = copy.copy(random_bundle.load_renderer(device="cpu"))
    renderer.work_area_px = 32 * 32
    return renderer


def test_no_pixel_outside_fifty_random_masks_changes(renderer: Renderer) -> None:
    rng = np.random.default_rng(0)
    condition = torch.zeros(32, 64)
    edit_condition = EditCondition(
        expressive="", condition=condition, null_condition=condition, used_fallback=False,
        prompt_tokens=1, image_tokens=1, output_tokens=1, bundle="b",
    )  # fmt: skip
    num_outside = num_changed = 0
    for i in range(50):
        width, height = (int(side) for side in rng.integers(16, 90, 2))
        source = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        mask = random_mask(rng, width, height)
        settings = EditSettings(
            steps=1, guidance_scale=1.0, image_guidance_scale=1.0, detail_transfer=i % 2 == 0, square_crop=i % 3 == 0
        )
        request = RenderRequest(image=source, edit_condition=edit_condition, settings=settings, seed=i, mask=mask)
        [(_, edited)] = renderer.render([request])
        if settings.square_crop:
            source, mask = center_square(source), center_square(mask)
        outside = np.asarray(mask) == 0
        assert edited.size == source.size
        assert (np.asarray(edited)[outside] == np.asarray(source)[outside]).all()
        num_outside += outside.sum()
        num_changed += (np.asarray(edited)[~outside] != np.asarray(source)[~outside]).sum()
    assert num_outside > 10_000
    assert num_changed > 10_000


def test_a_latent_is_kept_only_where_the_mask_touches_none_of_its_pixels() -> None:
    mask = np.zeros((40, 64), dtype=np.uint8)
    mask[7, 8] = 1  # a corner of its cell, hardly grey
    mask[16:40, 56:] = 255
    expected = torch.ones(1, 5, 8, dtype=torch.bool)
    expected[0, 0, 1] = expected[0, 2:, 7] = False
    framing = Framing((64, 40), (64, 40), square_crop=False)
    assert torch.equal(kept_latents(Image.fromarray(mask), framing, (5, 8)), expected)
    # Sizes that do not divide: a cell is edited when it shares a pixel, be it in part, with the mask.
    assert torch.equal(
        kept_latents(Image.fromarray(np.array([[0, 0, 255]], dtype=np.uint8)), Framing((3, 1), (16, 16), square_crop=False), (1, 2)),
        torch.tensor([[[True, False]]]),
    )  # fmt: skip


def test_the_centre_square_of_a_mask_goes_with_that_of_the_source() -> None:
    mask = Image.new("L", (96, 32))
    mask.paste(255, (0, 0, 40, 32))
    kept = kept_latents(mask, Framing((96, 32), (32, 32), square_crop=True), (4, 4))
    assert kept[0].tolist() == [[False, True, True, True]] * 4


def test_grey_blends_and_the_ends_are_exact() -> None:
    source, edited = Image.new("RGB", (3, 1), (10, 20, 30)), Image.new("RGB", (3, 1), (110, 220, 130))
    mask = Image.fromarray(np.array([[0, 128, 255]], dtype=np.uint8))
    pixels = np.asarray(lay_over(edited, source, mask))[0].astype(int)
    assert pixels[0].tolist() == [10, 20, 30]
    assert pixels[2].tolist() == [110, 220, 130]
    assert np.abs(pixels[1] - [60, 120, 80]).max() <= 1


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (Image.new("RGB", (40, 20), "white"), "mask has mode RGB"),
        (Image.new("L", (20, 40), 255), "mask is 20x40 px; it must be 40x20 px"),
        (Image.new("L", (40, 20)), "mask marks no pixel to edit"),
    ],
)
def test_a_mask_that_cannot_be_used_is_refused(mask: Image.Image, message: str) -> None:
    with pytest.raises(ImageError, match=message) as refused:
        check_mask(mask, Framing((40, 20), (40, 20), square_crop=False))
    assert refused.value.param == "mask"


def test_the_editor_takes_a_mask_and_refuses_one_before_the_words_are_read(random_bundle: Bundle) -> None:
    editor = Editor.load(random_bundle, device="cpu")
    source = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    mask = Image.new("L", (60, 40))
    mask.paste(255, (10, 10, 30, 30))
    edited = editor.edit(source, "p", seed=1, steps=1, mask=mask, expressive="a dark sky").image
    outside = np.asarray(mask) == 0
    assert (np.asarray(edited)[outside] == np.asarray(source)[outside]).all()
    assert (np.asarray(edited)[~outside] != np.asarray(source)[~outside]).any()
    with pytest.raises(ImageError, match="mask"):
        editor.edit(source, " ", mask=mask.resize((40, 60)))


def test_a_model_that_makes_the_change_makes_the_whole_pictures_and_the_mask_cuts_it_out() -> None:
    editor = Editor.load("tiny", device="cpu")
    sample = make_sample(11, "test", 37, side_px=128)
    mask = random_mask(np.random.default_rng(3), 128, 128)
    whole, part = (
        editor.edit(sample.source, "make it night", seed=1, expressive="It is night.", mask=given).image
        for given in (None, mask)
    )
    assert np.abs(np.asarray(whole, dtype=int) - np.asarray(sample.source, dtype=int)).mean() > 20
    assert (np.asarray(part) == np.asarray(lay_over(whole, sample.source, mask))).all()


def hole() -> Image.Image:
    """A photo of noise whose left third is transparent."""
    rgba = np.random.default_rng(0).integers(0, 256, (20, 30, 4), dtype=np.uint8)
    rgba[..., 3] = 255
    rgba[:, :10, 3] = 0
    return Image.fromarray(rgba)


def painted(mode: str) -> Image.Image:
    """White in the left third, black elsewhere."""
    image = Image.new("L", (30, 20))
    image.paste(255, (0, 0, 10, 20))
    return image.convert(mode)


def through(image: Image.Image, file_format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def turned(image: Image.Image) -> bytes:
    """The file of a camera held upright: its pixels lie on their side."""
    exif = image.getexif()
    exif[0x0112] = 6
    return through(image.transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif)


@pytest.mark.parametrize(
    "given",
    [
        hole(),
        through(hole(), "PNG"),
        through(hole(), "WEBP", lossless=True),
        turned(hole()),
        painted("LA"),
        painted("RGBA"),  # opaque: what was painted counts, as in a file without alpha
        *(painted(mode) for mode in ("1", "L", "RGB", "P")),
        through(painted("RGB"), "JPEG", quality=60),
        turned(painted("L")),
        np.asarray(hole()),
    ],
)
def test_transparency_or_else_white_says_where_to_edit(given: Any) -> None:
    assert (np.asarray(load_mask(given)) == np.asarray(painted("L"))).all()


def test_http_takes_transparency_alone_and_reads_it_as_every_door_does() -> None:
    assert (np.asarray(read_mask(turned(hole()))) == np.asarray(painted("L"))).all()
    with pytest.raises(ImageError, match="without transparency"):
        read_mask(through(painted("RGB"), "PNG"))
