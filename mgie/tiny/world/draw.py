"""Drawing a scene: sky, land, things, weather, glow and grain; and the map of which pixel shows what.

What is drawn at random comes from the scene's own seed or from a fixed pattern, never from what was drawn before, so
a change in one place leaves all other pixels as they are. Sides are free: a scene looks alike at any.
"""

import math

import numpy as np
import numpy.typing as npt

from mgie.tiny.world.paint import (
    RGB,
    Light,
    Painter,
    Pixels,
    Point,
    add_glow,
    light_of,
    mix,
    scaled,
    scattered,
    smooth_noise,
)
from mgie.tiny.world.scene import Scene
from mgie.tiny.world.things import GLOW, draw_thing, light_points

SKY, HILLS, GROUND, WATER, SUN, CLOUD = 0, 1, 2, 3, 4, 5
"Regions of the background; from `things.FIRST_THING_REGION` on, those of things."

_SKIES: dict[str, tuple[RGB, RGB]] = {  # top, bottom
    "day": ((92, 164, 232), (190, 222, 244)),
    "dusk": ((92, 74, 140), (252, 164, 96)),
    "night": ((8, 12, 36), (32, 42, 86)),
}
_OVERCAST: dict[str, tuple[RGB, RGB]] = {
    "day": ((148, 156, 166), (198, 204, 208)),
    "dusk": ((104, 88, 106), (188, 140, 124)),
    "night": ((16, 18, 28), (44, 48, 62)),
}
_GRASS: dict[str, RGB] = {
    "spring": (142, 200, 88),
    "summer": (112, 170, 72),
    "autumn": (172, 152, 78),
    "winter": (238, 242, 248),
}
_SAND: RGB = (226, 204, 150)
_HILLS: dict[str, RGB] = {
    "spring": (116, 172, 112),
    "summer": (86, 144, 96),
    "autumn": (164, 118, 76),
    "winter": (208, 218, 230),
}
_NUM_SKY_BANDS = 40


def draw_scene(scene: Scene, side_px: int) -> Pixels:
    """The picture of a scene, [side_px, side_px, 3]."""
    light = light_of(scene.time, scene.weather)
    painter = Painter(side_px, "picture", light)
    _draw_all(painter, scene)
    painter.place(0, 0)
    _draw_fall(painter, scene)
    pixels = painter.pixels()
    texture = np.random.default_rng([scene.seed, 1])
    land = np.clip((np.arange(side_px, dtype=np.float32) / side_px - scene.horizon + 0.02) * 40, 0, 1)
    noise = smooth_noise(texture, side_px, (6, 18, 54))
    pixels *= 1 + noise[..., None] * (0.012 + 0.033 * land)[:, None, None]
    for thing in scene.things:
        if thing.is_lit:
            strength = {"day": 0.12, "dusk": 0.3, "night": 0.42}[scene.time]
            for middle, radius in light_points(thing):
                add_glow(pixels, middle, radius, GLOW, strength)
    pixels += texture.standard_normal((side_px, side_px, 1), dtype=np.float32) * 0.009
    return to_bytes(pixels)


def draw_regions(scene: Scene, side_px: int) -> Pixels:
    """Which region each pixel of a scene shows, [side_px, side_px]; rain, snow and glow are no regions."""
    painter = Painter(side_px, "regions", Light())
    _draw_all(painter, scene)
    return painter.regions()


def to_bytes(pixels: npt.NDArray[np.float32]) -> Pixels:
    """0 to 1 -> 0 to 255, cut off and rounded."""
    return (np.clip(pixels, 0, 1) * 255 + 0.5).astype(np.uint8)


def _draw_all(painter: Painter, scene: Scene) -> None:
    _draw_sky(painter, scene)
    _draw_land(painter, scene)
    for thing in sorted(scene.things, key=lambda thing: (thing.row == "air", thing.y, thing.id)):
        draw_thing(painter, thing, scene)


def _draw_sky(p: Painter, scene: Scene) -> None:
    p.region, p.depth = SKY, 0.6
    top, bottom = (_SKIES if scene.weather == "clear" else _OVERCAST)[scene.time]
    height = (scene.horizon + 0.02) / _NUM_SKY_BANDS
    for band in range(_NUM_SKY_BANDS):
        p.box(
            0, band * height, 1, (band + 1) * height + 0.01, mix(top, bottom, band / (_NUM_SKY_BANDS - 1)), shines=True
        )
    is_clear = scene.weather == "clear"
    if scene.time == "night" and is_clear:
        for x, y, size in scattered(46, 1):
            p.disc(x, y * scene.horizon, 0.0035 + 0.0035 * size, (248, 246, 222), shines=True)
    if is_clear:
        p.region = SUN
        _draw_sun(p, scene)
    if scene.has_rainbow:
        p.region = CLOUD
        bows: tuple[RGB, ...] = (
            (226, 60, 60),
            (244, 152, 44),
            (250, 226, 72),
            (84, 186, 92),
            (60, 124, 220),
            (136, 76, 184),
        )
        for number, color in enumerate(bows):
            radius = 0.44 - 0.019 * number
            angles = [step / 32 * math.pi for step in range(33)]
            arc = [(0.5 + radius * math.cos(a), scene.horizon - radius * math.sin(a)) for a in angles]
            p.line(arc, 0.021, color, opacity=0.72, shines=True)
    p.region = CLOUD
    if is_clear:
        for number, (x, y) in enumerate(
            np.random.default_rng([scene.seed, 2]).uniform(0.2, 0.8, (scene.num_clouds, 2))
        ):
            _draw_cloud(p, scene, (number + float(x)) / scene.num_clouds, 0.02 + 0.25 * float(y))
    else:
        for number, (x, y, _) in enumerate(scattered(5, 2)):
            _draw_cloud(p, scene, (number + x) / 5, 0.06 + 0.16 * y)


def _draw_sun(p: Painter, scene: Scene) -> None:
    x = scene.sun_x
    if scene.time == "day":
        for radius, opacity in ((0.105, 0.16), (0.085, 0.25)):
            p.disc(x, 0.13, radius, (255, 240, 170), opacity=opacity, shines=True)
        p.disc(x, 0.13, 0.062, (255, 228, 92), shines=True)
    elif scene.time == "dusk":
        for radius, opacity in ((0.15, 0.18), (0.115, 0.25)):
            p.disc(x, scene.horizon - 0.06, radius, (255, 196, 110), opacity=opacity, shines=True)
        p.disc(x, scene.horizon - 0.06, 0.08, (255, 130, 66), shines=True)
    else:
        p.disc(x, 0.13, 0.055, (246, 242, 214), shines=True)
        p.disc(x - 0.018, 0.118, 0.012, (222, 216, 188), shines=True)
        p.disc(x + 0.018, 0.146, 0.009, (222, 216, 188), shines=True)


def _draw_cloud(p: Painter, scene: Scene, x: float, y: float) -> None:
    clear: dict[str, RGB] = {"day": (252, 252, 254), "dusk": (252, 190, 166), "night": (58, 66, 100)}
    heavy: dict[str, RGB] = {"day": (170, 176, 184), "dusk": (146, 112, 116), "night": (34, 36, 48)}
    color = (clear if scene.weather == "clear" else heavy)[scene.time]
    width = 1.0 if scene.weather == "clear" else 1.9
    for dx, dy, radius in ((-0.06, 0.012, 0.034), (0.06, 0.014, 0.032), (-0.02, -0.012, 0.046), (0.03, -0.004, 0.04)):
        p.ellipse(x + dx * width, y + dy, radius * width, radius, color, opacity=0.92, shines=True)
    p.ellipse(x, y + 0.024, 0.09 * width, 0.022, scaled(color, 0.93), opacity=0.92, shines=True)


def _draw_land(p: Painter, scene: Scene) -> None:
    rng = np.random.default_rng([scene.seed, 3])
    p.region = HILLS
    for number in range(scene.num_hills):
        p.depth = 1 - 0.15 * number
        phase, waves = rng.uniform(0, 6.3), rng.uniform(0.8, 1.6)
        height = 0.15 - 0.06 * number
        ridge: list[Point] = [
            (x / 24, scene.horizon - height * (0.55 + 0.45 * math.sin(waves * x / 24 * 6.3 + phase))) for x in range(25)
        ]
        far = mix(_HILLS[scene.season], (140, 170, 205), 0.45 - 0.3 * number)
        p.polygon([*ridge, (1, scene.horizon + 0.05), (0, scene.horizon + 0.05)], far)
    p.region = GROUND
    grass = _SAND if scene.is_sandy else _GRASS[scene.season]
    if scene.weather == "snow" or scene.season == "winter":
        grass = mix(grass, _GRASS["winter"], 0.75)  # not all: what lies under the snow can be seen
    shore = scene.horizon
    if scene.has_water:
        _draw_water(p, scene)
        p.region = GROUND
        shore += 0.105
    num_bands = 6
    for band in range(num_bands):
        p.depth = 0.9 * (1 - band / (num_bands - 1))
        top = shore + (1 - shore) * band / num_bands
        p.box(0, top, 1, 1.01, scaled(grass, 1.03 - 0.1 * band / num_bands))
    if scene.season in ("spring", "autumn") and not scene.is_sandy:
        spots: tuple[RGB, ...] = (
            ((250, 250, 240), (250, 220, 90), (240, 150, 190))
            if scene.season == "spring"
            else ((206, 96, 34), (226, 160, 50))
        )
        p.depth = 0.2
        for x, nearness, chance in scattered(46, 3):
            y = shore + 0.08 + (0.92 - shore) * nearness
            p.disc(x, y, 0.003 + 0.006 * (y - shore), spots[int(chance * len(spots))])
    if scene.has_road:
        p.depth = 0.05
        is_white = scene.season == "winter" or scene.weather == "snow"
        p.box(0, 0.84, 1, 0.97, (176, 182, 192) if is_white else (122, 122, 128))
        for number in range(6):
            p.box(number / 5 - 0.06, 0.899, number / 5 + 0.04, 0.911, (236, 232, 214))


def _draw_water(p: Painter, scene: Scene) -> None:
    p.region, p.depth = WATER, 0.8
    is_frozen = scene.season == "winter"
    water: RGB = (188, 214, 232) if is_frozen else (62, 128, 188)
    p.box(0, scene.horizon, 1, scene.horizon + 0.12, water)
    tint = mix(water, (255, 255, 255), 0.45)
    for x, y, _ in scattered(14, 4):
        top = scene.horizon + 0.012 + 0.088 * y
        p.box(0.95 * x, top, 0.95 * x + 0.07, top + 0.005, tint)


def _draw_fall(p: Painter, scene: Scene) -> None:
    """Rain or snow that falls, over everything."""
    p.depth = 0.0
    if scene.weather == "rain":
        color: RGB = (206, 216, 232) if scene.time != "night" else (120, 132, 164)
        for across, down, _ in scattered(130, 5):
            x, y = 1.05 * across, 1.05 * down - 0.05
            p.line([(x, y), (x - 0.018, y + 0.06)], 0.004, color, opacity=0.48, shines=True)
    elif scene.weather == "snow":
        color = (255, 255, 255) if scene.time != "night" else (186, 194, 216)
        for x, y, size in scattered(150, 6):
            p.disc(x, y, 0.0045 + 0.006 * size, color, opacity=0.9, shines=True)
