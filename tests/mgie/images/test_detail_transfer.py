"""Detail transfer: what is not edited stays, colour changes arrive exactly, local edits show, any size works."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from mgie.bundle.bundle import Bundle
from mgie.config import EditSettings, GenerationConfig
from mgie.editor import Editor
from mgie.images import detail_transfer as detail
from mgie.images.detail_transfer import transfer_detail
from mgie.images.files import read_image
from mgie.images.geometry import center_square, resize
from mgie.images.pixels import from_signed, to_signed
from mgie.inference.conditioner import EditCondition
from mgie.inference.renderer import RenderRequest
from mgie.tiny.world import make_sample
from mgie.tiny.world.filters import Filter, FilterName, apply_filter

WORK = (128, 128)
MATRIX = torch.tensor([[0.6, 0.2, 0.0], [0.1, 0.5, 0.1], [0.0, 0.2, 0.4]])
OFFSET = torch.tensor([0.15, 0.05, 0.2])


def picture(wh: tuple[int, int] = (384, 320), seed: int = 0) -> Image.Image:
    """Patches of colour under fine grain, which no small picture can hold."""
    rng = np.random.default_rng(seed)
    patches = Image.fromarray(rng.integers(20, 236, (8, 8, 3), dtype=np.uint8)).resize(wh)
    grain = rng.integers(-20, 21, (wh[1], wh[0], 3))
    return Image.fromarray((np.asarray(patches).astype(int) + grain).clip(0, 255).astype(np.uint8))


def small(image: Image.Image, wh: tuple[int, int] = WORK) -> Tensor:
    return to_signed(resize(image, wh))


def lossy(image: Image.Image, seed: int) -> Tensor:
    """As a small VAE and a diffusion model do: blurred, coarse, a little off."""
    file = io.BytesIO()
    resize(image, WORK).filter(ImageFilter.GaussianBlur(1.2)).save(file, "JPEG", quality=35)
    drift = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 0.02
    return to_signed(read_image(file.getvalue())) + F.interpolate(drift, WORK[::-1], mode="bilinear")[0]


def recolored(unit: Tensor) -> Tensor:
    return torch.einsum("ij,jhw->ihw", MATRIX, unit) + OFFSET[:, None, None]


def values(image: Image.Image) -> Any:
    return np.asarray(image).astype(float) / 255


def distance(a: Any, b: Any) -> float:
    return float(np.abs(values(a) - values(b)).mean())


@pytest.mark.parametrize(
    ("wh", "work"), [((384, 320), WORK), ((1500, 40), (512, 16)), ((33, 900), (16, 480)), ((50, 50), WORK), ((16, 16), (1, 1))]
)  # fmt: skip
def test_without_a_change_the_source_stays_bit_by_bit(wh: tuple[int, int], work: tuple[int, int]) -> None:
    source = picture(wh)
    decoded = small(picture(seed=1), work)  # however little the VAE may know of the source
    assert transfer_detail(source, guide=decoded, edited=decoded).tobytes() == source.tobytes()


@pytest.mark.parametrize(("wh", "work"), [((384, 320), WORK), ((900, 120), (352, 48)), ((120, 900), (48, 352))])
def test_a_colour_change_of_the_whole_picture_reaches_every_pixel(wh: tuple[int, int], work: tuple[int, int]) -> None:
    source = picture(wh)
    guide = small(source, work)
    edited = recolored(guide / 2 + 0.5) * 2 - 1
    exact = from_signed(recolored(to_signed(source) / 2 + 0.5) * 2 - 1)
    off = np.abs(values(transfer_detail(source, guide=guide, edited=edited)) - values(exact))
    assert off.mean() < 1 / 255
    assert off.max() < 3 / 255  # corners and edges too
    assert distance(resize(from_signed(edited), wh), exact) > 10 * off.mean()


def test_a_change_that_differs_from_place_to_place_is_followed() -> None:
    source = picture((384, 384))

    def vignetted(image: Image.Image) -> Image.Image:
        return Image.fromarray(apply_filter(np.asarray(image), Filter("vignette")))

    edited = small(vignetted(source))
    result = transfer_detail(source, guide=small(source), edited=edited)
    assert distance(result, vignetted(source)) < 4 / 255


def test_pale_colours_go_too_when_the_whole_picture_loses_its_colours() -> None:
    pixels = np.asarray(picture((384, 384))).copy()
    pixels[:96, :96] = (128, 124, 121)  # a change below the gate's threshold
    source = Image.fromarray(pixels)
    exact = Image.fromarray(apply_filter(pixels, Filter("black_and_white")))
    result = transfer_detail(source, guide=small(source), edited=small(exact))
    assert np.ptp(np.asarray(result)[20:76, 20:76].astype(int), axis=-1).max() <= 2


def test_a_tint_goes_when_only_a_small_part_had_much_colour_to_lose() -> None:
    pixels = np.full((384, 384, 3), (128, 124, 121), np.uint8)  # as faint as the gate keeps
    pixels[:120, :120] = np.asarray(picture((120, 120)))
    exact = apply_filter(pixels, Filter("black_and_white"))
    source = Image.fromarray(pixels)
    result = transfer_detail(source, guide=small(source), edited=small(Image.fromarray(exact)))
    assert np.ptp(np.asarray(result)[160:, 160:].astype(int), axis=-1).max() <= 2


def test_what_is_put_in_shows_and_the_rest_stays_bit_by_bit() -> None:
    source = picture((512, 512))
    guide = small(source)
    edited = guide.clone()
    edited[:, 40:80, 30:90] = torch.tensor([0.8, -0.9, -0.6])[:, None, None]
    result = np.asarray(transfer_detail(source, guide=guide, edited=edited)).astype(int)
    inside, outside = np.zeros((512, 512), bool), np.ones((512, 512), bool)
    inside[172:308, 132:348] = True  # 3 work pixels of border apart
    outside[148:332, 108:372] = False
    assert np.abs(result[inside] - (230, 13, 51)).mean() < 6
    assert (result[outside] == np.asarray(source)[outside]).all()


@pytest.mark.parametrize(("noise", "strength", "is_shown"), [(0.0, 0.2, True), (0.05, 0.2, False), (0.05, 1.0, True)])
def test_a_local_edit_must_stand_out_from_what_the_model_changes_everywhere(
    noise: float, strength: float, *, is_shown: bool
) -> None:
    source = Image.new("RGB", (512, 512), (128, 128, 128))
    guide = small(source)
    pattern = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0)) * noise
    edited = guide + F.interpolate(pattern[None], WORK[::-1], mode="bilinear")[0]
    edited[:, 40:80, 30:90] += strength
    off = np.abs(values(transfer_detail(source, guide=guide, edited=edited)) - values(source)).mean(-1)
    shown = off[172:308, 132:348].mean() / (strength / 2)
    assert shown > 0.7 if is_shown else shown < 0.1
    outside = np.ones((512, 512), bool)
    outside[140:340, 100:380] = False
    assert off[outside].mean() < 0.0005 + 0.05 * noise


def test_local_edits_of_drawn_scenes_show_and_leave_the_rest_alone() -> None:
    inside, copied, outside, samples = [], [], [], 0
    for number in range(60):
        sample = make_sample(7, "test", number, side_px=256)
        if sample.changed.mean() > 0.3:
            continue
        guide, edited = lossy(sample.source, 0), lossy(sample.goal, number)
        goal, changed, samples = values(sample.goal), sample.changed, samples + 1
        off = np.abs(values(transfer_detail(sample.source, guide=guide, edited=edited)) - goal).mean(-1)
        inside.append(off[changed].mean())
        copied.append(np.abs(values(sample.source) - goal).mean(-1)[changed].mean())
        outside.append(off[~changed].mean())
        if samples == 6:
            break
    assert samples == 6
    assert np.mean(inside) < 0.5 * np.mean(copied)
    assert np.mean(outside) < 0.004


@pytest.mark.parametrize("name", ["brighter", "darker", "black_and_white", "warmer", "night"])
def test_real_photos_come_nearer_to_the_exact_operation_than_by_upscaling(
    name: FilterName, sample_photos: Path
) -> None:
    paths = sorted((sample_photos / "demo_inputs").glob("*.jpg"))[:2]
    assert paths
    for number, path in enumerate(paths):
        source = read_image(path.read_bytes())
        exact = Image.fromarray(apply_filter(np.asarray(source), Filter(name)))
        edited = lossy(exact, number)
        ours = distance(transfer_detail(source, guide=lossy(source, number + 9), edited=edited), exact)
        assert ours < 0.04
        assert ours < 0.6 * distance(resize(from_signed(edited), source.size), exact)


# ---- the parts


def test_strips_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    source = picture((300, 211))
    guide, edited = small(source), small(picture(seed=3))
    whole = transfer_detail(source, guide=guide, edited=edited)
    assert distance(whole, source) > 0.05
    for strip_px in (1, 300 * 7):
        monkeypatch.setattr(detail, "_STRIP_PX", strip_px)
        assert transfer_detail(source, guide=guide, edited=edited).tobytes() == whole.tobytes()


@pytest.mark.parametrize("wh", [(37, 90), (5, 4), (6, 9)])
def test_maps_are_scaled_bilinearly_between_pixel_centres(wh: tuple[int, int]) -> None:
    field = torch.randn(12, 9, 6, generator=torch.Generator().manual_seed(0)) * 0.1
    source = picture(wh)
    maps = F.interpolate(field[None], wh[::-1], mode="bilinear", align_corners=False)[0]
    colors = to_signed(source) / 2 + 0.5
    expected = colors + torch.einsum("ijhw,jhw->ihw", maps[:9].unflatten(0, (3, 3)), colors) + maps[9:]
    assert np.abs(np.asarray(detail._apply(field, source)) / 255 - expected.clamp(0, 1).permute(1, 2, 0).numpy()).max() < 0.51 / 255  # fmt: skip


def test_the_fit_is_ridge_regression_in_every_window_averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detail, "_RADIUS_PX", 2)
    height, width = 7, 9
    colors, targets = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))

    def windows(x: Any, row: int, column: int) -> Any:
        return x[..., max(0, row - 2) : row + 3, max(0, column - 2) : column + 3].reshape(*x.shape[:-2], -1)

    plain = np.empty((3, 4, height, width))
    for row, column in np.ndindex(height, width):
        x, y = windows(colors.double().numpy(), row, column), windows(targets.double().numpy(), row, column)
        dx, dy = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
        count = x.shape[1]
        matrix = dy @ dx.T / count @ np.linalg.inv(dx @ dx.T / count + detail._RIDGE * np.eye(3))
        plain[:, :3, row, column], plain[:, 3, row, column] = matrix, y.mean(1) - matrix @ x.mean(1)
    expected = np.empty_like(plain)
    for row, column in np.ndindex(height, width):
        expected[..., row, column] = windows(plain, row, column).mean(-1)
    matrix, offset = detail._fit(targets, colors, detail._mean_of_window)
    np.testing.assert_allclose(matrix.numpy(), expected[:, :3], atol=2e-4)
    np.testing.assert_allclose(offset.numpy(), expected[:, 3], atol=2e-4)


# ---- as a setting


def test_an_edit_that_changes_no_latent_returns_the_source(random_bundle: Bundle) -> None:
    renderer = random_bundle.load_renderer(device="cpu")
    none = torch.zeros(32, 64)
    edit_condition = EditCondition(
        expressive="", condition=none, null_condition=none, used_fallback=False,
        prompt_tokens=1, image_tokens=1, output_tokens=1, bundle="b",
    )  # fmt: skip
    for square_crop in (False, True):
        source = picture((200, 150))
        settings = EditSettings(detail_transfer=True, square_crop=square_crop)
        request = RenderRequest(image=source, edit_condition=edit_condition, settings=settings, seed=0)
        framing = renderer.framing(source.size, settings)
        with torch.inference_mode():
            edit = renderer.prepare(request, framing)
            result = renderer.finish(edit, edit.image_latents * renderer.vae.scaling_factor)
        assert result.tobytes() == (center_square(source) if square_crop else source).tobytes()


def test_an_editor_takes_it_as_a_setting(random_folder: Path) -> None:
    editor = Editor.load(random_folder, device="cpu")
    results = {
        wanted: editor.edit(
            picture((90, 61)), "make it night", seed=1, steps=2,
            generation=GenerationConfig(max_new_tokens=4), detail_transfer=wanted,
        )
        for wanted in (True, False, None)
    }  # fmt: skip
    assert results[True].settings.detail_transfer
    assert results[True].image.size == (90, 61)
    assert results[True].image.tobytes() != results[False].image.tobytes()
    assert results[None].image.tobytes() == results[False].image.tobytes()
