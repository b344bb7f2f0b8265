"""MGIE whole, for end-to-end training: the parts wired into one forward pass with both losses.

No formula stands here: they are in the parts' files. Inference does not need this module; it uses the same
parts through `conditioner` and `renderer`. Knows nothing of files, optimisers or data sets.

Axes: B batch, T tokens, S CLIP image side, D LLM width, N visual tokens, Q queries, C condition width, H W
image sides, c latent channels, h w latent sides.
"""

from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mgie.diffusion import LatentCodec, NoiseSchedule, UNetDenoiser
from mgie.edit_head import EditHead
from mgie.generation import gather_states, select_start
from mgie.loss import Losses, combine, diffusion_loss, drop_conditions, language_loss
from mgie.mllm import MLLM


@dataclass(frozen=True, kw_only=True)
class TrainingBatch:
    """Teacher-forced conversations with their images. Padding on the right."""

    input_ids: Int[Tensor, "B T"]
    mask: Bool[Tensor, "B T"]
    "true at real tokens"
    labels: Int[Tensor, "B T"]
    "-100 where no language loss counts"
    state_starts: Int[Tensor, " B"]
    "first of the N states for the edit head, see `training_state_start`"
    clip_pixels: Float[Tensor, "B 3 S S"]
    source_pixels: Float[Tensor, "B 3 H W"]
    "[-1, 1]"
    goal_pixels: Float[Tensor, "B 3 H W"]
    "[-1, 1]"


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


class MGIE(nn.Module):
    """The whole model for end-to-end training.

    Trained: word embeddings, LM head, edit head, UNet. Frozen: LLaMA's blocks and norm, projector, vision
    tower, VAE (gradients still flow through the LLM to the embeddings).
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
    ) -> None:
        super().__init__()
        self.mllm, self.edit_head, self.unet, self.codec, self.schedule = mllm, edit_head, unet, codec, schedule
        self.num_visual_tokens = num_visual_tokens

    def freeze(self) -> None:
        """Marks what trains and what does not."""
        self.requires_grad_(requires_grad=False)
        for part in (self.mllm.llm.model.embed_tokens, self.mllm.llm.lm_head, self.edit_head, self.unet):
            part.requires_grad_(requires_grad=True)

    def hidden(self, batch: TrainingBatch) -> Float[Tensor, "B T D"]:
        """Teacher-forced hidden states."""
        with torch.no_grad():
            features = self.mllm.image_features(batch.clip_pixels)
        hidden: Tensor = self.mllm(self.mllm.embed(batch.input_ids, features), batch.mask)
        return hidden

    def condition(
        self, hidden: Float[Tensor, "B T D"], state_starts: Int[Tensor, " B"]
    ) -> tuple[Float[Tensor, "B Q C"], Float[Tensor, "1 Q C"]]:
        """Condition of each row, and the null condition (one for all)."""
        embeddings = self.mllm.visual_embeddings(self.num_visual_tokens)
        states = gather_states(hidden, state_starts, self.num_visual_tokens)
        return self.edit_head(states, embeddings), self.edit_head.null_condition(embeddings)

    def latents(
        self, batch: TrainingBatch, posterior_noise: Float[Tensor, "B c h w"]
    ) -> tuple[Float[Tensor, "B c h w"], Float[Tensor, "B c h w"]]:
        """Goal latents (sampled, scaled) and source latents (mode, unscaled)."""
        with torch.no_grad():
            mean, logvar = self.codec.moments(batch.goal_pixels)
            return self.codec.goal_latents(mean, logvar, posterior_noise), self.codec.condition_latents(
                batch.source_pixels
            )

    def predict(
        self,
        noisy: Float[Tensor, "B c h w"],
        image_latents: Float[Tensor, "B c h w"],
        timesteps: Int[Tensor, " B"],
        condition: Float[Tensor, "B Q C"],
    ) -> Float[Tensor, "B c h w"]:
        """The UNet's prediction."""
        return UNetDenoiser(self.unet)(torch.cat([noisy, image_latents], dim=1), timesteps.float(), condition)

    def forward(
        self, batch: TrainingBatch, draws: TrainingDraws, *, num_label_tokens: Tensor | int | None = None
    ) -> Losses:
        """Both losses of a batch; `num_label_tokens` as in `loss.language_loss`."""
        hidden = self.hidden(batch)
        instruction = language_loss(self.mllm.logits(hidden), batch.labels, num_label_tokens=num_label_tokens)
        condition, null_condition = self.condition(hidden, batch.state_starts)
        goal, source = self.latents(batch, draws.posterior_noise)
        condition, source = drop_conditions(condition, null_condition, source, draws.dropout_u)
        noisy = self.schedule.add_noise(goal, draws.noise, draws.timesteps)
        prediction = self.predict(noisy, source, draws.timesteps, condition)
        target = self.schedule.target(goal, draws.noise, draws.timesteps)
        return combine(instruction, diffusion_loss(prediction, target))


def training_state_start(num_tokens: int, visual_start: int | None, num_visual_tokens: int) -> int:
    """First state for the edit head in a teacher-forced row of `num_tokens` tokens, padding not counted.

    The published code counts padding, so a short row without `[IMG0]` would take states of padding.
    """
    return select_start(num_tokens, visual_start, num_visual_tokens)
