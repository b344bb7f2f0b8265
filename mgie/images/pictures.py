"""Pictures and masks in whatever form a caller has them: files, bytes, Pillow images, arrays, tensors.

Knows nothing of what a file holds: `files.py` decodes, turns upright and checks the limits.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mgie.config import ImageLimits
from mgie.errors import ImageError, MaskError
from mgie.images.files import DEFAULT_LIMITS, decode_image, read_image, to_mask, to_rgb

_KINDS = "a PIL image, a path, bytes, a binary file, a numpy array or a torch tensor"
_CHANNELS = (1, 3, 4)


def load_image(picture: Any, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """The picture as an upright RGB image within the limits.

    Args:
        picture: A PIL image of any mode; a file's path; encoded bytes; a file open for reading bytes; a numpy array
            H W, H W 1, H W 3 or H W 4, or a torch tensor of those shapes or 1 H W, 3 H W or 4 H W: uint8, bool, or floats 0 to 1.
            It stays as it is; transparency is laid over white.

    Raises:
        ImageError: It is none of these, cannot be read, or is outside the limits.
    """
    opened = _open_picture(picture, limits)
    return read_image(opened, limits=limits) if isinstance(opened, bytes) else to_rgb(opened, limits=limits)


def load_mask(picture: Any, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """Where a picture may change, of the same kinds as a picture; see `to_mask` for what it means.

    Raises:
        MaskError: As `load_image`.
    """
    try:
        opened = _open_picture(picture, limits)
        return to_mask(decode_image(opened, limits=limits) if isinstance(opened, bytes) else opened, limits=limits)
    except ImageError as error:
        raise MaskError(f"mask cannot be used: {error}", param="mask") from error


def _open_picture(picture: Any, limits: ImageLimits) -> Image.Image | bytes:
    """Encoded bytes, at most one more than allowed, or a Pillow image with transparency and all."""
    if isinstance(picture, Image.Image | bytes):
        return picture
    if isinstance(picture, str | Path):
        try:
            with Path(picture).expanduser().open("rb") as file:
                return file.read(limits.max_bytes + 1)
        except (OSError, ValueError) as error:  # ValueError: a null character
            raise ImageError(f"{picture} cannot be read: {getattr(error, 'strerror', error)}", param="image") from error
    if hasattr(picture, "read"):
        data = picture.read(limits.max_bytes + 1)
        if not isinstance(data, bytes):
            raise ImageError(f"image is a file that gives {type(data).__name__}; open it in mode 'rb'", param="image")
        return data
    if hasattr(picture, "detach"):  # a tensor, by its methods: whoever only reads files does without torch
        tensor = picture.detach().cpu()
        tensor = tensor.float() if tensor.is_floating_point() else tensor
        if tensor.ndim == 3 and tensor.shape[0] in _CHANNELS:
            tensor = tensor.permute(1, 2, 0)
        return _from_array(tensor.numpy())
    if isinstance(picture, np.ndarray):
        return _from_array(picture)
    raise ImageError(f"image is a {type(picture).__name__}; it must be {_KINDS}", param="image")


def _from_array(array: NDArray[Any]) -> Image.Image:
    """Raises ImageError: shape, type or range of the pixels is another one."""
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in _CHANNELS) or array.size == 0:
        raise ImageError(
            f"image has shape {array.shape}; it must be H W, H W 3 or H W 4 (a tensor may be 3 H W)", param="image"
        )
    if array.dtype == np.bool_:
        array = array * np.uint8(255)
    elif np.issubdtype(array.dtype, np.floating):
        low, high = array.min(), array.max()
        if not (low >= 0 and high <= 1):  # NaN fails every comparison
            raise ImageError(f"image has floats {low:g} to {high:g}; they must be 0 to 1", param="image")
        array = (array * 255).round().astype(np.uint8)
    elif array.dtype != np.uint8:
        raise ImageError(f"image is of {array.dtype}; it must be uint8, bool or floats 0 to 1", param="image")
    return Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array)
