"""Text-and-image classifier-free guidance around a denoiser.

Up to three predictions are combined: `t` = e(T, V) with text and image, `i` = e(0, V) with the image
only (null text), `n` = e(0, 0) with neither (null text, zero image latents):

    e = n + s_I (i - n) + s_T (t - i)

Knows nothing of noise schedules: latents arrive already scaled as the model wants them.

Axes: B samples, N rows of the denoiser's batch (up to 3 B), c latent channels (c2 = 2 c), h w latent sides,
Q condition tokens, C condition width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

Branch = Literal["text_and_image", "image", "none"]


@runtime_checkable  # tests check types at run time
class Denoiser(Protocol):
    """One evaluation of the diffusion model, whatever it is made of.

    Inputs come on the device of the samples; latents and timesteps are float32, the condition has the
    dtype it was given with. A denoiser that computes in another dtype casts by itself.
    """

    def __call__(
        self,
        latents: Float[Tensor, "N c2 h w"],
        timesteps: Float[Tensor, " N"],
        condition: Float[Tensor, "N Q C"],
    ) -> Float[Tensor, "N c h w"]:
        """Predicts for each row; the first c channels are scaled noisy latents, the others image latents."""
        ...


@dataclass(kw_only=True)
class GuidanceInput:
    """What guidance needs of one sample at one step."""

    latents: Float[Tensor, "c h w"]
    "noisy latents, scaled as the model wants them, float32"
    timestep: float
    "training timestep; may lie between two whole ones"
    image_latents: Float[Tensor, "c h w"]
    "source image, VAE posterior mode, not scaled"
    condition: Float[Tensor, "Q C"]
    "T: what the edit head (or text encoder) derived"
    null_condition: Float[Tensor, "Q C"]
    "0: what it derives from nothing"
    text_scale: float
    "s_T"
    image_scale: float
    "s_I"


def needed_branches(text_scale: float, image_scale: float) -> tuple[Branch, ...]:
    """The branches whose coefficient is not zero; always at least one.

    The equation above, sorted by prediction, is e = s_T t + (s_I - s_T) i + (1 - s_I) n.
    """
    coefficients: dict[Branch, float] = {
        "text_and_image": text_scale,
        "image": image_scale - text_scale,
        "none": 1.0 - image_scale,
    }
    return tuple(branch for branch, coefficient in coefficients.items() if coefficient != 0.0)


def guided_prediction(denoiser: Denoiser, samples: Sequence[GuidanceInput]) -> Float[Tensor, "B c h w"]:
    """The guided prediction of every sample, from one call of the denoiser.

    Rows are sorted by branch, then by sample; a branch that cannot matter (`needed_branches`) gets no row.
    Scales, timesteps and conditions may differ from sample to sample; shapes may not.

    Returns:
        float32 whatever dtype the denoiser answers in: text guidance multiplies a small difference of
        large numbers.

    Source: Brooks et al., InstructPix2Pix (arXiv 2211.09800), equation 3.
    """
    # Row of the denoiser's batch for each (branch, sample) that is needed.
    needed = [needed_branches(sample.text_scale, sample.image_scale) for sample in samples]
    rows: dict[tuple[Branch, int], int] = {}
    branches: tuple[Branch, ...] = ("text_and_image", "image", "none")
    for branch in branches:
        for index, present in enumerate(needed):
            if branch in present:
                rows[branch, index] = len(rows)

    latents = torch.stack([samples[index].latents for _, index in rows])
    image_latents = torch.stack([_image_latents(samples[index], branch) for branch, index in rows])
    condition = torch.stack([_condition(samples[index], branch) for branch, index in rows])
    timesteps = torch.tensor([samples[index].timestep for _, index in rows], dtype=torch.float32, device=latents.device)
    output = denoiser(torch.cat([latents, image_latents], dim=1), timesteps, condition)

    predictions = output.float().unbind(0)
    t, i, n = [], [], []  # each B x [4, h, w]
    for index, present in enumerate(needed):
        # A branch without a row has coefficient zero: any finite value serves. That of its neighbour makes
        # the difference below vanish exactly, so that scales of one return the prediction itself.
        image: Branch = "image" if "image" in present else present[0]
        text: Branch = "text_and_image" if "text_and_image" in present else image
        none: Branch = "none" if "none" in present else image
        t.append(predictions[rows[text, index]])
        i.append(predictions[rows[image, index]])
        n.append(predictions[rows[none, index]])
    scales = torch.tensor(
        [[sample.text_scale for sample in samples], [sample.image_scale for sample in samples]],
        dtype=torch.float32,
        device=output.device,
    )
    text_scale, image_scale = scales[:, :, None, None, None].unbind(0)  # each [B, 1, 1, 1]
    t_all, i_all, n_all = torch.stack(t), torch.stack(i), torch.stack(n)
    return n_all + image_scale * (i_all - n_all) + text_scale * (t_all - i_all)


def _image_latents(sample: GuidanceInput, branch: Branch) -> Float[Tensor, "c h w"]:
    return torch.zeros_like(sample.image_latents) if branch == "none" else sample.image_latents


def _condition(sample: GuidanceInput, branch: Branch) -> Float[Tensor, "Q C"]:
    return sample.condition if branch == "text_and_image" else sample.null_condition
