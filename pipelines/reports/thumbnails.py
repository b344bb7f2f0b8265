"""Small pictures for reports."""

import base64

from mgie.errors import MGIEError
from mgie.images.files import read_image, write_image
from mgie.images.geometry import resize
from mgie.storage.folder import Folder

_THUMBNAIL_PX = 192


def thumbnail(images: Folder, uri: str) -> str:
    """A small picture as a data URL; "" where it cannot be read."""
    try:
        image = read_image(images.read(uri))
    except (MGIEError, OSError):
        return ""
    scale = _THUMBNAIL_PX / max(image.size)
    small = resize(image, (max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    return "data:image/jpeg;base64," + base64.b64encode(write_image(small, format="jpeg", quality=85)).decode()
