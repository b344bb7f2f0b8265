"""What a bundle makes of real photos: six optimisations whose exact result is known, at the photos' full size.

    python benchmarks/real_photos.py ../shared/data/demo_inputs [--bundle tiny] [--sheet sheet.jpg]

Per operation: on how many photos the change has the right direction (a number that the operation must move, see
`DIRECTIONS`, moved by at least a quarter of what the exact operation moves it), and the mean absolute distance to the
exact result, colours 0 to 1, by detail transfer, by scaling the model's picture up, and of the untouched photo.

The last line is JSON: the mean distance by detail transfer and by scaling up.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from mgie.editor import Editor
from mgie.images.pictures import load_image
from mgie.tiny.world.filters import Filter, FilterName, apply_filter

Floats = npt.NDArray[np.float64]

INSTRUCTIONS: dict[FilterName, str] = {
    "brighter": "make the photo brighter",
    "darker": "make the photo darker",
    "black_and_white": "make it black and white",
    "warmer": "make it warmer",
    "night": "make it night",
    "more_contrast": "increase the contrast",
}
_LUMA = np.array([0.299, 0.587, 0.114])


def _brightness(x: Floats) -> float:
    return float((x @ _LUMA).mean())


def _colorfulness(x: Floats) -> float:
    return float((x.max(axis=2) - x.min(axis=2)).mean())


def _warmth(x: Floats) -> float:
    return float((x[..., 0] - x[..., 2]).mean())


def _contrast(x: Floats) -> float:
    return float((x @ _LUMA).std())


DIRECTIONS: dict[FilterName, Callable[[Floats], float]] = {
    "brighter": _brightness,
    "darker": _brightness,
    "black_and_white": _colorfulness,
    "warmer": _warmth,
    "night": _brightness,
    "more_contrast": _contrast,
}
_MIN_SHARE = 0.25


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--bundle", default="tiny")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet: a photo per row, an operation per column")
    given = parser.parse_args()
    editor = Editor.load(given.bundle)
    photos = [load_image(path) for path in sorted(given.photos.glob("*.jpg"))]
    rows: list[list[Image.Image]] = [[photo] for photo in photos]
    ours, plain = [], []
    print(f"{'operation':16} direction  L1 x100: detail transfer, scaled up, untouched")
    for name, instruction in INSTRUCTIONS.items():
        right, distances = 0, []
        for row, photo in zip(rows, photos, strict=True):
            source = np.asarray(photo)
            exact = apply_filter(source, Filter(name)) / 255.0
            results = [
                editor.edit(photo, instruction, seed=1, detail_transfer=transfers).image for transfers in (True, False)
            ]
            row.append(results[0])
            found = [np.asarray(image) / 255.0 for image in results]
            measure = DIRECTIONS[name]
            before = measure(source / 255.0)
            right += (measure(found[0]) - before) / (measure(exact) - before) >= _MIN_SHARE
            distances.append([float(np.abs(one - exact).mean()) for one in (*found, source / 255.0)])
        means = np.mean(distances, axis=0)
        ours.append(means[0])
        plain.append(means[1])
        print(
            f"{name:16} {right:4}/{len(photos)}    " + "  ".join(f"{100 * value:6.2f}" for value in means), flush=True
        )
    if given.sheet:
        _sheet(rows).save(given.sheet, quality=90)
    result = {
        "name": "real_photos",
        "unit": "mean absolute distance to the exact operation, colours 0 to 1",
        "ours": round(statistics.mean(ours), 4),
        "reference": round(statistics.mean(plain), 4),
        "ratio": round(statistics.mean(plain) / statistics.mean(ours), 3),
    }
    print(json.dumps(result))


def _sheet(rows: list[list[Image.Image]], side_px: int = 192) -> Image.Image:
    sheet = Image.new("RGB", (side_px * len(rows[0]), side_px * len(rows)), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            small = image.copy()
            small.thumbnail((side_px, side_px))
            sheet.paste(small, (x * side_px, y * side_px))
    return sheet


if __name__ == "__main__":
    main()
