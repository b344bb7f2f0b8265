"""What the tests of files of version 0.1.0 share: where the files lie, how exactly their numbers must be met, drawn photos.

`data/v0_1/README.md` says how each file was written.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

DATA = Path(__file__).resolve().parent / "data" / "v0_1"


def recorded(name: str) -> dict[str, Any]:
    """A JSON file of them."""
    content: dict[str, Any] = json.loads((DATA / name).read_text(encoding="utf-8"))
    return content


def computes_alike() -> bool:
    """Whether this machine rounds as the one did that wrote the files."""
    then = recorded("pictures.json")
    now = (torch.__version__, torch.backends.cpu.get_cpu_capability(), torch.get_num_threads())
    return now == (then["versions"]["torch"], then["cpu_capability"], then["threads"])


def assert_same_picture(found: Image.Image, picture: Path, pixels_sha256: str) -> None:
    """The stored picture: bit by bit where this machine rounds alike, else within two levels."""
    with Image.open(picture) as opened:
        expected = opened.convert("RGB")
    assert pixels_of(expected) == pixels_sha256, f"{picture} was altered"
    assert (found.mode, found.size) == (expected.mode, expected.size)
    if computes_alike():
        assert pixels_of(found) == pixels_sha256
    difference = np.asarray(found).astype(int) - np.asarray(expected).astype(int)
    assert np.abs(difference).max() <= 2


def pixels_of(image: Image.Image) -> str:
    """SHA-256 of the decoded pixels, not of a file."""
    return hashlib.sha256(image.tobytes()).hexdigest()


def draw_photo(wh: tuple[int, int], number: int) -> Image.Image:
    """Sky, house and sun in whole numbers, which every library draws alike."""
    width, height = wh
    x, y = np.arange(width)[None, :], np.arange(height)[:, None]
    slopes = [x * 200 // width + 0 * y, y * 200 // height + 0 * x, (3 * x + 5 * y + 40 * number) % 256]
    pixels = np.stack(slopes, axis=2).astype(np.uint8)
    pixels[height // 2 : height - height // 8, width // 4 : width // 2] = (150, 60 + 20 * number, 40)
    pixels[height // 8 : height // 3, width - width // 3 : width - width // 8] = (250, 230, 90)
    return Image.fromarray(pixels)


def draw_mask(wh: tuple[int, int]) -> Image.Image:
    """White, where the picture may change, on the right half."""
    mask = np.zeros((wh[1], wh[0]), np.uint8)
    mask[:, wh[0] // 2 :] = 255
    return Image.fromarray(mask)
