"""Where an edit may change the picture: a mask over the source's pixels, in latent space and on the result.

A mask is a greyscale image of the source's size: black stays, white is edited, grey is blended. Latents outside
it follow the source while the others are denoised (`sampler.FrozenRegion`), so that the edit fits its surroundings, unless the
model makes the change (`diffusion.LatentVAE`): it then makes the whole picture's. The result is laid over the source,
so that pixels outside are the source's own, bit by bit.

Axes: h w latent sides.
"""

from PIL import Image

from mgie.errors import MaskError
from mgie.images.geometry import Framing, framed


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


def lay_over(edited: Image.Image, source: Image.Image, mask: Image.Image) -> Image.Image:
    """The edited image where the mask is white, the source where it is black; all of one size."""
    return Image.composite(edited, source, mask)
