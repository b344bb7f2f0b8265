"""How each kind of thing is drawn.

Units: sides of the picture at size 1; origin at the middle of the foot, y upwards. A thing writes its own
regions: `region_of(thing, part)`.
"""

from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from mgie.tiny.world.paint import PALETTE, RGB, Painter, Point, mix, scaled, scattered
from mgie.tiny.world.scene import Kind, Scene, Thing

Part = Literal["body", "roof", "door", "window", "light", "hat", "smoke"]
PARTS: tuple[Part, ...] = get_args(Part)
FIRST_THING_REGION = 32  # below are the regions of the background
_REGIONS_PER_THING = 8

GLOW: RGB = (255, 206, 96)
_GLASS: RGB = (150, 190, 214)
_SNOW: RGB = (246, 248, 252)
_DARK: RGB = (38, 32, 32)
_WOOD: RGB = (112, 74, 46)
_TIRE: RGB = (34, 34, 38)
_SKINS: tuple[RGB, ...] = ((250, 212, 180), (224, 172, 130), (172, 118, 80), (116, 76, 52))


def region_of(thing: Thing, part: Part) -> int:
    """Number of a part's region, 32 to 255."""
    return FIRST_THING_REGION + thing.id * _REGIONS_PER_THING + PARTS.index(part)


def thing_of(regions: npt.NDArray[np.uint8]) -> npt.NDArray[np.intp]:
    """Ids of the things whose regions these are (32 to 255)."""
    return (regions.astype(np.intp) - FIRST_THING_REGION) // _REGIONS_PER_THING


def draw_thing(painter: Painter, thing: Thing, scene: Scene) -> None:
    """Draws a thing and its shadow."""
    painter.depth = {"water": 0.85, "back": 0.55, "middle": 0.25, "front": 0.0, "air": 0.4}[thing.row]
    painter.place(thing.x, thing.y, size=thing.size, is_flipped=thing.is_flipped, is_upright=True)
    if thing.kind in _SHADOWS:
        painter.region = 2  # a shadow is part of the ground
        painter.ellipse(0, 0.0, _SHADOWS[thing.kind], 0.018, (20, 24, 30), opacity=0.28)
    painter.region = region_of(thing, "body")
    _DRAWERS[thing.kind](painter, thing, scene)


def light_points(thing: Thing) -> list[tuple[Point, float]]:
    """Where a lit thing glows: middle and radius in sides of the picture."""
    size, turn = thing.size, -1 if thing.is_flipped else 1
    spots = {
        "house": [(-0.088, 0.105, 0.1), (0.088, 0.105, 0.1)],
        "lamp": [(0.0, 0.33, 0.17)],
        "car": [(0.17, 0.05, 0.1), (0.21, 0.045, 0.07)],
    }.get(thing.kind, [])
    return [((thing.x + turn * x * size, thing.y - y * size), radius * size) for x, y, radius in spots]


_SHADOWS: dict[Kind, float] = {
    "house": 0.19,
    "tree": 0.09,
    "pine": 0.08,
    "bush": 0.09,
    "lamp": 0.035,
    "car": 0.17,
    "ball": 0.07,
    "box": 0.09,
    "person": 0.06,
    "bench": 0.13,
    "tent": 0.15,
    "dog": 0.09,
}


def _house(p: Painter, t: Thing, scene: Scene) -> None:
    wall, roof, door = PALETTE[t.color], PALETTE[t.roof], PALETTE[t.door]
    brick = mix(roof, (150, 110, 96), 0.6)
    p.box(0.075, 0.2, 0.118, 0.318, brick)
    if t.has_smoke:
        p.region = region_of(t, "smoke")
        puffs = ((0.1, 0.335, 0.018), (0.112, 0.362, 0.023), (0.135, 0.392, 0.028), (0.168, 0.42, 0.031))
        for x, y, radius in puffs:
            p.disc(x, y, radius, (232, 232, 236), opacity=0.85)
        p.region = region_of(t, "body")
    p.box(-0.15, 0.185, 0.15, 0, wall)
    p.box(0.105, 0.185, 0.15, 0, scaled(wall, 0.88))
    for row in range(3):
        p.line([(-0.15, 0.04 + 0.055 * row), (0.15, 0.04 + 0.055 * row)], 0.003, scaled(wall, 0.86))
    p.region = region_of(t, "roof")
    is_flat = t.seed % 3 == 0
    ridge: list[Point] = [(0.105, 0.3), (-0.105, 0.3)] if is_flat else [(0.0, 0.322)]
    p.polygon([(-0.185, 0.18), (0.185, 0.18), *ridge], roof)
    if scene.season == "winter":  # the eaves are free: the roof's colour can be seen
        edge = 0.158 if is_flat else 0.133
        p.polygon([(-edge, 0.22), (edge, 0.22), *((x, y + 0.012) for x, y in ridge)], _SNOW)
    p.line([(-0.185, 0.181), (0.185, 0.181)], 0.01, scaled(roof, 0.72))
    p.region = region_of(t, "door")
    if t.is_open:
        p.box(-0.036, 0.122, 0.036, 0, (250, 214, 130) if t.is_lit else _DARK, shines=t.is_lit)
        p.polygon([(0.036, 0.122), (0.068, 0.112), (0.068, -0.012), (0.036, 0)], door)
    else:
        p.box(-0.042, 0.128, 0.042, 0, scaled(wall, 0.7))
        p.box(-0.035, 0.122, 0.035, 0, door)
        p.disc(0.022, 0.058, 0.006, (250, 226, 120))
    p.region = region_of(t, "window")
    for x in (-0.09, 0.09):
        p.box(x - 0.036, 0.142, x + 0.036, 0.068, (240, 238, 232))
        p.box(x - 0.03, 0.136, x + 0.03, 0.074, GLOW if t.is_lit else _GLASS, shines=t.is_lit)
        p.line([(x, 0.136), (x, 0.074)], 0.006, (240, 238, 232))
    p.region = region_of(t, "body")


LEAVES: dict[str, tuple[RGB, RGB, RGB]] = {
    "spring": ((134, 186, 84), (168, 208, 104), (244, 180, 204)),
    "summer": ((52, 122, 58), (74, 146, 66), (38, 100, 52)),
    "autumn": ((214, 112, 36), (232, 158, 48), (184, 70, 36)),
    "winter": (_SNOW, _SNOW, _SNOW),
}


def _tree(p: Painter, t: Thing, scene: Scene) -> None:  # noqa: ARG001
    p.polygon([(-0.02, 0), (0.02, 0), (0.012, 0.16), (-0.012, 0.16)], _WOOD)
    for x, y in ((-0.075, 0.25), (-0.03, 0.3), (0.03, 0.3), (0.075, 0.25)):
        p.line([(0, 0.1), (x * 0.6, 0.19), (x, y)], 0.009, _WOOD)
    if scene.season == "winter":
        for x, y in ((-0.075, 0.25), (-0.03, 0.3), (0.03, 0.3), (0.075, 0.25)):
            p.line([(x * 0.6, 0.198), (x, y + 0.008)], 0.006, _SNOW)
        return
    dark, light, spot = LEAVES[scene.season]
    for x, y, radius in ((-0.06, 0.2, 0.062), (0.06, 0.2, 0.062), (0, 0.19, 0.07), (0, 0.275, 0.07)):
        p.disc(x, y, radius, dark)
    for x, y, radius in ((-0.045, 0.225, 0.042), (0.04, 0.235, 0.04), (-0.01, 0.3, 0.036)):
        p.disc(x, y, radius, light)
    for x, y, _ in scattered(9, 7):
        p.disc(0.18 * x - 0.09, 0.15 + 0.17 * y, 0.012, spot)


def _pine(p: Painter, t: Thing, scene: Scene) -> None:  # noqa: ARG001
    p.box(-0.015, 0.06, 0.015, 0, _WOOD)
    needles: RGB = {"spring": (48, 120, 78), "summer": (30, 98, 66), "autumn": (42, 96, 62), "winter": (38, 88, 74)}[
        scene.season
    ]  # fmt: skip
    for number, (low, half, high) in enumerate(((0.045, 0.095, 0.19), (0.13, 0.075, 0.265), (0.21, 0.055, 0.345))):
        p.polygon([(-half, low), (half, low), (0, high)], scaled(needles, 1 + 0.12 * number))
        if scene.season == "winter":
            p.polygon(
                [(-half * 0.62, low + (high - low) * 0.38), (half * 0.62, low + (high - low) * 0.38), (0, high)], _SNOW
            )


def _bush(p: Painter, t: Thing, scene: Scene) -> None:  # noqa: ARG001
    dark, light, spot = LEAVES[scene.season]
    if scene.season == "winter":
        dark, light, spot = (52, 100, 78), (228, 234, 242), (228, 234, 242)
    for x, y, radius in ((-0.055, 0.04, 0.045), (0.055, 0.04, 0.045), (0, 0.058, 0.055)):
        p.disc(x, y, radius, dark)
    for x, y, radius in ((-0.04, 0.058, 0.025), (0.03, 0.072, 0.027)):
        p.disc(x, y, radius, light)
    for x, y, _ in scattered(6, 8):
        p.disc(0.16 * x - 0.08, 0.02 + 0.07 * y, 0.009, spot)


def _lamp(p: Painter, t: Thing, scene: Scene) -> None:  # noqa: ARG001
    post = (58, 60, 68)
    p.box(-0.022, 0.02, 0.022, 0, post)
    p.box(-0.008, 0.3, 0.008, 0, post)
    p.region = region_of(t, "light")
    p.polygon(
        [(-0.02, 0.3), (0.02, 0.3), (0.032, 0.36), (-0.032, 0.36)],
        GLOW if t.is_lit else (176, 184, 188),
        shines=t.is_lit,
    )
    if t.is_lit:
        p.ellipse(0, 0.328, 0.014, 0.02, (255, 244, 200), shines=True)
    p.region = region_of(t, "body")
    p.polygon([(-0.04, 0.358), (0.04, 0.358), (0, 0.388)], post)


def _fence(p: Painter, t: Thing, scene: Scene) -> None:
    color = PALETTE[t.color]
    p.box(-0.165, 0.045, 0.165, 0.028, scaled(color, 0.85))
    p.box(-0.165, 0.092, 0.165, 0.075, scaled(color, 0.85))
    for number in range(7):
        x = -0.15 + 0.05 * number
        p.polygon([(x - 0.014, 0), (x + 0.014, 0), (x + 0.014, 0.11), (x, 0.128), (x - 0.014, 0.11)], color)
        if scene.season == "winter":
            p.polygon([(x - 0.014, 0.11), (x + 0.014, 0.11), (x, 0.132)], _SNOW)


def _car(p: Painter, t: Thing, scene: Scene) -> None:  # noqa: ARG001
    color = PALETTE[t.color]
    p.polygon([(-0.1, 0.08), (0.075, 0.08), (0.035, 0.148), (-0.075, 0.148)], color)
    p.polygon([(-0.084, 0.085), (-0.026, 0.085), (-0.026, 0.136), (-0.066, 0.136)], _GLASS)
    p.polygon([(-0.014, 0.085), (0.056, 0.085), (0.028, 0.136), (-0.014, 0.136)], _GLASS)
    p.polygon([(-0.16, 0.03), (0.165, 0.03), (0.165, 0.066), (0.145, 0.086), (-0.14, 0.09), (-0.16, 0.08)], color)
    p.box(-0.16, 0.042, 0.165, 0.026, scaled(color, 0.7))
    p.line([(-0.02, 0.085), (-0.02, 0.04)], 0.004, scaled(color, 0.7))
    for x in (-0.095, 0.095):
        p.disc(x, 0.03, 0.033, _TIRE)
        p.disc(x, 0.03, 0.015, (196, 198, 202))
    p.region = region_of(t, "light")
    p.ellipse(0.157, 0.062, 0.011, 0.014, (255, 244, 190) if t.is_lit else (216, 218, 210), shines=t.is_lit)
    if t.is_lit:
        p.polygon([(0.165, 0.07), (0.165, 0.052), (0.29, 0.01), (0.29, 0.1)], (255, 236, 150), opacity=0.5, shines=True)
    p.region = region_of(t, "body")
    p.ellipse(-0.156, 0.068, 0.007, 0.011, (196, 30, 30))


def _ball(p: Painter, t: Thing, scene: Scene) -> None:  # noqa: ARG001
    color = PALETTE[t.color]
    p.disc(0, 0.075, 0.075, scaled(color, 0.86))
    p.disc(-0.008, 0.082, 0.062, color)
    stripe = (236, 72, 66) if t.color == "white" else (250, 248, 242)
    p.polygon([(-0.07, 0.088), (0.07, 0.088), (0.072, 0.066), (-0.072, 0.066)], stripe)
    p.disc(-0.026, 0.112, 0.014, (255, 255, 255), opacity=0.75)


def _box(p: Painter, t: Thing, scene: Scene) -> None:  # noqa: ARG001
    color = PALETTE[t.color]
    ribbon = (250, 214, 80) if t.color not in ("yellow", "white", "orange") else (206, 52, 60)
    p.polygon([(-0.08, 0.11), (0.05, 0.11), (0.085, 0.14), (-0.045, 0.14)], mix(color, (255, 255, 255), 0.25))
    p.polygon([(0.05, 0), (0.085, 0.03), (0.085, 0.14), (0.05, 0.11)], scaled(color, 0.7))
    p.box(-0.08, 0.11, 0.05, 0, color)
    p.box(-0.026, 0.11, -0.002, 0, ribbon)
    p.polygon([(-0.026, 0.11), (-0.002, 0.11), (0.033, 0.14), (0.009, 0.14)], ribbon)
    for x in (-0.012, 0.03):
        p.ellipse(x, 0.14, 0.02, 0.012, ribbon)


def _person(p: Painter, t: Thing, scene: Scene) -> None:  # noqa: ARG001
    color, skin = PALETTE[t.color], _SKINS[t.seed % len(_SKINS)]
    hair: RGB = ((62, 42, 30), (30, 26, 26), (204, 160, 84), (140, 70, 36))[t.seed // 7 % 4]
    trousers = (52, 58, 88) if t.color not in ("blue", "purple", "black") else (170, 148, 112)
    p.polygon([(-0.034, 0), (-0.008, 0), (-0.002, 0.1), (-0.034, 0.1)], trousers)
    p.polygon([(0.034, 0), (0.008, 0), (0.002, 0.1), (0.034, 0.1)], trousers)
    p.ellipse(-0.024, 0.006, 0.02, 0.009, _DARK)
    p.ellipse(0.024, 0.006, 0.02, 0.009, _DARK)
    p.line([(-0.036, 0.18), (-0.066, 0.105)], 0.024, scaled(color, 0.84))
    p.line([(0.036, 0.18), (0.066, 0.105)], 0.024, scaled(color, 0.84))
    p.disc(-0.068, 0.098, 0.012, skin)
    p.disc(0.068, 0.098, 0.012, skin)
    p.polygon([(-0.05, 0.082), (0.05, 0.082), (0.04, 0.19), (0.022, 0.2), (-0.022, 0.2), (-0.04, 0.19)], color)
    p.disc(0, 0.236, 0.042, hair)
    p.ellipse(0.004, 0.23, 0.034, 0.036, skin)
    for x in (-0.008, 0.018):
        p.disc(x, 0.236, 0.005, _DARK)
    p.line([(-0.004, 0.216), (0.014, 0.216)], 0.005, (176, 60, 60))
    if t.hat is not None:
        p.region = region_of(t, "hat")
        hat = PALETTE[t.hat]
        p.ellipse(0, 0.258, 0.064, 0.012, scaled(hat, 0.8))
        p.polygon([(-0.042, 0.258), (0.042, 0.258), (0.036, 0.31), (-0.036, 0.31)], hat)
        p.region = region_of(t, "body")


def _bench(p: Painter, t: Thing, scene: Scene) -> None:
    color = PALETTE[t.color]
    for x in (-0.105, 0.105):
        p.box(x - 0.01, 0.16, x + 0.01, 0, (66, 66, 72))
    for low in (0.095, 0.13):
        p.box(-0.13, low + 0.028, 0.13, low, color)
    p.polygon([(-0.13, 0.082), (0.13, 0.082), (0.145, 0.05), (-0.145, 0.05)], scaled(color, 0.86))
    if scene.season == "winter":
        p.box(-0.13, 0.168, 0.13, 0.156, _SNOW)


def _tent(p: Painter, t: Thing, scene: Scene) -> None:
    color = PALETTE[t.color]
    p.polygon([(-0.15, 0), (0.15, 0), (0.0, 0.21)], color)
    p.polygon([(0.05, 0), (0.15, 0), (0.0, 0.21)], scaled(color, 0.78))
    p.polygon([(-0.075, 0), (0.02, 0), (-0.008, 0.14)], scaled(color, 0.34))
    if scene.season == "winter":
        p.polygon([(-0.04, 0.155), (0.04, 0.155), (0, 0.214)], _SNOW)


def _dog(p: Painter, t: Thing, scene: Scene) -> None:  # noqa: ARG001
    color = PALETTE[t.color]
    dark = scaled(color, 0.75)
    p.line([(-0.07, 0.09), (-0.1, 0.135), (-0.094, 0.15)], 0.018, color)
    for x in (-0.06, -0.032, 0.03, 0.056):
        p.box(x - 0.011, 0.06, x + 0.011, 0, dark if x in (-0.032, 0.03) else color)
    p.ellipse(-0.005, 0.078, 0.08, 0.036, color)
    p.disc(0.072, 0.125, 0.038, color)
    p.ellipse(0.105, 0.114, 0.022, 0.016, color)
    p.disc(0.122, 0.119, 0.008, _DARK)
    p.polygon([(0.05, 0.156), (0.07, 0.15), (0.05, 0.1), (0.04, 0.11)], scaled(color, 0.6))
    p.disc(0.083, 0.134, 0.007, _DARK if t.color != "black" else (240, 240, 240))
    p.line([(0.045, 0.1), (0.062, 0.085)], 0.01, (214, 40, 44) if t.color != "orange" else (44, 98, 212))


def _balloon(p: Painter, t: Thing, scene: Scene) -> None:  # noqa: ARG001
    color = PALETTE[t.color]
    p.line([(-0.03, 0.062), (-0.022, 0.02)], 0.004, _WOOD)
    p.line([(0.03, 0.062), (0.022, 0.02)], 0.004, _WOOD)
    p.polygon([(-0.026, 0.032), (0.026, 0.032), (0.02, 0), (-0.02, 0)], _WOOD)
    body: list[Point] = [(-0.075, 0.13), (-0.03, 0.06), (0.03, 0.06), (0.075, 0.13)]
    p.polygon(body, color)
    p.disc(0, 0.15, 0.08, color)
    p.ellipse(0, 0.148, 0.032, 0.082, mix(color, (255, 255, 255), 0.55))


def _boat(p: Painter, t: Thing, scene: Scene) -> None:  # noqa: ARG001
    color = PALETTE[t.color]
    p.box(-0.006, 0.165, 0.004, 0.03, _WOOD)
    p.polygon([(0.01, 0.16), (0.01, 0.045), (0.085, 0.045)], (250, 248, 240))
    p.polygon([(-0.012, 0.15), (-0.012, 0.045), (-0.065, 0.045)], (226, 226, 222))
    p.polygon([(-0.1, 0.038), (0.1, 0.038), (0.07, 0), (-0.07, 0)], color)


_DRAWERS: dict[Kind, Callable[[Painter, Thing, Scene], None]] = {
    "house": _house,
    "tree": _tree,
    "pine": _pine,
    "bush": _bush,
    "lamp": _lamp,
    "fence": _fence,
    "car": _car,
    "ball": _ball,
    "box": _box,
    "person": _person,
    "bench": _bench,
    "tent": _tent,
    "dog": _dog,
    "balloon": _balloon,
    "boat": _boat,
}
