"""The models whole, for training: the parts wired into one forward pass with its losses.

`MGIE` learns end to end; `InstructPix2Pix` is the same diffusion half on CLIP's embedding of words, which the paper
compares with. No formula stands here: they are in the parts' files. Inference does not need this module; it uses
the same parts through `conditioner` and `renderer`. Knows nothing of files, optimisers or data sets.

Axes: B batch, T tokens, L label tokens, S CLIP image side, P patches, d vision width, D LLM width, N visual tokens,
Q queries, C condition width, H W image sides, c latent channels, h w latent sides.
"""

from typing import Any, cast

import torch
from diffusers import UNet2DConditionModel
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import CLIPTextModel

from mgie.config import ObjectiveConfig
from mgie.model.batch import Conversations, EncoderWords, MomentPair, PixelPair, TrainingBatch, TrainingDraws
from mgie.model.diffusion import LatentVAE, NoiseSchedule, UNetDenoiser
from mgie.model.edit_head import EditHead
from mgie.model.loss import (
    Losses,
    change_weights,
    combine,
    diffusion_loss,
    drop_conditions,
    language_loss,
    min_snr_weights,
)
from mgie.model.mllm import MLLM
from mgie.model.visual_states import gather_states

PUBLISHED_OBJECTIVE = ObjectiveConfig()


class LatentDiffusion(nn.Module):
    """UNet, VAE and noise schedule: what both models share."""

    def __init__(
        self, *, unet: UNet2DConditionModel, vae: LatentVAE, schedule: NoiseSchedule, objective: ObjectiveConfig
    ) -> None:
        super().__init__()
        self.unet, self.vae, self.schedule, self.objective = unet, vae, schedule, objective

    def latents(
        self, images: PixelPair | MomentPair, posterior_noise: Float[Tensor, "B c h w"]
    ) -> tuple[Float[Tensor, "B c h w"], Float[Tensor, "B c h w"]]:
        """Goal latents (sampled, scaled) and source latents (mode, unscaled)."""
        # Outside autocast: the VAE's latents are wanted in its own dtype.
        with torch.no_grad(), torch.autocast(posterior_noise.device.type, enabled=False):
            if isinstance(images, MomentPair):
                mean, logvar, source = images.goal_mean, images.goal_logvar, images.source_mean
            else:
                mean, logvar = self.vae.moments(images.goal)
                source = self.vae.condition_latents(images.source)
            dtype = self.vae.autoencoder.dtype
            mean, logvar, noise = mean.to(dtype), logvar.to(dtype), posterior_noise.to(dtype)
            return self.vae.goal_latents(mean, logvar, noise), source.to(dtype)

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
            place_weights = change_weights(goal / self.vae.scaling_factor, source, self.objective.change_weight)
        goal = self.vae.to_target(goal, source)
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


class MGIE(LatentDiffusion):
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
        vae: LatentVAE,
        schedule: NoiseSchedule,
        num_visual_tokens: int,
        objective: ObjectiveConfig = PUBLISHED_OBJECTIVE,
    ) -> None:
        super().__init__(unet=unet, vae=vae, schedule=schedule, objective=objective)
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


class InstructPix2Pix(LatentDiffusion):
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
        vae: LatentVAE,
        schedule: NoiseSchedule,
        objective: ObjectiveConfig = PUBLISHED_OBJECTIVE,
    ) -> None:
        super().__init__(unet=unet, vae=vae, schedule=schedule, objective=objective)
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
