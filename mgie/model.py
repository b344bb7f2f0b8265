"""The models whole, for training: the parts wired into one forward pass with its losses.

`MGIE` learns end to end; `InstructPix2Pix` is the same diffusion half on CLIP's embedding of words, which the paper
compares with. No formula stands here: they are in the parts' files. Inference does not need this module; it uses
the same parts through `conditioner` and `renderer`. Knows nothing of files, optimisers or data sets.

Axes: B batch, T tokens, L label tokens, S CLIP image side, P patches, d vision width, D LLM width, N visual tokens,
Q queries, C condition width, H W image sides, c latent channels, h w latent sides.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers import UNet2DConditionModel
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import CLIPTextModel

from mgie.config import ObjectiveConfig
from mgie.diffusion import LatentCodec, NoiseSchedule, UNetDenoiser
from mgie.edit_head import EditHead
from mgie.generation import gather_states
from mgie.loss import Losses, change_weights, combine, diffusion_loss, drop_conditions, language_loss, min_snr_weights
from mgie.mllm import MLLM

PUBLISHED_OBJECTIVE = ObjectiveConfig()


@dataclass(frozen=True, kw_only=True)
class Conversations:
    """Teacher-forced conversations, each with the source image as the vision tower sees it. Padding on the right."""

    input_ids: Int[Tensor, "B T"]
    mask: Bool[Tensor, "B T"]
    "true at real tokens"
    labels: Int[Tensor, "B T"]
    "-100 where no language loss counts"
    label_positions: Int[Tensor, " L"]
    "of the states that predict the label tokens, in the flattened [B * T]: found on the host, so that a device need not"
    label_ids: Int[Tensor, " L"]
    "the label tokens"
    num_shared: int
    "tokens before the image that all rows begin with"
    state_starts: Int[Tensor, " B"]
    "first of the N states for the edit head, see `generation.select_start`"
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
    """What the VAE makes of a `PixelPair`, from a cache: `LatentCodec.moments`, unscaled."""

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


class DiffusionHalf(nn.Module):
    """UNet, VAE and noise schedule: what both models share."""

    def __init__(
        self, *, unet: UNet2DConditionModel, codec: LatentCodec, schedule: NoiseSchedule, objective: ObjectiveConfig
    ) -> None:
        super().__init__()
        self.unet, self.codec, self.schedule, self.objective = unet, codec, schedule, objective

    def latents(
        self, images: PixelPair | MomentPair, posterior_noise: Float[Tensor, "B c h w"]
    ) -> tuple[Float[Tensor, "B c h w"], Float[Tensor, "B c h w"]]:
        """Goal latents (sampled, scaled) and source latents (mode, unscaled)."""
        # Outside autocast: the VAE's latents are wanted in its own dtype.
        with torch.no_grad(), torch.autocast(posterior_noise.device.type, enabled=False):
            if isinstance(images, MomentPair):
                mean, logvar, source = images.goal_mean, images.goal_logvar, images.source_mean
            else:
                mean, logvar = self.codec.moments(images.goal)
                source = self.codec.condition_latents(images.source)
            dtype = self.codec.vae.dtype
            mean, logvar, noise = mean.to(dtype), logvar.to(dtype), posterior_noise.to(dtype)
            return self.codec.goal_latents(mean, logvar, noise), source.to(dtype)

    def predict(
        self,
        noisy: Float[Tensor, "B c h w"],
        image_latents: Float[Tensor, "B c h w"],
        timesteps: Int[Tensor, " B"],
        condition: Float[Tensor, "B Q C"],
    ) -> Float[Tensor, "B c h w"]:
        """The UNet's prediction."""
        return UNetDenoiser(self.unet)(torch.cat([noisy, image_latents], dim=1), timesteps.float(), condition)

    def edit_loss(
        self,
        images: PixelPair | MomentPair,
        draws: TrainingDraws,
        condition: Float[Tensor, "B Q C"],
        null_condition: Float[Tensor, "1 Q C"],
        num_samples: int | None,
    ) -> Float[Tensor, ""]:
        """L_edit under the condition, some of it dropped."""
        goal, source = self.latents(images, draws.posterior_noise)
        place_weights = None
        if self.objective.change_weight:
            place_weights = change_weights(goal / self.codec.scaling_factor, source, self.objective.change_weight)
        goal = self.codec.made_of(goal, source)
        condition, source = drop_conditions(
            condition, null_condition, source, draws.dropout_u, share=self.objective.condition_dropout
        )
        noise = draws.noise.to(goal.dtype)
        timesteps = self.schedule.shift(draws.timesteps, self.objective.timestep_shift)
        prediction = self.predict(self.schedule.add_noise(goal, noise, timesteps), source, timesteps, condition)
        gamma, weights = self.objective.min_snr_gamma, None
        if gamma:
            weights = min_snr_weights(self.schedule.snr(timesteps), gamma, self.schedule.prediction_type)
        target = self.schedule.target(goal, noise, timesteps)
        return diffusion_loss(prediction, target, weights=weights, place_weights=place_weights, num_samples=num_samples)


class MGIE(DiffusionHalf):
    """MGIE end to end.

    Trained: word embeddings, LM head, edit head, UNet. Frozen: projector, vision tower, VAE, and LLaMA's blocks and
    norm unless `trains_language` (gradients flow through them to the embeddings in any case).
    """

    def __init__(
        self,
        *,
        mllm: MLLM,
        edit_head: EditHead,
        unet: UNet2DConditionModel,
        codec: LatentCodec,
        schedule: NoiseSchedule,
        num_visual_tokens: int,
        objective: ObjectiveConfig = PUBLISHED_OBJECTIVE,
    ) -> None:
        super().__init__(unet=unet, codec=codec, schedule=schedule, objective=objective)
        self.mllm, self.edit_head, self.num_visual_tokens = mllm, edit_head, num_visual_tokens
        self.shares_prefix = True
        "whether the tokens that all rows of a batch begin with pass the LLM once, see `MLLM.forward_shared`"

    def freeze(self, *, trains_language: bool = False) -> None:
        """Marks what trains and what does not."""
        self.requires_grad_(requires_grad=False)
        for part in (self.mllm.llm.model.embed_tokens, self.mllm.llm.lm_head, self.edit_head, self.unet):
            part.requires_grad_(requires_grad=True)
        if trains_language:
            self.mllm.llm.requires_grad_(requires_grad=True)

    def hidden(self, words: Conversations) -> Float[Tensor, "B T D"]:
        """Teacher-forced hidden states."""
        with torch.no_grad():
            if words.features is not None:
                features: Tensor | None = self.mllm.project(words.features)
            else:
                features = self.mllm.image_features(words.clip_pixels)
        num_shared = words.num_shared if self.shares_prefix else 0
        return self.mllm.forward_shared(self.mllm.embed(words.input_ids, features), words.mask, num_shared)

    def condition(
        self, hidden: Float[Tensor, "B T D"], state_starts: Int[Tensor, " B"]
    ) -> tuple[Float[Tensor, "B Q C"], Float[Tensor, "1 Q C"]]:
        """Condition of each row, and the null condition (one for all, made in the same pass)."""
        embeddings = self.mllm.visual_embeddings(self.num_visual_tokens)
        states = gather_states(hidden, state_starts, self.num_visual_tokens)
        conditions = self.edit_head(torch.cat([states, torch.zeros_like(states[:1])]), embeddings)
        return conditions[:-1], conditions[-1:]

    def forward(
        self,
        batch: TrainingBatch,
        draws: TrainingDraws,
        *,
        num_label_tokens: Tensor | int | None = None,
        num_samples: int | None = None,
    ) -> Losses:
        """Both losses of a batch; `num_label_tokens` and `num_samples` of the global batch, see `loss`."""
        words = cast(Conversations, batch.words)
        hidden = self.hidden(words)
        answers = hidden.flatten(0, 1)[words.label_positions]
        instruction = language_loss(self.mllm.logits(answers), words.label_ids, num_label_tokens=num_label_tokens)
        condition, null_condition = self.condition(hidden, words.state_starts)
        edit = self.edit_loss(batch.images, draws, condition, null_condition, num_samples)
        weights = self.objective
        return combine(
            instruction, edit, edit_weight=weights.edit_weight, instruction_weight=weights.instruction_weight
        )


class InstructPix2Pix(DiffusionHalf):
    """The UNet on the embedding of words by a CLIP text encoder, frozen unless `trains_language`.

    Source: Brooks et al., CVPR 2023. With expressive instructions as words it is the paper's FT.

    Args:
        null_ids: [1, T], the encoder's ids of the empty text.
    """

    null_ids: Tensor

    def __init__(
        self,
        *,
        text_encoder: CLIPTextModel,
        null_ids: Int[Tensor, "1 T"],
        unet: UNet2DConditionModel,
        codec: LatentCodec,
        schedule: NoiseSchedule,
        objective: ObjectiveConfig = PUBLISHED_OBJECTIVE,
    ) -> None:
        super().__init__(unet=unet, codec=codec, schedule=schedule, objective=objective)
        self.text_encoder = text_encoder
        self.register_buffer("null_ids", null_ids, persistent=False)

    def freeze(self, *, trains_language: bool = False) -> None:
        """Marks what trains and what does not."""
        self.requires_grad_(requires_grad=False)
        self.unet.requires_grad_(requires_grad=True)
        if trains_language:
            self.text_encoder.requires_grad_(requires_grad=True)

    def forward(
        self,
        batch: TrainingBatch,
        draws: TrainingDraws,
        *,
        num_label_tokens: Tensor | int | None = None,  # noqa: ARG002  # there is no language loss
        num_samples: int | None = None,
    ) -> Losses:
        """L_edit of a batch; L_ins is 0."""
        ids = torch.cat([cast(EncoderWords, batch.words).input_ids, self.null_ids])
        states: Any = self.text_encoder(input_ids=ids).last_hidden_state
        edit = self.edit_loss(batch.images, draws, states[:-1], states[-1:], num_samples)
        return combine(torch.zeros_like(edit), edit, edit_weight=1.0)
