"""Guidance and image -> edited image: the second half of an edit.

Knows nothing of words or of the MLLM, and nothing of files.

Axes: B batch, H W work size, c latent channels, h w latent sides.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from mgie.conditioner import Guidance
from mgie.config import EditSettings
from mgie.diffusion import LatentCodec, UNetDenoiser
from mgie.errors import ConfigError
from mgie.images import Framing, from_work, plan_framing, to_work
from mgie.sampler import SampleState, denoise_step, make_schedule, start


@dataclass(frozen=True, kw_only=True)
class RenderRequest:
    """What the diffusion stage needs of one edit."""

    image: Image.Image
    "source, RGB, any size"
    guidance: Guidance
    "what the words mean"
    settings: EditSettings
    "sampler, steps, scales, framing"
    seed: int
    "of the noise, 0 to 2**63 - 1"


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
        codec: LatentCodec,
        scheduler_config: Mapping[str, Any],
        work_area_px: int,
        multiple_px: int,
    ) -> None:
        self.denoiser, self.codec, self._scheduler_config = UNetDenoiser(unet), codec, dict(scheduler_config)
        self._device = unet.device
        self._work_area_px, self._multiple_px = work_area_px, multiple_px

    def framing(self, wh: tuple[int, int], settings: EditSettings) -> Framing:
        """How a source of size `wh` is brought to the model's working size and back."""
        return plan_framing(
            wh, work_area_px=self._work_area_px, multiple_px=self._multiple_px, square_crop=settings.square_crop
        )

    def work_size(self, wh: tuple[int, int], settings: EditSettings) -> tuple[int, int]:
        """Width and height at which the model works on it; only equal ones can share a batch."""
        return self.framing(wh, settings).work_wh

    def encode(self, image: Image.Image, framing: Framing) -> Float[Tensor, "c h w"]:
        """Condition latents of a source image."""
        return self.codec.condition_latents(to_work(image, framing)[None])[0]

    def decode(self, latents: Float[Tensor, "c h w"], framing: Framing) -> Image.Image:
        """The image of scaled latents, at the source's size."""
        return from_work(self.codec.decode(latents[None])[0].float().cpu(), framing)

    def start(self, request: RenderRequest, framing: Framing) -> SampleState:
        """The state of a new edit before its first step."""
        settings = request.settings
        return start(
            image_latents=self.encode(request.image, framing),
            condition=request.guidance.condition.to(self._device),
            null_condition=request.guidance.null_condition.to(self._device),
            schedule=make_schedule(self._scheduler_config, settings.sampler, settings.steps),
            text_scale=settings.guidance_scale,
            image_scale=settings.image_guidance_scale,
            seed=request.seed,
        )

    @torch.inference_mode()
    def render(
        self, requests: Sequence[RenderRequest], *, on_step: Callable[[int, int], None] | None = None
    ) -> Iterator[tuple[int, Image.Image]]:
        """Edits a batch; yields (index, edited image) as each is finished, those with few steps first.

        Args:
            on_step: Called after each step with the steps done and the most that any request has.

        Raises:
            ConfigError: The requests do not have the same work size, or a setting does not fit the bundle.
        """
        framings = [self.framing(request.image.size, request.settings) for request in requests]
        sizes = sorted({framing.work_wh for framing in framings})
        if len(sizes) > 1:
            raise ConfigError(f"a batch holds work sizes {sizes}; they must be equal")
        states = {
            i: self.start(request, framing) for i, (request, framing) in enumerate(zip(requests, framings, strict=True))
        }
        total = max((state.schedule.num_steps for state in states.values()), default=0)
        done = 0
        while states:
            denoise_step(self.denoiser, list(states.values()))
            done += 1
            if on_step is not None:
                on_step(done, total)
            for i in [i for i, state in states.items() if state.is_done]:
                yield i, self.decode(states.pop(i).latents, framings[i])
