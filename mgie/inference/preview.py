"""Cheap previews: latents to colours by one linear map.

Each latent position is shown as the mean colour of the pixels that the VAE would decode from it. The map is
fitted by least squares on pictures of noise, as coarse as photos are, so it needs no table per model.

Axes: B pictures, c latent channels (c1 = c + 1, the last for the offset), h w latent sides, N positions.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from mgie.model.diffusion import LatentVAE

_NUM_PICTURES, _SIDE = 8, 16  # that the map is fitted on, and their latent side
# A picture is a sum of patches, so many per side; the fewer, the stronger, and grey varies more than colour.
_GRIDS = (1, 2, 4, 8, 16, 32)
_GREY, _COLOR = 0.7, 0.35
_RIDGE = 1e-4  # keeps the map small where a latent channel hardly varies


@torch.inference_mode()
def fit_colors(vae: LatentVAE) -> Float[Tensor, "3 c1"]:
    """The map of a VAE: one pass of encoder and decoder over eight small pictures. Always the same for one VAE."""
    generator = torch.Generator().manual_seed(0)
    side_px = _SIDE * vae.downsampling
    pictures = torch.zeros(_NUM_PICTURES, 3, side_px, side_px)
    for grid in _GRIDS:
        grey, color = (torch.randn(_NUM_PICTURES, c, grid, grid, generator=generator) for c in (1, 3))
        patches = (_GREY * grey + _COLOR * color) / grid**0.5
        pictures += F.interpolate(patches, (side_px, side_px), mode="bilinear")
    latents = vae.condition_latents(pictures.clamp(-1, 1)) * vae.scaling_factor
    shown = F.avg_pool2d(vae.decode(latents).float().clamp(-1, 1), vae.downsampling)
    x = _with_offset(latents.float()).transpose(0, 1).flatten(1)  # [c1, N]
    y = shown.transpose(0, 1).flatten(1)  # [3, N]
    ridge = _RIDGE * x.shape[1] * torch.eye(len(x), device=x.device)
    colors: Tensor = torch.linalg.solve(x @ x.T + ridge, y @ x.T, left=False)
    return colors


def show_latents(latents: Float[Tensor, "c h w"], colors: Float[Tensor, "3 c1"]) -> Float[Tensor, "3 h w"]:
    """A small picture of scaled latents, about [-1, 1]."""
    return torch.einsum("rc,chw->rhw", colors, _with_offset(latents[None].float())[0])


def _with_offset(latents: Float[Tensor, "B c h w"]) -> Float[Tensor, "B c1 h w"]:
    return torch.cat([latents, torch.ones_like(latents[:, :1])], dim=1)
