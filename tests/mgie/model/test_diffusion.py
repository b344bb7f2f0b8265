"""Latents, noise schedule and the widened UNet against diffusers, closed forms and the recorded vectors."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor

from mgie.errors import BundleError
from mgie.model.diffusion import LatentVAE, NoiseSchedule, UNetDenoiser, widen_input

SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
TIMESTEPS = torch.tensor([0, 1, 500, 999])


@pytest.fixture(scope="session")
def vectors(reference_dir: Path) -> dict[str, Tensor]:
    return load_file(reference_dir / "vectors.safetensors")


@pytest.fixture(scope="session")
def recorded_vae(reference_dir: Path) -> LatentVAE:
    vae = AutoencoderKL.from_pretrained(reference_dir / "stable-diffusion" / "vae", local_files_only=True)
    return LatentVAE(vae.eval())


@pytest.fixture(scope="session")
def recorded_unet(reference_dir: Path) -> UNet2DConditionModel:
    folder = reference_dir / "stable-diffusion" / "unet"
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder))
    unet.load_state_dict(torch.load(reference_dir / "mgie" / "unet.pt", weights_only=True))
    return unet.eval()


def make_unet(channels: int, dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=channels,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=6,
        attention_head_dim=2,
    )
    return unet.to(dtype).eval()


def random_latents(seed: int, batch: int = len(TIMESTEPS)) -> Tensor:
    return torch.randn((batch, 4, 8, 8), generator=torch.Generator().manual_seed(seed))


def relative_difference(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


# --- widening -------------------------------------------------------------------------------------------------


def test_widened_weight_equals_the_recorded_one_and_the_bias_is_copied(vectors: dict[str, Tensor]) -> None:
    unet = UNet2DConditionModel(
        in_channels=4,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        norm_num_groups=8,
        layers_per_block=1,
        mid_block_type=None,
    )
    unet.conv_in.weight.data = vectors["init.conv_in_4ch.weight"]
    unet.conv_in.bias.data = vectors["init.conv_in_4ch.bias"]
    widened = widen_input(unet)
    assert torch.equal(widened.conv_in.weight, vectors["init.conv_in_8ch.weight"])
    assert torch.equal(widened.conv_in.bias, vectors["init.conv_in_4ch.bias"])  # the original leaves it random


@torch.inference_mode()
def test_a_widened_unet_predicts_as_before_whatever_the_image_latents() -> None:
    unet = make_unet(4)
    latents, image_latents, condition = random_latents(1), random_latents(2), torch.randn(4, 3, 6)
    before = unet(latents, TIMESTEPS, condition).sample
    widen_input(unet)
    after = unet(torch.cat([latents, 100 * image_latents], 1), TIMESTEPS, condition).sample
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)


def test_widening_keeps_dtype_and_geometry_and_tells_the_configuration(tmp_path: Path) -> None:
    unet = make_unet(4, torch.bfloat16)
    old = unet.conv_in
    widened = widen_input(unet)
    assert widened is unet
    assert unet.config.in_channels == unet.conv_in.in_channels == 8
    assert unet.conv_in.weight.dtype == unet.conv_in.bias.dtype == torch.bfloat16
    assert (unet.conv_in.kernel_size, unet.conv_in.padding, unet.conv_in.stride) == (
        old.kernel_size,
        old.padding,
        old.stride,
    )
    unet.save_pretrained(tmp_path)
    assert UNet2DConditionModel.from_pretrained(tmp_path).conv_in.in_channels == 8


def test_a_wide_enough_unet_is_left_alone_and_a_wider_one_refused() -> None:
    unet = make_unet(8)
    conv_in = unet.conv_in
    assert widen_input(unet).conv_in is conv_in
    with pytest.raises(BundleError, match=r"takes 8 input channels; it cannot be widened to 6"):
        widen_input(unet, 6)


# --- noise schedule -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["scaled_linear", "linear"])
def test_add_noise_equals_diffusers(schedule: str) -> None:
    config = SCHEDULER | {"beta_schedule": schedule}
    latents, noise = random_latents(1), random_latents(2)
    expected = DDPMScheduler.from_config(config).add_noise(latents, noise, TIMESTEPS)
    assert torch.equal(NoiseSchedule(config).add_noise(latents, noise, TIMESTEPS), expected)


def test_abar_is_the_product_of_one_minus_beta() -> None:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    schedule = NoiseSchedule(SCHEDULER)
    assert schedule.num_timesteps == 1000
    torch.testing.assert_close(schedule.abar.double(), (1 - betas).cumprod(0), rtol=1e-5, atol=0)
    assert not schedule.state_dict()  # it follows from the configuration and belongs in no checkpoint


def test_targets_are_noise_latents_or_velocity() -> None:
    latents, noise = random_latents(1), random_latents(2)
    targets = {
        kind: NoiseSchedule(SCHEDULER | {"prediction_type": kind}).target(latents, noise, TIMESTEPS)
        for kind in ("epsilon", "sample", "v_prediction")
    }
    assert torch.equal(targets["epsilon"], noise)
    assert torch.equal(targets["sample"], latents)
    scheduler = DDPMScheduler.from_config(SCHEDULER)
    assert torch.equal(targets["v_prediction"], scheduler.get_velocity(latents, noise, TIMESTEPS))


def test_velocity_and_noisy_latents_give_the_latents_back() -> None:
    schedule = NoiseSchedule(SCHEDULER | {"prediction_type": "v_prediction"})
    latents, noise = random_latents(1), random_latents(2)
    noisy, velocity = schedule.add_noise(latents, noise, TIMESTEPS), schedule.target(latents, noise, TIMESTEPS)
    abar = schedule.abar[TIMESTEPS][:, None, None, None]
    torch.testing.assert_close(abar.sqrt() * noisy - (1 - abar).sqrt() * velocity, latents, rtol=0, atol=1e-5)


def test_unknown_prediction_type_is_refused() -> None:
    with pytest.raises(BundleError, match=r"prediction type is 'flow'; known: epsilon, v_prediction, sample"):
        NoiseSchedule(SCHEDULER | {"prediction_type": "flow"})


def test_noisy_latents_equal_the_recorded_ones(vectors: dict[str, Tensor]) -> None:
    noisy = NoiseSchedule(SCHEDULER).add_noise(
        vectors["train.lat_ans"], vectors["train.noise"], vectors["train.timesteps"]
    )
    assert relative_difference(noisy, vectors["train.lat_noise"]) < 1e-6


# --- latents --------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_latents_equal_the_recorded_ones(recorded_vae: LatentVAE, vectors: dict[str, Tensor]) -> None:
    mean, logvar = recorded_vae.moments(vectors["train.p2p_ans"])
    assert relative_difference(mean, vectors["train.vae_ans_mean"]) < 5e-5
    assert relative_difference(logvar, vectors["train.vae_ans_logvar"]) < 5e-5
    goal = recorded_vae.goal_latents(mean, logvar, vectors["train.posterior_noise"])
    assert relative_difference(goal, vectors["train.lat_ans"]) < 5e-5
    condition = recorded_vae.condition_latents(vectors["train.p2p_inp"])
    assert relative_difference(condition, vectors["train.lat_inp"]) < 5e-5  # the mode, not scaled


def test_scaling_and_size_are_those_of_stable_diffusion(recorded_vae: LatentVAE) -> None:
    assert recorded_vae.scaling_factor == 0.18215
    assert recorded_vae.downsampling == 8


@torch.inference_mode()
def test_decode_undoes_the_scaling_of_goal_latents(recorded_vae: LatentVAE) -> None:
    mean = random_latents(3, batch=2)
    goal = recorded_vae.goal_latents(mean, torch.zeros_like(mean), torch.zeros_like(mean))
    torch.testing.assert_close(goal, 0.18215 * mean)
    expected = recorded_vae.autoencoder.decode(mean).sample
    torch.testing.assert_close(recorded_vae.decode(goal), expected, rtol=1e-5, atol=1e-5)


# --- the UNet as a denoiser -----------------------------------------------------------------------------------


@torch.inference_mode()
def test_unet_output_equals_the_recorded_one(recorded_unet: UNet2DConditionModel, vectors: dict[str, Tensor]) -> None:
    latents = torch.cat([vectors["train.lat_noise"], vectors["train.lat_inp"]], 1)
    got = UNetDenoiser(recorded_unet)(latents, vectors["train.timesteps"].float(), vectors["train.edit_features"])
    assert relative_difference(got, vectors["train.unet_out"]) < 5e-5


@torch.inference_mode()
def test_denoiser_works_in_the_unet_s_own_dtype() -> None:
    unet = make_unet(8, torch.bfloat16)
    got = UNetDenoiser(unet)(random_latents(1).repeat(1, 2, 1, 1), TIMESTEPS.float(), torch.randn(4, 3, 6))
    assert got.dtype == torch.bfloat16
    assert got.shape == (4, 4, 8, 8)


def test_shifted_timesteps_follow_the_formula_and_a_factor_of_one_changes_nothing() -> None:
    schedule = NoiseSchedule(SCHEDULER)
    timesteps = torch.arange(1000)
    assert torch.equal(schedule.shift(timesteps, 1.0), timesteps)
    t = (timesteps.double() + 0.5) / 1000
    shifted = schedule.shift(timesteps, 3.0)
    assert torch.equal(shifted, (1000 * 3 * t / (1 + 2 * t)).floor().long())
    assert int(shifted.min()) >= 0
    assert int(shifted.max()) == 999
    assert float(shifted.double().median()) == pytest.approx(750, abs=1)  # s / (s + 1) of the way


def test_a_vae_of_blocks_sees_each_block_as_one_position() -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        in_channels=12, out_channels=12, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=5,
    ).eval()  # fmt: skip
    latent_vae, pixels = LatentVAE(vae), torch.rand(2, 3, 16, 24) * 2 - 1
    assert latent_vae.downsampling == 4
    blocks = pixels.view(2, 3, 8, 2, 12, 2).permute(0, 1, 3, 5, 2, 4).reshape(2, 12, 8, 12)
    with torch.no_grad():
        mean, _ = latent_vae.moments(pixels)
        torch.testing.assert_close(mean, vae.encode(blocks).latent_dist.mean)
        decoded = vae.decode(mean).sample.view(2, 3, 2, 2, 8, 12).permute(0, 1, 4, 2, 5, 3).reshape(2, 3, 16, 24)
        torch.testing.assert_close(latent_vae.decode(mean * latent_vae.scaling_factor), decoded)


def test_a_change_is_the_difference_of_latents_and_is_added_again() -> None:
    vae = AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4, scaling_factor=0.25)
    goal, source = random_latents(1), random_latents(2)
    plain, change = LatentVAE(vae), LatentVAE(vae, predicts_residual=True)
    assert torch.equal(plain.to_target(goal, source), goal)
    assert torch.equal(plain.from_target(goal, source), goal)
    torch.testing.assert_close(change.to_target(goal, source), goal - 0.25 * source)
    assert not change.to_target(0.25 * source, source).any()
    torch.testing.assert_close(change.from_target(change.to_target(goal, source), source), goal)
