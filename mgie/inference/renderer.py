"""Condition and image -> edited image: the second half of an edit.

Knows nothing of words or of the MLLM, and nothing of files.

Axes: B batch, H W work size, c latent channels, h w latent sides.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from mgie.config import EditSettings
from mgie.errors import ConfigError, EditStoppedError, RenderError
from mgie.images.detail_transfer import transfer_detail
from mgie.images.geometry import Framing, framed, plan_framing, resize
from mgie.images.masks import check_mask, lay_over
from mgie.images.pixels import from_signed, from_work, kept_latents, to_work
from mgie.inference.conditioner import EditCondition
from mgie.inference.preview import fit_colors, show_latents
from mgie.model.diffusion import LatentVAE, UNetDenoiser
from mgie.model.guidance import Denoiser
from mgie.model.sampler import FrozenRegion, SampleState, Schedule, denoise_step, make_schedule, start


@dataclass(frozen=True, kw_only=True)
class RenderRequest:
    """What the diffusion stage needs of one edit."""

    image: Image.Image
    "source, RGB, any size"
    edit_condition: EditCondition
    "what the words mean"
    settings: EditSettings
    "sampler, steps, scales, framing"
    seed: int
    "seed of the noise, 0 to 2**63 - 1"
    mask: Image.Image | None = None
    "where the picture may change: greyscale of the source's size, white = edit; None = everywhere"


@dataclass(kw_only=True, eq=False)
class PreparedEdit:
    """An edit whose source has passed the VAE: all that its images, one per seed, have in common."""

    request: RenderRequest
    framing: Framing
    image_latents: Float[Tensor, "c h w"]
    "condition latents of the source"
    condition: Float[Tensor, "Q C"]
    "on the model's device"
    null_condition: Float[Tensor, "Q C"]
    "on the model's device"
    guide: Float[Tensor, "3 H W"] | None = None
    "what the VAE makes of the source, once it was needed"


@dataclass(frozen=True, kw_only=True, eq=False)
class RenderStep:
    """One image of a batch after one of its steps."""

    index: Any
    "which of the images"
    done: int
    "steps taken"
    total: int
    "steps to take"
    preview: Callable[..., Image.Image]
    "gives the picture as it stands, by the VAE or, with `is_cheap=True`, without; see `Renderer.preview`"


class Renderer:
    """The diffusion stage: VAE and UNet.

    Args:
        scheduler_config: diffusers' scheduler configuration of the bundle.
        work_area_px, multiple_px: At which sizes the model works, see `BundleConfig`.
    """

    def __init__(
        self,
        *,
        unet: UNet2DConditionModel,
        vae: LatentVAE,
        scheduler_config: Mapping[str, Any],
        work_area_px: int,
        multiple_px: int,
    ) -> None:
        self.denoiser: Denoiser = UNetDenoiser(unet)
        self.condition_dim: int = unet.config.cross_attention_dim
        self.vae, self._scheduler_config = vae, dict(scheduler_config)
        self.device: torch.device = unet.device
        self.work_area_px, self._multiple_px = work_area_px, multiple_px
        self._colors: Tensor | None = None  # of cheap previews, fitted at the first

    def framing(self, wh: tuple[int, int], settings: EditSettings) -> Framing:
        """How a source of size `wh` is brought to the model's working size and back."""
        return plan_framing(
            wh, work_area_px=self.work_area_px, multiple_px=self._multiple_px, square_crop=settings.square_crop
        )

    def work_size(self, wh: tuple[int, int], settings: EditSettings) -> tuple[int, int]:
        """Width and height at which the model works on it; only equal ones can share a batch."""
        return self.framing(wh, settings).work_wh

    def schedule(self, settings: EditSettings) -> Schedule:
        """The noise levels of an edit. Raises ConfigError: the settings do not fit the bundle."""
        return make_schedule(self._scheduler_config, settings.sampler, settings.steps)

    def encode(self, image: Image.Image, framing: Framing) -> Float[Tensor, "c h w"]:
        """Condition latents of a source image."""
        return self.vae.condition_latents(to_work(image, framing)[None])[0]

    def decode(self, latents: Float[Tensor, "c h w"]) -> Float[Tensor, "3 H W"]:
        """Pixels of scaled latents at work size, on the CPU."""
        return self.vae.decode(latents[None])[0].float().cpu()

    def prepare(self, request: RenderRequest, framing: Framing) -> PreparedEdit:
        """What comes before the first step.

        Raises:
            ImageError: The mask does not fit the image.
        """
        if request.mask is not None:
            check_mask(request.mask, framing)
        return PreparedEdit(
            request=request,
            framing=framing,
            image_latents=self.encode(request.image, framing),
            condition=request.edit_condition.condition.to(self.device),
            null_condition=request.edit_condition.null_condition.to(self.device),
        )

    def start(self, edit: PreparedEdit, seed: int) -> SampleState:
        """The state of one image of an edit before its first step.

        Raises:
            ConfigError: The seed or a setting is out of range.
        """
        settings, schedule = edit.request.settings, self.schedule(edit.request.settings)
        state = start(
            image_latents=edit.image_latents,
            condition=edit.condition,
            null_condition=edit.null_condition,
            schedule=schedule,
            text_scale=settings.guidance_scale,
            image_scale=settings.image_guidance_scale,
            seed=seed,
        )
        # Shown that nothing changes outside, a model that makes the change would make none inside either.
        if edit.request.mask is not None and not self.vae.predicts_residual:
            height, width = state.latents.shape[1:]
            state.frozen = FrozenRegion(
                where=kept_latents(edit.request.mask, edit.framing, (height, width)).to(self.device),
                clean=state.image_latents * self.vae.scaling_factor,
                noise=state.latents / schedule.init_noise_sigma,
            )
        return state

    def finish(self, edit: PreparedEdit, latents: Float[Tensor, "c h w"]) -> Image.Image:
        """The edited image of the latents after the last step, at the source's size.

        Raises:
            RenderError: The latents are not finite.
        """
        if not latents.isfinite().all():
            raise RenderError("the latents are not finite after the last step; they must be")
        edited = self.decode(self.vae.from_target(latents, edit.image_latents))
        source = framed(edit.request.image, edit.framing)
        if edit.request.settings.detail_transfer:
            if edit.guide is None:
                edit.guide = self.decode(edit.image_latents * self.vae.scaling_factor)
            image = transfer_detail(source, guide=edit.guide, edited=edited)
        else:
            image = from_work(edited, edit.framing)
        if edit.request.mask is None:
            return image
        return lay_over(image, source, framed(edit.request.mask, edit.framing))

    @torch.inference_mode()
    def preview(self, edit: PreparedEdit, latents: Float[Tensor, "c h w"], *, is_cheap: bool = False) -> Image.Image:
        """A picture of latents on their way: of the source's shape, but no larger than the model works at.

        Args:
            latents: Scaled and clean, as predicted by a step.
            is_cheap: Colours straight from the latents, an eighth as sharp, without the VAE.
        """
        latents = self.vae.from_target(latents, edit.image_latents)
        if is_cheap:
            if self._colors is None:
                self._colors = fit_colors(self.vae)
            pixels = show_latents(latents, self._colors)
        else:
            pixels = self.vae.decode(latents[None])[0]
        width, height = edit.framing.output_wh
        shrink = min(1.0, math.sqrt(self.work_area_px / (width * height)))
        wh = (max(1, round(width * shrink)), max(1, round(height * shrink)))
        image = resize(from_signed(pixels.float()), wh)
        if edit.request.mask is None:
            return image
        source, mask = framed(edit.request.image, edit.framing), framed(edit.request.mask, edit.framing)
        return lay_over(image, resize(source, wh), resize(mask, wh))

    @torch.inference_mode()
    def render(
        self, requests: Sequence[RenderRequest], *, on_step: Callable[[RenderStep], object] | None = None
    ) -> Iterator[tuple[int, Image.Image]]:
        """Edits a batch; yields (index, edited image) as each is finished, those with few steps first.

        Args:
            on_step: Called after each step of each image; False, as its result, stops them all.

        Raises:
            ConfigError: The requests do not have the same work size, or a setting does not fit the bundle.
            ImageError: A mask does not fit its image.
            RenderError: The latents are not finite after the last step.
            EditStoppedError: `on_step` returned False.
        """
        framings = [self.framing(request.image.size, request.settings) for request in requests]
        sizes = sorted({framing.work_wh for framing in framings})
        if len(sizes) > 1:
            raise ConfigError(f"a batch holds work sizes {sizes}; they must be equal")
        edits = [self.prepare(request, framing) for request, framing in zip(requests, framings, strict=True)]
        states = {i: self.start(edit, edit.request.seed) for i, edit in enumerate(edits)}
        while states:
            denoise_step(self.denoiser, list(states.values()))
            if on_step is not None:
                for i, state in states.items():
                    assert state.predicted_x0 is not None
                    preview = partial(self.preview, edits[i], state.predicted_x0)
                    step = RenderStep(index=i, done=state.step, total=state.schedule.num_steps, preview=preview)
                    if on_step(step) is False:
                        raise EditStoppedError(f"stopped by on_step after step {step.done} of {step.total}")
            for i in [i for i, state in states.items() if state.is_done]:
                yield i, self.finish(edits[i], states.pop(i).latents)
