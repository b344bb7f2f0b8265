"""Edits as records, and how each change of a picture makes one.

An edit holds the records of source and goal, so the goal is exact, or a filter that makes it from the source's
pixels. Its `slots` are what its words need, its `action` says in canonical words what really happens, whatever the
instruction said. A change gives None where it changes nothing, or where words cannot tell what is meant. Knows nothing of how
pictures are chosen, or of wordings.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from numpy.random import Generator

from mgie.tiny.world.filters import Filter, FilterName
from mgie.tiny.world.nouns import (
    NOUNS,
    PLACES,
    described,
    full_reference,
    is_unique,
    listed,
    reference,
    references,
    with_article,
)
from mgie.tiny.world.photos import Photo
from mgie.tiny.world.scene import (
    KINDS,
    Color,
    Kind,
    Scene,
    Season,
    Thing,
    Time,
    Weather,
    changed,
    lit,
    nearest_column,
    place_at,
    with_thing,
    without,
)

Picture = Scene | Photo
Slots = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Edit:
    """A picture and its change."""

    operation: str
    source: Picture
    goal: Picture
    slots: Mapping[str, str] = field(default_factory=dict)
    target: str = ""
    "kind of what is changed, or what it becomes: with the operation, all that an instruction can ask for"
    combination: str = ""
    "what splits hold out together"
    spoil: Filter | None = None
    "done to the source only: what the edit then mends"
    filter: Filter | None = None
    "makes the goal from the source's pixels"
    ambiguity: str = ""
    "name of the ambiguity; empty for an instruction that says all"

    @property
    def action(self) -> str:
        """What really happens, in canonical words."""
        return f"{self.operation} {self.target}".strip()


# ---- things


def recolored(rng: Generator, scene: Scene, thing: Thing, color: Color) -> Edit | None:
    """A thing gets a colour."""
    if color == thing.color or not references(scene, thing):
        return None
    slots = {**thing_slots(rng, scene, thing), "old": thing.color, "color": color}
    return Edit(
        operation="recolor",
        source=scene,
        goal=changed(scene, replace(thing, color=color)),
        slots=slots,
        target=f"{thing.kind} {color}",
        combination=f"recolor {thing.kind} {color}",
    )


def thing_slots(rng: Generator, scene: Scene, thing: Thing) -> Slots:
    """How a thing is called: `the` in instructions, `full` where nothing may stay open, `name` for the kind."""
    return {
        "the": reference(rng, scene, thing),
        "full": full_reference(scene, thing),
        "name": NOUNS[thing.kind],
        "place": PLACES[thing.place],
    }


def removed(rng: Generator, scene: Scene, thing: Thing) -> Edit | None:
    """A thing goes."""
    if not references(scene, thing):
        return None
    target = thing.kind if is_unique(scene, thing) else f"{thing.color} {thing.kind}"
    slots = {**thing_slots(rng, scene, thing), "behind": _BEHIND[thing.row]}
    return Edit(operation="remove", source=scene, goal=without(scene, thing), slots=slots, target=target)


_BEHIND = {"back": "landscape", "middle": "ground", "front": "ground", "air": "sky", "water": "water"}


def duplicated(rng: Generator, scene: Scene, thing: Thing) -> Edit | None:
    """A second thing of the same kind and colour, in the nearest free place of its row."""
    free = scene.free_columns(thing.row)
    if not free or not references(scene, thing):
        return None
    x = min(free, key=lambda column: abs(column - thing.x))
    twin = replace(thing, id=scene.next_id(), x=x, y=scene.foot(thing.row))
    slots = {**thing_slots(rng, scene, thing), "place": PLACES[twin.place]}
    slots["same"] = with_article(described(thing.kind, thing.color))
    return Edit(operation="duplicate", source=scene, goal=with_thing(scene, twin), slots=slots, target=thing.kind)


def moved(rng: Generator, scene: Scene, thing: Thing, x: float) -> Edit | None:
    """A thing goes to another place of its row."""
    if not references(scene, thing) or place_at(x) == thing.place:
        return None
    goal = changed(scene, replace(thing, x=x, y=scene.foot(thing.row)))
    place = place_at(x)
    slots = {**thing_slots(rng, scene, thing), "where": f"to the {place}", "there": PLACES[place]}
    target = f"{thing.kind} {place}"
    return Edit(operation="move", source=scene, goal=goal, slots=slots, target=target, combination=f"move {target}")


def resized(rng: Generator, scene: Scene, thing: Thing, *, is_larger: bool) -> Edit | None:
    """A thing grows by half or shrinks to less than two thirds."""
    if not references(scene, thing):
        return None
    factor = 1.5 if is_larger else 0.62
    if thing.row == "front" and thing.kind in ("car", "tent", "bench") and is_larger:
        factor = 1.35  # wide things would reach into the next column
    return Edit(
        operation="enlarge" if is_larger else "shrink",
        source=scene,
        goal=changed(scene, replace(thing, size=thing.size * factor)),
        slots=thing_slots(rng, scene, thing),
        target=thing.kind,
    )


def pair_slots(rng: Generator, scene: Scene, first: Thing, second: Thing) -> Slots:
    """How two things are called."""
    return {
        **thing_slots(rng, scene, first),
        "other": reference(rng, scene, second),
        "full_other": full_reference(scene, second),
    }


def swapped_places(rng: Generator, scene: Scene, first: Thing, second: Thing) -> Edit | None:
    """Two things of a row change places."""
    if not (references(scene, first) and references(scene, second)):
        return None
    if described(first.kind, first.color) == described(second.kind, second.color):
        return None
    ends = [replace(one, x=nearest_column(one.row, other.x)) for one, other in ((first, second), (second, first))]
    target = " ".join(sorted((first.kind, second.kind)))
    slots = pair_slots(rng, scene, first, second)
    return Edit(operation="swap_places", source=scene, goal=changed(scene, *ends), slots=slots, target=target)


def swapped_colors(rng: Generator, scene: Scene, first: Thing, second: Thing) -> Edit | None:
    """Two things change colours."""
    if not (references(scene, first) and references(scene, second)) or first.color == second.color:
        return None
    if second.color not in KINDS[first.kind].colors or first.color not in KINDS[second.kind].colors:
        return None
    goal = changed(scene, replace(first, color=second.color), replace(second, color=first.color))
    slots = {**pair_slots(rng, scene, first, second), "old": first.color, "color": second.color}
    target = " ".join(sorted((first.kind, second.kind)))
    return Edit(operation="swap_colors", source=scene, goal=goal, slots=slots, target=target)


# ---- optimisation of photos


def mended(picture: Picture, operation: str, spoil: Filter) -> Edit:
    """The source is spoiled, the goal is the picture as it was."""
    faults: dict[FilterName, tuple[str, str]] = {
        "darker": ("too dark", "brighter"),
        "brighter": ("too bright", "darker"),
        "warmer": ("too yellow", "cooler"),
        "cooler": ("too blue", "warmer"),
        "less_saturation": ("too pale", "more colourful"),
        "noise": ("grainy", "clean and free of noise"),
    }
    fault, remedy = faults[spoil.name]
    return Edit(
        operation=operation,
        source=picture,
        goal=picture,
        slots={"fault": fault, "remedy": remedy},
        target=remedy,
        spoil=spoil,
    )


# ---- light, season, weather, states


def with_time(scene: Scene, time: Time) -> Scene:
    """Another hour; lights go on as it gets dark and off by day."""
    return lit(replace(scene, time=time), is_lit=time != "day")


def timed(scene: Scene, time: Time) -> Edit | None:
    """Another hour."""
    if scene.time == time:
        return None
    return Edit(operation=time, source=scene, goal=with_time(scene, time), slots={"was": scene.time})


def seasoned(scene: Scene, season: Season) -> Edit | None:
    """Another season."""
    if scene.season == season:
        return None
    return Edit(operation=season, source=scene, goal=replace(scene, season=season), slots={"was": scene.season})


def weathered(scene: Scene, weather: Weather) -> Edit | None:
    """Another weather; a rainbow stays only in the sun."""
    if scene.weather == weather:
        return None
    return Edit(
        operation=weather,
        source=scene,
        goal=replace(scene, weather=weather),
        slots={"was": weather_name(scene.weather)},
    )


def weather_name(weather: Weather) -> str:
    """The operation as a noun."""
    names = {"clear": "clear sky", "cloudy": "grey clouds", "rain": "rain", "snow": "falling snow", "fog": "fog"}
    return names[weather]


def switched(scene: Scene, kinds: tuple[Kind, ...], *, is_lit: bool) -> Edit | None:
    """All lights of some kinds go on or off; all of them were otherwise before."""
    things = scene.of(*kinds)
    if not things or any(thing.is_lit == is_lit for thing in things):
        return None
    names = {
        "house": ("lights in the house", "lights in the houses"),
        "lamp": ("lamp", "lamps"),
        "car": ("headlights of the car", "headlights of the cars"),
    }
    called = [f"the {names[kind][len(scene.of(kind)) > 1]}" for kind in kinds if scene.of(kind)]
    slots = {"lights": listed(called), "few": "all the lights" if len(called) > 1 else called[0]}
    slots["full"] = slots["lights"]
    return Edit(
        operation="lights_on" if is_lit else "lights_off",
        source=scene,
        goal=lit(scene, is_lit=is_lit, kinds=kinds),
        slots=slots,
        target=" ".join(kind for kind in kinds if scene.of(kind)),
    )


def door_moved(rng: Generator, scene: Scene, house: Thing) -> Edit | None:
    """The door is opened, or closed."""
    if not references(scene, house):
        return None
    goal = changed(scene, replace(house, is_open=not house.is_open))
    operation = "close_door" if house.is_open else "open_door"
    slots = {**thing_slots(rng, scene, house), "door": house.door}
    return Edit(operation=operation, source=scene, goal=goal, slots=slots, target="door")


def fired(rng: Generator, scene: Scene, house: Thing) -> Edit | None:
    """Smoke rises from a chimney."""
    if house.has_smoke or not references(scene, house):
        return None
    goal = changed(scene, replace(house, has_smoke=True))
    return Edit(operation="light_fire", source=scene, goal=goal, slots=thing_slots(rng, scene, house))
