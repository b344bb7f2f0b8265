"""Where an edit may change the picture: a mask over the source's pixels, in latent space and on the result.

A mask is a greyscale image of the source's size: black stays, white is edited, grey is blended. Latents outside
it follow the source while the others are denoised (`sampler.Kept`), so that the edit fits its surroundings, unless the
model makes the change (`diffusion.LatentCodec`): it then makes the whole picture's. The result is laid over the source,
so that pixels outside are the source's own, bit by bit.

Axes: h w latent sides.
"""

import numpy as np
import torch
from jaxtyping import Bool
from PIL import Image
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from mgie.errors import MaskError
from mgie.images import Framing, framed


def check_mask(mask: Image.Image, framing: Framing) -> None:
    """Raises MaskError: the mask is not greyscale, not of the source's size, or black wherever the model looks."""
    if mask.mode != "L":
        raise MaskError(f"mask has mode {mask.mode}; it must be greyscale (L)", param="mask")
    if mask.size != framing.source_wh:
        (width, height), (source_width, source_height) = mask.size, framing.source_wh
        raise MaskError(
            f"mask is {width}x{height} px; it must be {source_width}x{source_height} px, as the image", param="mask"
        )
    if framed(mask, framing).getextrema()[1] == 0:
        raise MaskError("mask marks no pixel to edit; at least one must not be black", param="mask")


def kept_latents(mask: Image.Image, framing: Framing, latent_hw: tuple[int, int]) -> Bool[Tensor, "1 h w"]:
    """The latents none of whose pixels may change; one that the mask only touches is edited."""
    pixels = torch.from_numpy(np.asarray(framed(mask, framing), dtype=np.float32))
    return F.adaptive_max_pool2d(pixels[None], latent_hw) == 0


def lay_over(edited: Image.Image, source: Image.Image, mask: Image.Image) -> Image.Image:
    """The edited image where the mask is white, the source where it is black; all of one size."""
    return Image.composite(edited, source, mask)
