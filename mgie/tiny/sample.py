"""A small raw data set made by code: drawn scenes and simple edits of them, in the IPr2Pr layout of folders.

What the jobs run on when they are given nothing else, and what tests read. The same arguments give the same
bytes for the same version of Pillow. Knows nothing of readers.
"""

import io
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image, ImageDraw, ImageEnhance, ImageOps

from mgie.config import check_range

SIDE_PX = 128
_QUALITY = 90
_SEEDS_PER_FOLDER = 2
_NUM_STARS = 14

_HOUSES = {"red": (196, 62, 52), "blue": (60, 96, 190), "yellow": (226, 188, 72), "white": (232, 228, 220)}
_SKIES = ((150, 200, 240), (178, 214, 232), (134, 182, 222))
_GROUNDS = ((96, 152, 80), (124, 158, 86), (150, 140, 96))


@dataclass(frozen=True)
class _Scene:
    """What is drawn: a house and perhaps trees and a sun, on a plain. Positions in pixels."""

    sky: tuple[int, int, int]
    ground: tuple[int, int, int]
    horizon: int
    house: str
    house_x: int
    trees: tuple[int, ...]
    sun_x: int | None
    is_night: bool = False
    has_snow: bool = False
    star_seed: int = 0


@dataclass(frozen=True)
class _Edit:
    instruction: str
    result: str
    "how the caption goes on"
    change: Callable[[_Scene], _Scene] = lambda scene: scene
    "what is drawn otherwise"
    filter: Callable[[Image.Image], Image.Image] = lambda image: image
    "what is done to the picture"


def _sepia(image: Image.Image) -> Image.Image:
    return ImageOps.colorize(ImageOps.grayscale(image), black=(38, 24, 12), white=(255, 236, 200))


_EDITS = (
    _Edit("make it night", "at night", change=lambda s: replace(s, is_night=True)),
    _Edit("make it brighter", "in bright light", filter=lambda i: ImageEnhance.Brightness(i).enhance(1.35)),
    _Edit("make it darker", "in dim light", filter=lambda i: ImageEnhance.Brightness(i).enhance(0.55)),
    _Edit("turn it into a black and white photo", "in black and white", filter=lambda i: i.convert("L").convert("RGB")),
    _Edit("give it a sepia tone", "in sepia", filter=_sepia),
    _Edit("paint the house green", "with a green house", change=lambda s: replace(s, house="green")),
    _Edit("remove the trees", "without trees", change=lambda s: replace(s, trees=())),
    _Edit("cover the ground with snow", "in the snow", change=lambda s: replace(s, has_snow=True)),
    _Edit("take the sun away", "without a sun", change=lambda s: replace(s, sun_x=None)),
    _Edit("add another tree", "with one more tree", change=lambda s: replace(s, trees=(*s.trees, SIDE_PX - 14))),
    _Edit("flip the picture", "seen in a mirror", filter=ImageOps.mirror),
    _Edit("boost the colors", "in vivid colors", filter=lambda i: ImageEnhance.Color(i).enhance(2.2)),
)


def write_sample(folder: Path, num_rows: int = 24, seed: int = 0) -> None:
    """Writes `num_rows` pairs of 128 px JPEGs with instructions and captions, two per folder, and `seeds.json`.

    Rows have different scenes; instructions repeat after 24.

    Args:
        folder: Made if it is not there. Files of the same names are replaced.
        num_rows: At least 1. seed: Another one gives other scenes.

    Raises:
        ConfigError: `num_rows` is out of range.
    """
    check_range("num_rows", num_rows, 1, 10_000_000)
    listed: list[tuple[str, list[str]]] = []
    for number in range((num_rows + _SEEDS_PER_FOLDER - 1) // _SEEDS_PER_FOLDER):
        edit = _EDITS[number % len(_EDITS)]
        rng = random.Random(f"{seed}/{number}")  # noqa: S311  # scenes, not secrets
        house = rng.choice(sorted(_HOUSES))
        name = f"{number:07d}"
        seeds = [str(rng.randrange(10**9)) for _ in range(min(_SEEDS_PER_FOLDER, num_rows - 2 * number))]
        target = folder / name
        target.mkdir(parents=True, exist_ok=True)
        caption = f"a {house} house in a meadow"
        prompt = {"caption": caption, "edit": edit.instruction, "output": f"{caption}, {edit.result}"}
        (target / "prompt.json").write_text(json.dumps(prompt) + "\n", encoding="utf-8")
        with (target / "metadata.jsonl").open("w", encoding="utf-8") as metadata:
            for one in seeds:
                scene = _scene(rng, house)
                (target / f"{one}_0.jpg").write_bytes(_jpeg(_draw(scene)))
                (target / f"{one}_1.jpg").write_bytes(_jpeg(edit.filter(_draw(edit.change(scene)))))
                metadata.write(json.dumps({"seed": int(one), "made_by": "mgie.tiny.sample"}) + "\n")
        listed.append((name, seeds))
    (folder / "seeds.json").write_text(json.dumps(listed) + "\n", encoding="utf-8")


def _scene(rng: random.Random, house: str) -> _Scene:
    return _Scene(
        sky=_jitter(rng, rng.choice(_SKIES)),
        ground=_jitter(rng, rng.choice(_GROUNDS)),
        horizon=rng.randint(66, 88),
        house=house,
        house_x=rng.randint(34, 66),
        trees=tuple(rng.sample((4, 14, 24, 100), rng.randint(1, 3))),
        sun_x=rng.randint(16, 112),
        star_seed=rng.randrange(10**9),
    )


def _jitter(rng: random.Random, color: tuple[int, int, int]) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, value + rng.randint(-18, 18))) for value in color)
    return red, green, blue


def _draw(scene: _Scene) -> Image.Image:
    image = Image.new("RGB", (SIDE_PX, SIDE_PX), scene.sky)
    draw = ImageDraw.Draw(image)
    if scene.sun_x is not None:
        draw.ellipse((scene.sun_x - 10, 10, scene.sun_x + 10, 30), fill=(252, 226, 110))
    draw.rectangle((0, scene.horizon, SIDE_PX, SIDE_PX), fill=(240, 244, 248) if scene.has_snow else scene.ground)
    for x in scene.trees:
        draw.rectangle((x + 3, scene.horizon - 6, x + 6, scene.horizon + 10), fill=(98, 66, 40))
        draw.ellipse((x - 4, scene.horizon - 30, x + 13, scene.horizon - 4), fill=(46, 106, 58))
    x, top = scene.house_x, scene.horizon - 18
    wall = {**_HOUSES, "green": (58, 140, 74)}[scene.house]
    draw.rectangle((x, top, x + 40, top + 38), fill=wall)
    draw.polygon([(x - 5, top), (x + 20, top - 20), (x + 45, top)], fill=(112, 60, 48))
    draw.rectangle((x + 16, top + 18, x + 26, top + 38), fill=(84, 58, 40))
    for window in (x + 5, x + 29):
        draw.rectangle((window, top + 8, window + 7, top + 16), fill=(206, 226, 240))
    if scene.is_night:
        _make_night(image, scene)
    return image


def _make_night(image: Image.Image, scene: _Scene) -> None:
    """In place: dark and blue, with stars and lit windows."""
    image.paste(
        Image.blend(ImageEnhance.Brightness(image).enhance(0.35), Image.new("RGB", image.size, (8, 12, 48)), 0.4)
    )
    draw = ImageDraw.Draw(image)
    rng = random.Random(scene.star_seed)  # noqa: S311
    for _ in range(_NUM_STARS):
        draw.point((rng.randrange(SIDE_PX), rng.randrange(scene.horizon - 40)), fill=(250, 250, 230))
    top = scene.horizon - 18
    for window in (scene.house_x + 5, scene.house_x + 29):
        draw.rectangle((window, top + 8, window + 7, top + 16), fill=(250, 214, 120))


def _jpeg(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, format="jpeg", quality=_QUALITY)
    return out.getvalue()
