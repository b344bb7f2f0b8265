"""Pictures as tensors: [0, 255] <-> [-1, 1] at the model's own size, what CLIP sees, masks on latents.

Axes: B images, H W pixels, S side of CLIP's square, h w latent sides.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from mgie.errors import ConfigError
from mgie.images.geometry import Framing, center_crop, framed, resize

# Sources more slender than this are trimmed before CLIP's resize: CLIP sees only the centre square, and at 1000:1
# the rest of the resized strip would take 150 MB.
_CLIP_MAX_ASPECT = 16


def to_work(image: Image.Image, framing: Framing) -> Float[Tensor, "3 H W"]:
    """The source at the framing's work size, [-1, 1]."""
    return to_signed(resize(framed(image, framing), framing.work_wh))


def from_work(pixels: Float[Tensor, "3 H W"], framing: Framing) -> Image.Image:
    """The model's result, [-1, 1] (clipped), at the framing's output size."""
    return resize(from_signed(pixels), framing.output_wh)


def to_signed(image: Image.Image) -> Float[Tensor, "3 H W"]:
    """RGB image -> float32 in [-1, 1]: 2 x / 255 - 1, computed in float64 as the recorded vectors were."""
    pixels = np.asarray(image, dtype=np.float64)
    return torch.from_numpy((2.0 * pixels / 255.0 - 1.0).astype(np.float32).transpose(2, 0, 1).copy())


def to_uint8(pixels: Float[Tensor, "3 H W"]) -> UInt8[Tensor, "H W 3"]:
    """[-1, 1] (clipped) -> 0..255, rounded to nearest."""
    unit = (pixels.detach().to("cpu", torch.float32) / 2 + 0.5).clamp(0, 1)
    return (unit * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()


def from_signed(pixels: Float[Tensor, "3 H W"]) -> Image.Image:
    """[-1, 1] (clipped) -> RGB image."""
    return Image.fromarray(to_uint8(pixels).numpy())


class ClipPixels:
    """CLIP's preprocessing: shortest edge resized bicubically, centre square, normalised.

    Wraps transformers' Pillow processor, the one variant that is exact and does without torchvision.

    Args:
        config: Content of `preprocessor_config.json`; `size` and `crop_size` may be integers (the old form).

    Raises:
        ConfigError: The processor does not centre-crop to a square.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        # Here, because it takes seconds and whoever only reads or writes images does without.
        from transformers import CLIPImageProcessorPil

        self._processor = CLIPImageProcessorPil.from_dict(dict(config))
        crop = self._processor.crop_size
        width, height = crop["width"], crop["height"]
        if not self._processor.do_center_crop or width != height:
            raise ConfigError(f"CLIP preprocessing gives {width}x{height} px; it must centre-crop to a square")
        self.side_px: int = width

    def __call__(self, images: Sequence[Image.Image]) -> Float[Tensor, "B 3 S S"]:
        """RGB images of any sizes -> float32 in CLIP's normalised range (about -1.8 to 2.2)."""
        trimmed = [_trim_aspect(image, _CLIP_MAX_ASPECT) for image in images]
        pixels: Tensor = self._processor(images=trimmed, return_tensors="pt")["pixel_values"]
        return pixels


def _trim_aspect(image: Image.Image, max_aspect: int) -> Image.Image:
    longest = min(image.size) * max_aspect
    if max(image.size) <= longest:
        return image
    return center_crop(image, min(image.width, longest), min(image.height, longest))


def kept_latents(mask: Image.Image, framing: Framing, latent_hw: tuple[int, int]) -> Bool[Tensor, "1 h w"]:
    """The latents none of whose pixels may change; one that the mask only touches is edited."""
    pixels = torch.from_numpy(np.asarray(framed(mask, framing), dtype=np.float32))
    return F.adaptive_max_pool2d(pixels[None], latent_hw) == 0
