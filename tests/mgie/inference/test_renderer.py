"""Guidance and image -> edited image: framing, batches, order, refusals."""

import numpy as np
import pytest
import torch
from PIL import Image

from mgie.bundle.bundle import Bundle
from mgie.config import EditSettings
from mgie.errors import ConfigError, EditStoppedError
from mgie.inference.conditioner import EditCondition
from mgie.inference.renderer import Renderer, RenderRequest, RenderStep


@pytest.fixture(scope="module")
def renderer(random_bundle: Bundle) -> Renderer:
    return random_bundle.load_renderer(device="cpu")


def _request(seed: int, wh: tuple[int, int] = (96, 96), **settings: object) -> RenderRequest:
    generator = torch.Generator().manual_seed(100 + seed)
    pixels = torch.randint(0, 256, (wh[1], wh[0], 3), generator=generator, dtype=torch.uint8)
    edit_condition = EditCondition(
        expressive="",
        condition=torch.randn(32, 64, generator=generator),
        null_condition=torch.randn(32, 64, generator=generator),
        used_fallback=False,
        prompt_tokens=1,
        image_tokens=1,
        output_tokens=1,
        bundle="b",
    )
    used = EditSettings(steps=4).override(**settings)
    return RenderRequest(image=Image.fromarray(pixels.numpy()), edit_condition=edit_condition, settings=used, seed=seed)


def _alone(renderer: Renderer, request: RenderRequest) -> np.ndarray:  # type: ignore[type-arg]
    [(index, image)] = renderer.render([request])
    assert index == 0
    return np.asarray(image).astype(int)


def test_a_mixed_batch_gives_each_request_what_it_gets_alone(renderer: Renderer) -> None:
    requests = [
        _request(0),
        _request(1, steps=7, sampler="ddim"),
        _request(2, (192, 192), steps=2, sampler="dpmpp_2m", guidance_scale=3.0),
        _request(3, steps=4, guidance_scale=1.0, image_guidance_scale=1.0),
    ]
    results = dict(renderer.render(requests))
    for i, request in enumerate(requests):
        together = np.asarray(results[i]).astype(int)
        assert np.abs(together - _alone(renderer, request)).max() <= 1
        assert together.shape[:2] == request.image.size[::-1]


def test_requests_with_fewer_steps_finish_first(renderer: Renderer) -> None:
    requests = [_request(0, steps=6), _request(1, steps=1), _request(2, steps=3)]
    assert [index for index, _ in renderer.render(requests)] == [1, 2, 0]


def test_on_step_tells_of_each_image_and_stops_them_all(renderer: Renderer) -> None:
    seen: list[tuple[int, int, int]] = []

    def watch(step: RenderStep) -> bool:
        seen.append((step.index, step.done, step.total))
        assert step.preview(is_cheap=step.done == 1).size == (96, 96)
        return step.done < 3

    requests = [_request(0, steps=2), _request(1, steps=4)]
    with pytest.raises(EditStoppedError, match="after step 3 of 4"):
        list(renderer.render(requests, on_step=watch))
    assert seen == [(0, 1, 2), (1, 1, 4), (0, 2, 2), (1, 2, 4), (1, 3, 4)]


@pytest.mark.parametrize("wh", [(97, 61), (40, 200), (17, 16), (300, 80)])
def test_the_result_has_the_sources_size(renderer: Renderer, wh: tuple[int, int]) -> None:
    [(_, image)] = renderer.render([_request(0, wh, steps=1)])
    assert image.size == wh
    [(_, square)] = renderer.render([_request(0, wh, steps=1, square_crop=True)])
    assert square.size == (min(wh), min(wh))


def test_seed_words_and_image_each_change_the_result(renderer: Renderer) -> None:
    base = _request(0)
    first = _alone(renderer, base)
    assert (first == _alone(renderer, base)).all()
    for other in (
        RenderRequest(image=base.image, edit_condition=base.edit_condition, settings=base.settings, seed=9),
        RenderRequest(image=base.image, edit_condition=_request(5).edit_condition, settings=base.settings, seed=0),
        RenderRequest(image=_request(5).image, edit_condition=base.edit_condition, settings=base.settings, seed=0),
    ):
        assert (first != _alone(renderer, other)).mean() > 0.2


def test_work_sizes_must_agree_within_a_batch(renderer: Renderer) -> None:
    requests = [_request(0), _request(1, (200, 40))]
    assert renderer.work_size((96, 96), EditSettings()) == (128, 128)
    with pytest.raises(ConfigError, match="a batch holds work sizes"):
        list(renderer.render(requests))


def test_a_bad_seed_is_named(renderer: Renderer) -> None:
    with pytest.raises(ConfigError, match="seed is -1") as caught:
        list(renderer.render([_request(-1)]))
    assert caught.value.param == "seed"


def test_no_requests_give_nothing(renderer: Renderer) -> None:
    assert list(renderer.render([])) == []


def test_a_model_that_makes_changes_and_makes_none_gives_the_source_back(random_bundle: Bundle) -> None:
    unet = random_bundle.load_unet()
    unet.conv_out.weight.data.zero_()
    unet.conv_out.bias.data.zero_()
    latent_vae = random_bundle.load_vae()
    latent_vae.predicts_residual = True
    scheduler = random_bundle.scheduler_config() | {"prediction_type": "sample", "rescale_betas_zero_snr": True}
    renderer = Renderer(
        unet=unet, vae=latent_vae, scheduler_config=scheduler | {"timestep_spacing": "trailing"},
        work_area_px=128 * 128, multiple_px=16,
    )  # fmt: skip
    request = _request(0, (128, 128), sampler="ddim", guidance_scale=1.5, image_guidance_scale=1.0)
    framing = renderer.framing(request.image.size, request.settings)
    expected = renderer.decode(renderer.encode(request.image, framing) * latent_vae.scaling_factor)
    pixels = torch.from_numpy(_alone(renderer, request)).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(pixels.float(), expected.clamp(-1, 1).float(), atol=0.005, rtol=0)
