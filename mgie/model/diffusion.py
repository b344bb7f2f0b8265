"""Latents and noise: VAE scaling, the training noise schedule, the UNet as a denoiser, its widening.

Knows nothing of guidance or samplers.

Axes: B batch, H W image sides, h w latent sides, c latent channels, Q queries, C condition width.
"""

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from jaxtyping import Float, Int
from torch import Tensor, nn

from mgie.config import vae_downsampling
from mgie.errors import BundleError


class LatentVAE(nn.Module):
    """The VAE, with the two scalings that InstructPix2Pix models rely on.

    Goal latents are posterior *samples times the scaling factor*; the condition latents of the source are
    the posterior *mode, not scaled*.

    A VAE that takes 3 p^2 channels sees each block of p x p pixels as one position: p = 1 for Stable Diffusion.

    Args:
        predicts_residual: The diffusion model makes the difference of goal and source latents, not the goal's: where
            nothing is to change, it makes 0. False as published.
    """

    def __init__(self, vae: AutoencoderKL, *, predicts_residual: bool = False) -> None:
        super().__init__()
        self.autoencoder, self.predicts_residual = vae, predicts_residual
        self._block_px = math.isqrt(int(vae.config.in_channels) // 3)

    @property
    def scaling_factor(self) -> float:
        """0.18215 for Stable Diffusion 1.x."""
        return float(self.autoencoder.config.scaling_factor)

    @property
    def downsampling(self) -> int:
        """Image pixels per latent side (8 for Stable Diffusion)."""
        return vae_downsampling(self.autoencoder.config)

    def moments(self, pixels: Float[Tensor, "B 3 H W"]) -> tuple[Float[Tensor, "B c h w"], Float[Tensor, "B c h w"]]:
        """Mean and log-variance of the posterior, unscaled; pixels in [-1, 1]."""
        blocks = nn.functional.pixel_unshuffle(
            pixels.to(self.autoencoder.device, self.autoencoder.dtype), self._block_px
        )
        posterior = self.autoencoder.encode(blocks).latent_dist
        return posterior.mean, posterior.logvar

    def condition_latents(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B c h w"]:
        """Posterior mode of the source image, unscaled."""
        return self.moments(pixels)[0]

    def goal_latents(
        self,
        mean: Float[Tensor, "B c h w"],
        logvar: Float[Tensor, "B c h w"],
        noise: Float[Tensor, "B c h w"],
    ) -> Float[Tensor, "B c h w"]:
        """Scaled posterior sample for given standard normal `noise`."""
        return (mean + torch.exp(0.5 * logvar) * noise) * self.scaling_factor

    def to_target(
        self, goal_latents: Float[Tensor, "*B c h w"], image_latents: Float[Tensor, "*B c h w"]
    ) -> Float[Tensor, "*B c h w"]:
        """What the diffusion model has to make, of scaled goal latents and condition latents."""
        return goal_latents - image_latents * self.scaling_factor if self.predicts_residual else goal_latents

    def from_target(
        self, made: Float[Tensor, "*B c h w"], image_latents: Float[Tensor, "*B c h w"]
    ) -> Float[Tensor, "*B c h w"]:
        """Scaled latents of the edited image, of what the diffusion model has made and condition latents."""
        return made + image_latents * self.scaling_factor if self.predicts_residual else made

    def decode(self, latents: Float[Tensor, "B c h w"]) -> Float[Tensor, "B 3 H W"]:
        """Pixels, about [-1, 1], of scaled latents."""
        blocks: Tensor = self.autoencoder.decode(latents.to(self.autoencoder.dtype) / self.scaling_factor).sample
        return nn.functional.pixel_shuffle(blocks, self._block_px)


class NoiseSchedule(nn.Module):
    """The forward process of training: `z_t = sqrt(abar_t) z + sqrt(1 - abar_t) noise`.

    Source: Ho et al. 2020, eq. 4; the betas are diffusers' `DDPMScheduler` for the bundle's configuration.
    """

    abar: Tensor

    def __init__(self, scheduler_config: Mapping[str, Any]) -> None:
        super().__init__()
        scheduler = DDPMScheduler.from_config(dict(scheduler_config))
        self.prediction_type: str = scheduler.config.prediction_type
        if self.prediction_type not in ("epsilon", "v_prediction", "sample"):
            raise BundleError(f"prediction type is {self.prediction_type!r}; known: epsilon, v_prediction, sample")
        # Not persistent: it follows from the configuration and belongs in no checkpoint.
        self.register_buffer("abar", scheduler.alphas_cumprod, persistent=False)

    @property
    def num_timesteps(self) -> int:
        """Training steps of the process (1000)."""
        return len(self.abar)

    def _factors(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        abar = self.abar[timesteps][:, None, None, None]
        return abar.sqrt(), (1 - abar).sqrt()

    def shift(self, timesteps: Int[Tensor, " B"], factor: float) -> Int[Tensor, " B"]:
        """Timesteps moved to higher noise: `t = s t / (1 + (s - 1) t)` of t in (0, 1); a factor of 1 changes nothing.

        Source: Esser et al., ICML 2024, eq. 23.
        """
        if factor == 1:
            return timesteps
        t = (timesteps.double() + 0.5) / self.num_timesteps
        return (factor * t / (1 + (factor - 1) * t) * self.num_timesteps).long()

    def snr(self, timesteps: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
        """Signal-to-noise ratio `abar / (1 - abar)`."""
        abar = self.abar[timesteps]
        return abar / (1 - abar)

    def add_noise(
        self, latents: Float[Tensor, "B c h w"], noise: Float[Tensor, "B c h w"], timesteps: Int[Tensor, " B"]
    ) -> Float[Tensor, "B c h w"]:
        """`latents` at the noise level of `timesteps`."""
        signal, sigma = self._factors(timesteps)
        return signal * latents + sigma * noise

    def target(
        self, latents: Float[Tensor, "B c h w"], noise: Float[Tensor, "B c h w"], timesteps: Int[Tensor, " B"]
    ) -> Float[Tensor, "B c h w"]:
        """What the UNet learns to predict (v: Salimans and Ho 2022, appendix D)."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return latents
        signal, sigma = self._factors(timesteps)
        return signal * noise - sigma * latents


class UNetDenoiser:
    """A diffusers UNet as `guidance.Denoiser`: latents and image latents joined on the channels, in its own dtype."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self._unet = unet

    def __call__(
        self,
        latents: Float[Tensor, "N c2 h w"],
        timesteps: Float[Tensor, " N"],
        condition: Float[Tensor, "N Q C"],
    ) -> Float[Tensor, "N c h w"]:
        """The UNet's prediction; `latents` hold noisy and image latents (2c channels)."""
        dtype = self._unet.dtype
        prediction: Tensor = self._unet(
            latents.to(dtype), timesteps, encoder_hidden_states=condition.to(dtype), return_dict=False
        )[0]
        return prediction


def widen_input(unet: UNet2DConditionModel, channels: int = 8) -> UNet2DConditionModel:
    """A Stable Diffusion UNet that also takes image latents: new input channels start at zero.

    The bias is copied (the published code leaves it random). The UNet is changed in place and returned.

    Raises:
        BundleError: It already has more input channels than asked for.
    """
    old = cast(nn.Conv2d, unet.conv_in)
    if old.in_channels > channels:
        raise BundleError(f"the UNet takes {old.in_channels} input channels; it cannot be widened to {channels}")
    if old.in_channels == channels:
        return unet
    new = nn.Conv2d(channels, old.out_channels, old.kernel_size, padding=old.padding)  # type: ignore[arg-type]
    new.to(old.weight.device, old.weight.dtype)
    with torch.no_grad():
        new.weight.zero_()
        new.weight[:, : old.in_channels] = old.weight
        if old.bias is not None and new.bias is not None:
            new.bias.copy_(old.bias)
    unet.conv_in = new
    unet.register_to_config(in_channels=channels)
    return unet
