"""Language loss, diffusion loss, condition dropout, and their weights.

`loss = L_ins + 0.5 * L_edit`. Knows nothing of models: takes predictions and draws.

Axes: B batch, T tokens, V vocabulary, Q queries, C condition width, h w latent sides.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mgie.prompts import IGNORE

EDIT_LOSS_WEIGHT = 0.5
# Dropout of conditions, one uniform u per sample (source: InstructPix2Pix, section 3.2.1):
TEXT_DROP_BELOW = 0.10  # u < 0.10            -> null text condition
IMAGE_DROP_FROM = 0.05  # 0.05 <= u < 0.15    -> image latents zeroed
IMAGE_DROP_BELOW = 0.15


@dataclass(frozen=True)
class Losses:
    """Scalars: `total` = `instruction` + 0.5 * `edit`."""

    total: Tensor
    instruction: Tensor
    edit: Tensor


def language_loss(
    logits: Float[Tensor, "B T V"], labels: Int[Tensor, "B T"], *, num_label_tokens: Tensor | int | None = None
) -> Float[Tensor, ""]:
    """Next-token cross entropy: position t is scored on label t + 1.

    Args:
        num_label_tokens: What the sum is divided by: the label tokens of the *global* batch where this is
            a part of it; None = those of this batch. With none at all the loss is 0 (the published code
            gives NaN).
    """
    shifted = labels[:, 1:].reshape(-1)
    scores = logits[:, :-1].reshape(-1, logits.shape[-1]).float()
    total = nn.functional.cross_entropy(scores, shifted, ignore_index=IGNORE, reduction="sum")
    count = (shifted != IGNORE).sum() if num_label_tokens is None else num_label_tokens
    return total / torch.as_tensor(count, device=total.device).clamp(min=1)


def diffusion_loss(prediction: Float[Tensor, "B c h w"], target: Float[Tensor, "B c h w"]) -> Float[Tensor, ""]:
    """Mean squared error in float32."""
    return nn.functional.mse_loss(prediction.float(), target.float())


def drop_conditions(
    condition: Float[Tensor, "B Q C"],
    null_condition: Float[Tensor, "1 Q C"],
    image_latents: Float[Tensor, "B c h w"],
    u: Float[Tensor, " B"],
) -> tuple[Float[Tensor, "B Q C"], Float[Tensor, "B c h w"]]:
    """Condition and image latents with classifier-free dropout applied.

    Args:
        u: Uniform draws in [0, 1), one per sample; 1 keeps everything.
    """
    drop_text = u < TEXT_DROP_BELOW
    drop_image = (u >= IMAGE_DROP_FROM) & (u < IMAGE_DROP_BELOW)
    condition = torch.where(drop_text[:, None, None], null_condition, condition)
    image_latents = torch.where(drop_image[:, None, None, None], torch.zeros_like(image_latents), image_latents)
    return condition, image_latents


def combine(instruction: Float[Tensor, ""], edit: Float[Tensor, ""]) -> Losses:
    """`total = instruction + 0.5 * edit`."""
    return Losses(total=instruction + EDIT_LOSS_WEIGHT * edit, instruction=instruction, edit=edit)
