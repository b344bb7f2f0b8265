"""Typed records of a training batch: words, pictures or what a cache made of them, and the random draws.

Axes: B samples, T tokens, L label tokens, P image patches, d features of the vision tower; H, W pixels; c, h, w latents.
"""

from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Conversations:
    """Teacher-forced conversations, each with the source image as the vision tower sees it. Padding on the right."""

    input_ids: Int[Tensor, "B T"]
    mask: Bool[Tensor, "B T"]
    "true at real tokens"
    labels: Int[Tensor, "B T"]
    "-100 where no language loss counts"
    label_positions: Int[Tensor, " L"]
    "positions of the states that predict the label tokens, in the flattened [B * T]: found on the host, so that a device need not"
    label_ids: Int[Tensor, " L"]
    "the label tokens"
    num_shared: int
    "tokens before the image that all rows begin with"
    state_starts: Int[Tensor, " B"]
    "first of the N states for the edit head, see `visual_states.select_start`"
    clip_pixels: Float[Tensor, "B 3 S S"] | None = None
    "CLIP-normalised; None for an LLM without eyes, or with `features`"
    features: Float[Tensor, "B P d"] | None = None
    "what the vision tower makes of clip_pixels, from a cache"


@dataclass(frozen=True, kw_only=True)
class EncoderWords:
    """Words for a CLIP text encoder."""

    input_ids: Int[Tensor, "B T"]
    "padded to the encoder's length"


@dataclass(frozen=True, kw_only=True)
class PixelPair:
    """Training images, [-1, 1]."""

    source: Float[Tensor, "B 3 H W"]
    goal: Float[Tensor, "B 3 H W"]


@dataclass(frozen=True, kw_only=True)
class MomentPair:
    """What the VAE makes of a `PixelPair`, from a cache: `LatentVAE.moments`, unscaled."""

    source_mean: Float[Tensor, "B c h w"]
    goal_mean: Float[Tensor, "B c h w"]
    goal_logvar: Float[Tensor, "B c h w"]


@dataclass(frozen=True, kw_only=True)
class TrainingBatch:
    """What a model is trained on, but for the random draws."""

    words: Conversations | EncoderWords
    images: PixelPair | MomentPair


@dataclass(frozen=True, kw_only=True)
class TrainingDraws:
    """The random draws of a step, made outside so that a step is a function."""

    noise: Float[Tensor, "B c h w"]
    "standard normal, the diffusion noise"
    posterior_noise: Float[Tensor, "B c h w"]
    "standard normal, samples the goal's VAE posterior"
    timesteps: Int[Tensor, " B"]
    "0 to 999"
    dropout_u: Float[Tensor, " B"]
    "uniform in [0, 1), decides which conditions are dropped"
