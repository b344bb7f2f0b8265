"""Language loss, diffusion loss, condition dropout, and their weights.

`loss = weight * L_ins + weight * L_edit`. Knows nothing of models: takes predictions and draws. Every mean can be taken over a
larger batch than the one given (`num_...`), so that the parts of a batch, on one device after another or on many at
once, sum to what the whole gives.

Axes: B batch, L label tokens, V vocabulary, Q queries, C condition width, h w latent sides.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


@dataclass(frozen=True)
class Losses:
    """Scalars: `total` is the weighted sum of `instruction` and `edit`."""

    total: Tensor
    instruction: Tensor
    edit: Tensor


def language_loss(
    logits: Float[Tensor, "L V"], label_ids: Int[Tensor, " L"], *, num_label_tokens: Tensor | int | None = None
) -> Float[Tensor, ""]:
    """Cross entropy of the scores that predict the label tokens; other positions need not be scored.

    Args:
        num_label_tokens: What the sum is divided by: the label tokens of the *global* batch where this is
            a part of it; None = those of this batch. With none at all the loss is 0 (the published code
            gives NaN).
    """
    total = nn.functional.cross_entropy(_at_least_float32(logits), label_ids, reduction="sum")
    count = len(label_ids) if num_label_tokens is None else num_label_tokens
    return total / torch.as_tensor(count, device=total.device).clamp(min=1)


def diffusion_loss(
    prediction: Float[Tensor, "B c h w"],
    target: Float[Tensor, "B c h w"],
    *,
    weights: Float[Tensor, " B"] | None = None,
    place_weights: Float[Tensor, "B 1 h w"] | None = None,
    num_samples: int | None = None,
) -> Float[Tensor, ""]:
    """Mean squared error, in float32 at least.

    Args:
        weights: Weights of the samples, see `min_snr_weights`; None = 1.
        place_weights: Weights of the places, see `change_weights`; None = 1.
        num_samples: What the sum over samples is divided by: those of the global batch; None = B.
    """
    squares = (_at_least_float32(prediction) - _at_least_float32(target)).square()
    errors = (squares if place_weights is None else squares * place_weights).mean(dim=(1, 2, 3))
    if weights is not None:
        errors = errors * weights
    return errors.sum() / (len(errors) if num_samples is None else num_samples)


def min_snr_weights(snr: Float[Tensor, " B"], gamma: float, prediction_type: str) -> Float[Tensor, " B"]:
    """Weights of the squared errors of what the UNet predicts, so that no noise level dominates.

    `min(SNR, gamma)` on the error of the clean latents is min/SNR on that of epsilon and min/(SNR + 1) on that of v.
    Source: Hang et al., ICCV 2023, section 3.4.
    """
    clipped = snr.clamp(max=gamma)
    if prediction_type == "epsilon":
        return clipped / snr
    return clipped / (snr + 1) if prediction_type == "v_prediction" else clipped


def change_weights(
    goal_latents: Float[Tensor, "B c h w"], source_latents: Float[Tensor, "B c h w"], weight: float
) -> Float[Tensor, "B 1 h w"]:
    """`1 + weight` where source and goal differ clearly, 1 where they do not: most edits change a small part only.

    Args:
        goal_latents, source_latents: Both unscaled. Clearly: by the source's standard deviation of a latent, as the
            root of the mean over channels; below, in proportion.
    """
    spread = source_latents.std(dim=(1, 2, 3), keepdim=True).clamp(min=1e-6)
    distance = (goal_latents - source_latents).square().mean(dim=1, keepdim=True).sqrt()
    return 1 + weight * (distance / spread).clamp(max=1)


def drop_conditions(
    condition: Float[Tensor, "B Q C"],
    null_condition: Float[Tensor, "1 Q C"],
    image_latents: Float[Tensor, "B c h w"],
    u: Float[Tensor, " B"],
    *,
    share: float,
) -> tuple[Float[Tensor, "B Q C"], Float[Tensor, "B c h w"]]:
    """Condition and image latents with classifier-free dropout applied: text below 2p, image from p to below 3p.

    Source: Brooks et al., CVPR 2023, section 3.2.1, with p = 0.05.

    Args:
        u: Uniform draws in [0, 1), one per sample; 1 keeps everything.
        share: p, of the samples that lose the text, that lose the image, and that lose both: each.
    """
    drop_text = u < 2 * share
    drop_image = (u >= share) & (u < 3 * share)
    condition = torch.where(drop_text[:, None, None], null_condition, condition)
    image_latents = torch.where(drop_image[:, None, None, None], torch.zeros_like(image_latents), image_latents)
    return condition, image_latents


def combine(
    instruction: Float[Tensor, ""], edit: Float[Tensor, ""], *, edit_weight: float, instruction_weight: float = 1.0
) -> Losses:
    """`total = instruction_weight * instruction + edit_weight * edit`."""
    total = instruction_weight * instruction + edit_weight * edit
    return Losses(total=total, instruction=instruction, edit=edit)


def _at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
