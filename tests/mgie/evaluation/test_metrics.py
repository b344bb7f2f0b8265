import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mgie.evaluation.metrics import METRICS
from mgie.evaluation.perceptual import ClipFeatures, DinoFeatures, Lpips, Networks
from mgie.evaluation.scorer import MAX_PSNR_DB, Comparison, Scorer, direction, l1, l2, masked_mean, psnr, ssim
from mgie.images.geometry import resize
from tests.mgie.networks import write_clip, write_dino, write_lpips

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Networks:
    folder = tmp_path_factory.mktemp("networks")
    return Networks(
        clip=ClipFeatures(write_clip(folder / "clip"), CPU),
        clip_direction=ClipFeatures(write_clip(folder / "clip_direction", seed=5), CPU),
        dino=DinoFeatures(write_dino(folder / "dino"), CPU),
        lpips=Lpips(write_lpips(folder / "lpips"), CPU),
    )


def _noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def _picture(seed: int, wh: tuple[int, int] = (80, 64)) -> Image.Image:
    rng = np.random.default_rng(seed)
    return resize(Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)), wh)


def _pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(np.float64) / 255


def test_a_constant_difference_has_known_distances() -> None:
    one = torch.full((2, 3, 16, 16), 0.5)
    other = one + torch.tensor([0.1, -0.2])[:, None, None, None]
    torch.testing.assert_close(l1(one, other), torch.tensor([0.1, 0.2]))
    torch.testing.assert_close(l2(one, other), torch.tensor([0.01, 0.04]))
    torch.testing.assert_close(psnr(l2(one, other)), torch.tensor([20.0, -10 * math.log10(0.04)]))
    assert psnr(l2(one, one)).tolist() == [MAX_PSNR_DB] * 2


def test_ssim_is_its_formula() -> None:
    one, other = _noise(1, 3, 15, 18), _noise(1, 3, 15, 18, seed=1)
    axis = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window = np.outer(axis, axis) / np.outer(axis, axis).sum()
    values = []
    for channel in range(3):
        x, y = (np.pad(image[0, channel].double().numpy(), 5, mode="reflect") for image in (one, other))
        for top in range(15):
            for left in range(18):
                a, b = (s[top : top + 11, left : left + 11] for s in (x, y))
                mean_a, mean_b = (window * a).sum(), (window * b).sum()
                var_a, var_b = (window * a * a).sum() - mean_a**2, (window * b * b).sum() - mean_b**2
                both = (window * a * b).sum() - mean_a * mean_b
                c1, c2 = 0.01**2, 0.03**2
                top_, bottom = (2 * mean_a * mean_b + c1) * (2 * both + c2), (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)  # fmt: skip
                values.append(top_ / bottom)
    assert ssim(one, other).tolist() == pytest.approx([np.mean(values)], abs=1e-4)
    assert ssim(one, one).tolist() == pytest.approx([1.0])


def test_the_mean_of_a_mask_is_over_its_pixels_alone() -> None:
    errors = torch.zeros(2, 3, 4, 4)
    errors[0, :, 1, 2], errors[0, 1, 3, 3] = 0.6, 0.9
    where = torch.zeros(2, 4, 4, dtype=torch.bool)
    where[0, 1, 1:3] = True
    found = masked_mean(errors, where)
    assert found[0].item() == pytest.approx(0.3)
    assert math.isnan(found[1].item())
    assert masked_mean(errors, ~where)[0].item() == pytest.approx(0.9 / (3 * 14))


def test_direction_is_the_cosine_of_the_changes() -> None:
    x, y = torch.eye(2)
    for edited, expected in ((y, 1.0), (x, 0.0), (-y, 0.0), (-x, 1 / math.sqrt(2))):
        found = direction(x[None], edited[None], x[None], y[None])
        assert found.item() == pytest.approx(expected, abs=1e-6)


def test_every_metric_is_measured_as_defined(networks: Networks) -> None:
    source, goal, edited = (_picture(seed) for seed in range(3))
    before, after = "a house by day", "a house at night"
    mask = Image.fromarray(np.pad(np.full((20, 30), 255, np.uint8), ((0, 44), (50, 0)))).convert("RGB")
    [found] = Scorer(networks)(
        [Comparison(source=source, goal=goal, edited=edited, mask=mask, source_caption=before, goal_caption=after)]
    )
    assert set(found) == set(METRICS)
    s, g, e = _pixels(source), _pixels(goal), _pixels(edited)
    outside = np.ones((64, 80), dtype=bool)
    outside[:20, 50:] = False
    assert found["l1"] == pytest.approx(np.abs(e - g).mean(), rel=1e-5)
    assert found["l2"] == pytest.approx(((e - g) ** 2).mean(), rel=1e-5)
    assert found["psnr"] == pytest.approx(-10 * math.log10(((e - g) ** 2).mean()), rel=1e-5)
    assert found["inside_l1"] == pytest.approx(np.abs(e - g)[~outside].mean(), rel=1e-5)
    assert found["background_l1"] == pytest.approx(np.abs(e - s)[outside].mean(), rel=1e-5)
    assert found["background_l2"] == pytest.approx(((e - s)[outside] ** 2).mean(), rel=1e-5)
    assert found["background_psnr"] == pytest.approx(-10 * math.log10(((e - s)[outside] ** 2).mean()), rel=1e-5)
    assert networks.clip is not None
    assert networks.clip_direction is not None
    assert networks.dino is not None
    i = networks.clip.images([goal, edited])
    assert found["clip_i"] == pytest.approx(float(i[0] @ i[1]), abs=1e-5)
    assert found["clip_t"] == pytest.approx(float(i[1] @ networks.clip.texts([after])[0]), abs=1e-5)
    i0, i1 = networks.clip_direction.images([source, edited])
    t0, t1 = networks.clip_direction.texts([before, after])
    expected = (i1 - i0) @ (t1 - t0) / ((i1 - i0).norm() * (t1 - t0).norm())
    assert found["direction"] == pytest.approx(float(expected), abs=1e-4)
    assert found["similarity"] == pytest.approx(float(i0 @ i1), abs=1e-5)
    d = networks.dino.images([goal, edited])
    assert found["dino"] == pytest.approx(float(d[0] @ d[1]), abs=1e-5)


def test_the_goal_itself_has_the_best_scores(networks: Networks) -> None:
    source, goal = _picture(0), _picture(1)
    [found] = Scorer(networks)([Comparison(source=source, goal=goal, edited=goal)])
    best = {"l1": 0, "l2": 0, "psnr": MAX_PSNR_DB, "ssim": 1, "lpips": 0, "clip_i": 1, "dino": 1}
    assert {name: found[name] for name in best} == pytest.approx(best, abs=1e-5)


def test_the_input_itself_changes_nothing_outside_the_mask_and_has_no_direction(networks: Networks) -> None:
    source, goal = _picture(0), _picture(1)
    mask = Image.new("L", (40, 32), 0)  # of another size: it is brought to the goal's
    mask.paste(255, (0, 0, 20, 32))
    [found] = Scorer(networks)(
        [Comparison(source=source, goal=goal, edited=source, mask=mask, source_caption="a", goal_caption="b")]
    )
    left = np.abs(_pixels(source) - _pixels(goal))[:, :40]
    assert found["inside_l1"] == pytest.approx(left.mean(), rel=1e-5)
    assert (found["background_l1"], found["background_psnr"], found["direction"]) == (0, MAX_PSNR_DB, 0)
    assert found["similarity"] == pytest.approx(1, abs=1e-5)


def test_what_cannot_be_measured_is_not_there(networks: Networks) -> None:
    source, goal = _picture(0), _picture(1)
    pixels = {"l1", "l2", "psnr", "ssim"}
    everywhere = Image.new("RGB", goal.size, "white")
    bare, all_inside, told = (
        Comparison(source=source, goal=goal, edited=source),
        Comparison(source=source, goal=goal, edited=source, mask=everywhere),
        Comparison(source=source, goal=goal, edited=source, goal_caption="a house"),
    )
    assert [set(found) for found in Scorer(Networks())([bare, all_inside, told])] == [pixels, pixels | {"inside_l1"}, pixels]  # fmt: skip
    found, _, with_caption = Scorer(networks)([bare, all_inside, told])
    assert set(found) == pixels | {"lpips", "clip_i", "dino", "similarity"}
    assert set(with_caption) - set(found) == {"clip_t"}
    assert Scorer(networks)([]) == []


def test_a_result_of_another_size_is_brought_to_that_of_the_goal(networks: Networks) -> None:
    source, goal, large = _picture(0), _picture(1), _picture(2, (160, 128))
    found = Scorer(networks)([Comparison(source=source, goal=goal, edited=large)])
    assert found == Scorer(networks)([Comparison(source=source, goal=goal, edited=resize(large, goal.size))])


def test_scores_do_not_depend_on_the_batch(networks: Networks) -> None:
    edits = []
    for seed in range(7):
        wh = ((80, 64), (64, 80))[seed % 2]
        images = [_picture(10 * seed + k, wh) for k in range(3)]
        mask = resize(_picture(99, (8, 8)), wh) if seed % 3 else None
        caption = f"number {seed}" if seed != 4 else None
        edits.append(
            Comparison(source=images[0], goal=images[1], edited=images[2], mask=mask, source_caption="x", goal_caption=caption)
        )  # fmt: skip
    together = Scorer(networks, batch_size=4)(edits)
    for edit, found in zip(edits, together, strict=True):
        [alone] = Scorer(networks)([edit])
        assert alone == pytest.approx(found, abs=2e-5)


def test_a_picture_of_several_edits_is_encoded_once(networks: Networks, monkeypatch: pytest.MonkeyPatch) -> None:
    assert networks.clip is not None
    encode, sizes = networks.clip.images, []

    def count(images: list[Image.Image]) -> Tensor:
        sizes.append(len(images))
        return encode(images)

    monkeypatch.setattr(networks.clip, "images", count)
    source, goal = _picture(0), _picture(1)
    edits = [Comparison(source=source, goal=goal, edited=edited) for edited in (source, goal, _picture(2))]
    Scorer(networks)(edits)
    assert sizes == [3]
