"""Scenes as plain records: what stands where, in which light, season and weather; sampling and changing them.

A scene says everything that decides its picture, so an edit is a changed scene, and what is not edited is drawn
alike to the pixel. Things stand in the columns of rows, at most one in each, so that "on the left" has one
meaning and every thing can be seen. Knows nothing of drawing or of words beyond the names of things.

Positions are fractions of the picture's side, x to the right and y downwards; a thing's position is the middle
of its foot, and its size 1 is what `KINDS` gives.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar, get_args

from numpy.random import Generator

T = TypeVar("T")

Color = Literal["red", "orange", "yellow", "green", "blue", "purple", "pink", "white", "black", "brown"]
Kind = Literal[
    "house", "tree", "pine", "bush", "lamp", "fence", "car", "ball", "box", "person", "bench", "tent", "dog", "balloon",
    "boat",
]  # fmt: skip
Row = Literal["back", "middle", "front", "air", "water"]
Place = Literal["left", "middle", "right"]
Time = Literal["day", "dusk", "night"]
Season = Literal["spring", "summer", "autumn", "winter"]
Weather = Literal["clear", "cloudy", "rain", "snow", "fog"]

COLORS: tuple[Color, ...] = get_args(Color)
TIMES: tuple[Time, ...] = get_args(Time)
SEASONS: tuple[Season, ...] = get_args(Season)
WEATHERS: tuple[Weather, ...] = get_args(Weather)

COLUMNS: dict[Row, tuple[float, ...]] = {
    "back": (0.19, 0.5, 0.81),
    "middle": (0.345, 0.655),
    "front": (0.17, 0.5, 0.83),
    "air": (0.15, 0.5, 0.85),
    "water": (0.13, 0.5, 0.87),
}
_HIDDEN_SUN_X = 0.8
_SIDE_COLUMN = 0.1  # how far from the middle a thing must stand to be "on the left" or "on the right"


@dataclass(frozen=True)
class KindTraits:
    """What all things of a kind share."""

    row: Row
    colors: tuple[Color, ...]
    can_shine: bool = False
    "windows, bulb or headlights"


_ANY: tuple[Color, ...] = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white", "black")
_ROOFS: tuple[Color, ...] = ("brown", "red", "black", "blue", "green", "purple")
_WALLS: tuple[Color, ...] = ("white", "yellow", "red", "blue", "pink", "green", "orange", "purple", "brown")

KINDS: dict[Kind, KindTraits] = {
    "house": KindTraits("back", _WALLS, can_shine=True),
    "tree": KindTraits("back", ("green",)),
    "pine": KindTraits("back", ("green",)),
    "bush": KindTraits("middle", ("green",)),
    "lamp": KindTraits("middle", ("black",), can_shine=True),
    "fence": KindTraits("middle", ("white", "brown", "red", "blue", "green", "black")),
    "car": KindTraits("front", _ANY, can_shine=True),
    "ball": KindTraits("front", _ANY),
    "box": KindTraits("front", _ANY),
    "person": KindTraits("front", _ANY),
    "bench": KindTraits("front", ("brown", "red", "green", "blue", "white", "yellow")),
    "tent": KindTraits("front", _ANY),
    "dog": KindTraits("front", ("brown", "black", "white", "orange")),
    "balloon": KindTraits("air", ("red", "orange", "yellow", "green", "blue", "purple", "pink")),
    "boat": KindTraits("water", ("red", "orange", "yellow", "green", "blue", "white", "brown")),
}
FRONT_KINDS: tuple[Kind, ...] = tuple(kind for kind, traits in KINDS.items() if traits.row == "front")


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One thing of a scene."""

    id: int
    "stable under edits; 0 to 24"
    kind: Kind
    color: Color
    "walls of a house, clothes of a person"
    x: float
    y: float
    size: float = 1.0
    seed: int = 0
    "decides what differs between things of a kind: shape of the roof, skin and hair"
    is_flipped: bool = False
    is_lit: bool = False
    roof: Color = "brown"
    door: Color = "brown"
    is_open: bool = False
    "whether the door is"
    has_smoke: bool = False
    "whether smoke rises from the chimney"
    hat: Color | None = None
    "what a person wears"

    @property
    def row(self) -> Row:
        """Where it stands in depth."""
        return KINDS[self.kind].row

    @property
    def place(self) -> Place:
        """Where it stands from left to right."""
        return place_at(self.x)


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Everything that decides a drawn picture."""

    seed: int
    "decides texture, noise, hills and clouds"
    time: Time
    season: Season
    weather: Weather
    horizon: float
    is_sandy: bool
    has_road: bool
    has_water: bool
    num_hills: int
    "0 to 2"
    num_clouds: int
    "in clear weather"
    sun_x: float
    has_rainbow: bool = False
    things: tuple[Thing, ...] = ()

    def of(self, *kinds: Kind) -> list[Thing]:
        """Things of these kinds, from left to right."""
        return sorted((thing for thing in self.things if thing.kind in kinds), key=lambda thing: thing.x)

    def in_row(self, row: Row) -> list[Thing]:
        """Things of a row, from left to right."""
        return sorted((thing for thing in self.things if thing.row == row), key=lambda thing: thing.x)

    def free_columns(self, row: Row) -> list[float]:
        """Columns in which nothing stands."""
        taken = {nearest_column(row, thing.x) for thing in self.in_row(row)}
        return [x for x in COLUMNS[row] if x not in taken]

    def foot(self, row: Row) -> float:
        """y at which things of a row stand."""
        shore = self.horizon + (0.15 if self.has_water else 0.08)
        return {"back": shore, "middle": 0.775, "front": 0.925, "air": 0.37, "water": self.horizon + 0.085}[row]

    def next_id(self) -> int:
        """An id that no thing has."""
        return 1 + max((thing.id for thing in self.things), default=-1)


def place_at(x: float) -> Place:
    """The word for a horizontal position."""
    return "left" if x < 0.5 - _SIDE_COLUMN else "right" if x > 0.5 + _SIDE_COLUMN else "middle"


def nearest_column(row: Row, x: float) -> float:
    """The column that a thing at x stands in."""
    return min(COLUMNS[row], key=lambda column: abs(column - x))


def with_thing(scene: Scene, thing: Thing) -> Scene:
    """The scene with one thing more."""
    return replace(scene, things=(*scene.things, thing))


def without(scene: Scene, *things: Thing) -> Scene:
    """The scene without some of its things."""
    gone = {thing.id for thing in things}
    return replace(scene, things=tuple(thing for thing in scene.things if thing.id not in gone))


def changed(scene: Scene, *things: Thing) -> Scene:
    """The scene with things in place of those of the same ids."""
    new = {thing.id: thing for thing in things}
    return replace(scene, things=tuple(new.get(thing.id, thing) for thing in scene.things))


def lit(scene: Scene, *, is_lit: bool, kinds: tuple[Kind, ...] = ("house", "lamp")) -> Scene:
    """The scene with all its lights of these kinds on or off."""
    return changed(scene, *(replace(thing, is_lit=is_lit) for thing in scene.of(*kinds)))


# ---- sampling


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What a sampled scene must have; None and empty = anything."""

    time: Time | None = None
    season: Season | None = None
    weather: Weather | None = None
    num_front: int | None = None
    needs: tuple[Kind, ...] = ()
    "kinds of which there is at least one"


ANYTHING = Wish()


def pick(rng: Generator, options: Sequence[T], weights: Sequence[float] | None = None) -> T:
    """One of the options."""
    if weights is None:
        return options[int(rng.integers(len(options)))]
    aim, total = rng.random() * sum(weights), 0.0
    for option, weight in zip(options, weights, strict=True):
        total += weight
        if aim < total:
            return option
    return options[-1]


def sample_scene(rng: Generator, wish: Wish = ANYTHING) -> Scene:
    """A scene that fulfils a wish."""
    time = pick(rng, TIMES, (0.68, 0.14, 0.18)) if wish.time is None else wish.time
    season = pick(rng, SEASONS, (0.2, 0.4, 0.2, 0.2)) if wish.season is None else wish.season
    weathers = (0.62, 0.12, 0.0 if season == "winter" else 0.1, 0.1 if season == "winter" else 0.02, 0.07)
    weather = pick(rng, WEATHERS, weathers) if wish.weather is None else wish.weather
    has_water = "boat" in wish.needs or rng.random() < 0.28
    scene = Scene(
        seed=int(rng.integers(2**31)),
        time=time,
        season=season,
        weather=weather,
        horizon=float(rng.uniform(0.47, 0.56)),
        is_sandy=bool(rng.random() < 0.15),
        has_road=bool(rng.random() < 0.4),
        has_water=has_water,
        num_hills=int(rng.integers(3)),
        num_clouds=int(rng.integers(4)),
        sun_x=float(rng.uniform(0.12, 0.88)),
    )
    if scene.weather != "clear":  # what clouds hide is always the same: where they go, a model knows what comes
        scene = replace(scene, num_clouds=0, sun_x=_HIDDEN_SUN_X)
    for kind in _sampled_kinds(rng, scene, wish):
        scene = place_thing(rng, scene, kind)
    return scene


def _sampled_kinds(rng: Generator, scene: Scene, wish: Wish) -> list[Kind]:
    """Kinds of the things of a scene, those that are wished first; a row holds as many as it has columns."""
    kinds: list[Kind] = list(wish.needs)
    if "house" not in kinds and rng.random() < 0.85:
        kinds.append("house")
    back: tuple[Kind, ...] = ("tree", "pine", "house")
    kinds += [pick(rng, back, (0.5, 0.35, 0.15)) for _ in range(2) if rng.random() < 0.62]
    middle: tuple[Kind, ...] = ("lamp", "fence", "bush")
    kinds += [pick(rng, middle, (0.42, 0.33, 0.25)) for _ in range(2) if rng.random() < 0.5]
    num_front = int(rng.integers(1, 4)) if wish.num_front is None else wish.num_front
    num_wished = sum(KINDS[kind].row == "front" for kind in kinds)
    kinds += [pick(rng, FRONT_KINDS) for _ in range(num_front - num_wished)]
    if rng.random() < 0.16:
        kinds.append("balloon")
    if scene.has_water and rng.random() < 0.5:
        kinds.append("boat")
    return kinds


def place_thing(rng: Generator, scene: Scene, kind: Kind) -> Scene:
    """The scene with a thing more in a free column of its row, or unchanged where there is none."""
    row = KINDS[kind].row
    free = scene.free_columns(row)
    if row == "water":  # a boat behind a house would not be seen
        hidden = {place_at(thing.x) for thing in scene.in_row("back")}
        free = [x for x in free if place_at(x) not in hidden] or free
    if not free or len(scene.things) > 20:
        return scene
    thing = new_thing(scene, kind, pick(rng, KINDS[kind].colors), pick(rng, free), seed=int(rng.integers(2**31)))
    thing = replace(
        thing,
        x=thing.x + float(rng.uniform(-0.03, 0.03)),
        y=thing.y + float(rng.uniform(-0.012, 0.012)),
        size=float(rng.uniform(0.88, 1.12)),
        is_flipped=bool(rng.random() < 0.5),
        is_lit=KINDS[kind].can_shine and kind != "car" and scene.time != "day" and bool(rng.random() < 0.65),
    )
    if kind == "house":
        roofs = tuple(color for color in _ROOFS if color != thing.color)
        doors = tuple(color for color in COLORS if color not in (thing.color, "black"))
        thing = replace(thing, roof=pick(rng, roofs), door=pick(rng, doors), is_open=bool(rng.random() < 0.2))
        thing = replace(thing, has_smoke=bool(rng.random() < 0.2))
    if kind == "person" and rng.random() < 0.3:
        thing = replace(thing, hat=pick(rng, tuple(color for color in _ANY if color != thing.color)))
    return with_thing(scene, thing)


def new_thing(scene: Scene, kind: Kind, color: Color, x: float, *, seed: int = 0) -> Thing:
    """A thing as edits add it: of plain size and looks, in the middle of its place, lit after nightfall."""
    row = KINDS[kind].row
    is_lit = scene.time == "night" and kind in ("house", "lamp")
    return Thing(id=scene.next_id(), kind=kind, color=color, x=x, y=scene.foot(row), seed=seed, is_lit=is_lit)
