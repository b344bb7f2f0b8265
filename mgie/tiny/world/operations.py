"""Operations: for each, how often it is sampled, and how a picture and its change are.

Whoever wants an edit of a certain kind calls `OPERATIONS[name].make(rng)` until it is one: not every sampled picture
allows every change. What an instruction may leave open, is in `ambiguities`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from numpy.random import Generator

from mgie.tiny.world.edits import (
    Edit,
    Picture,
    door_moved,
    duplicated,
    fired,
    mended,
    moved,
    recolored,
    removed,
    resized,
    seasoned,
    swapped_colors,
    swapped_places,
    switched,
    thing_slots,
    timed,
    weathered,
)
from mgie.tiny.world.filters import Filter, FilterName
from mgie.tiny.world.nouns import NOUNS, PLACES, described, plural, references, with_article
from mgie.tiny.world.photos import sample_photo
from mgie.tiny.world.scene import (
    COLORS,
    FRONT_KINDS,
    KINDS,
    TIMES,
    Color,
    Kind,
    Scene,
    Season,
    Thing,
    Time,
    Weather,
    Wish,
    changed,
    lit,
    new_thing,
    pick,
    sample_scene,
    with_thing,
    without,
)

Family = Literal["modification", "optimization", "scene"]
"modification: Photoshop-style; optimization: of the whole photo; scene: light, season, weather, local states"


@dataclass(frozen=True)
class Operation:
    """One kind of edit."""

    family: Family
    weight: float
    "how often it is sampled, relative to the others"
    make: Callable[[Generator], Edit | None]
    "samples an edit; None where the sampled picture does not allow it"


def some_thing(rng: Generator, scene: Scene, kinds: Sequence[Kind] = tuple(KINDS)) -> Thing | None:
    """A thing that words can tell from all others; those in front more often."""
    found = [thing for thing in scene.of(*kinds) if references(scene, thing)]
    return pick(rng, found, [1.0 if thing.row in ("back", "middle") else 2.0 for thing in found]) if found else None


_COLORED: tuple[Kind, ...] = tuple(kind for kind, traits in KINDS.items() if len(traits.colors) > 1)


def _recolor(rng: Generator) -> Edit | None:
    scene = sample_scene(rng)
    thing = some_thing(rng, scene, _COLORED)
    return recolored(rng, scene, thing, pick(rng, KINDS[thing.kind].colors)) if thing else None


def _recolor_part(rng: Generator) -> Edit | None:
    part: Literal["roof", "door", "hat"] = pick(rng, ("roof", "door", "hat"), (0.5, 0.3, 0.2))
    scene = sample_scene(rng, Wish(needs=("person",) if part == "hat" else ("house",), season=_no_winter(rng)))
    owner = some_thing(rng, scene, ("person",) if part == "hat" else ("house",))
    if owner is None:
        return None
    old: Color | None = getattr(owner, part)
    color = pick(rng, COLORS)
    if old is None or color in (old, "brown") or (part == "door" and owner.is_open):
        return None
    goal = {"roof": replace(owner, roof=color), "door": replace(owner, door=color), "hat": replace(owner, hat=color)}
    slots = {**thing_slots(rng, scene, owner), "part": part, "color": color, "old": old}
    return Edit(
        operation="recolor_part",
        source=scene,
        goal=changed(scene, goal[part]),
        slots=slots,
        target=f"{part} {color}",
        combination=f"recolor {part} {color}",
    )


def _remove(rng: Generator) -> Edit | None:
    scene = sample_scene(rng)
    thing = some_thing(rng, scene)
    return removed(rng, scene, thing) if thing else None


def _remove_all(rng: Generator) -> Edit | None:
    scene = sample_scene(rng)
    kinds = [kind for kind in KINDS if len(scene.of(kind)) >= 2]
    if not kinds:
        return None
    kind = pick(rng, kinds)
    goal = without(scene, *scene.of(kind))
    return Edit(operation="remove_all", source=scene, goal=goal, slots={"all": plural(NOUNS[kind])}, target=kind)


def _add(rng: Generator) -> Edit | None:
    kind = pick(
        rng, tuple(KINDS), [{"front": 1.0, "air": 1.4, "water": 0.4}.get(KINDS[kind].row, 0.8) for kind in KINDS]
    )
    scene = sample_scene(rng, Wish(num_front=int(rng.integers(3))))
    row = KINDS[kind].row
    free = scene.free_columns(row)
    if not free or (row == "water" and not scene.has_water):
        return None
    x, color = pick(rng, free), pick(rng, KINDS[kind].colors)
    thing = new_thing(scene, kind, color, x)
    if kind == "house":
        thing = replace(thing, roof="red" if color != "red" else "brown", door="brown" if color != "brown" else "white")
    slots = {"new": with_article(described(kind, color)), "name": NOUNS[kind], "place": PLACES[thing.place]}
    return Edit(
        operation="add",
        source=scene,
        goal=with_thing(scene, thing),
        slots=slots,
        target=f"{described(kind, color)} {thing.place}",
        combination=f"add {kind} {color}",
    )


def _duplicate(rng: Generator) -> Edit | None:
    scene = sample_scene(rng, Wish(num_front=int(rng.integers(1, 3))))
    thing = some_thing(rng, scene)
    return duplicated(rng, scene, thing) if thing and thing.kind != "house" else None


def _replace(rng: Generator) -> Edit | None:
    scene = sample_scene(rng)
    thing = some_thing(rng, scene, (*FRONT_KINDS, "tree", "pine", "lamp", "bush"))
    if thing is None:
        return None
    kinds = {"front": FRONT_KINDS, "back": ("tree", "pine", "house"), "middle": ("lamp", "bush", "fence")}[thing.row]
    kind = pick(rng, tuple(one for one in kinds if one != thing.kind))
    color = pick(rng, KINDS[kind].colors)
    new = replace(new_thing(scene, kind, color, thing.x), id=thing.id, y=thing.y)
    if kind == "house":
        new = replace(new, roof="red" if color != "red" else "brown", door="brown" if color != "brown" else "white")
    slots = {**thing_slots(rng, scene, thing), "new": with_article(described(kind, color))}
    return Edit(
        operation="replace",
        source=scene,
        goal=changed(scene, new),
        slots=slots,
        target=f"{thing.kind} {described(kind, color)}",
        combination=f"replace {thing.kind} {kind}",
    )


def _move(rng: Generator) -> Edit | None:
    scene = sample_scene(rng, Wish(num_front=int(rng.integers(1, 3))))
    thing = some_thing(rng, scene, (*FRONT_KINDS, "lamp", "balloon", "boat", "tree", "bush"))
    free = scene.free_columns(thing.row) if thing else []
    return moved(rng, scene, thing, pick(rng, free)) if thing and free else None


def _resize(rng: Generator, *, is_larger: bool) -> Edit | None:
    scene = sample_scene(rng)
    thing = some_thing(rng, scene, tuple(kind for kind in KINDS if kind not in ("fence", "house", "lamp")))
    return resized(rng, scene, thing, is_larger=is_larger) if thing else None


def _turn_around(rng: Generator) -> Edit | None:
    scene = sample_scene(rng, Wish(needs=(pick(rng, ("car", "dog", "boat")),)))
    thing = some_thing(rng, scene, ("car", "dog", "boat"))
    if thing is None:
        return None
    goal = changed(scene, replace(thing, is_flipped=not thing.is_flipped))
    sides = ("left", "right")
    slots = {**thing_slots(rng, scene, thing), "side": sides[thing.is_flipped]}
    return Edit(operation="turn_around", source=scene, goal=goal, slots=slots, target=thing.kind)


def _swap(rng: Generator, swap: Callable[[Generator, Scene, Thing, Thing], Edit | None]) -> Edit | None:
    scene = sample_scene(rng, Wish(num_front=int(rng.integers(2, 4))))
    things = scene.in_row("front")
    if len(things) < 2:
        return None
    first, second = (things[int(i)] for i in rng.permutation(len(things))[:2])
    return swap(rng, scene, first, second)


def _put_on_hat(rng: Generator) -> Edit | None:
    scene = sample_scene(rng, Wish(needs=("person",)))
    person = some_thing(rng, scene, ("person",))
    if person is None or person.hat is not None:
        return None
    color = pick(rng, KINDS["person"].colors)
    slots = {**thing_slots(rng, scene, person), "color": color, "new": with_article(f"{color} hat")}
    return Edit(
        operation="put_on_hat",
        source=scene,
        goal=changed(scene, replace(person, hat=color)),
        slots=slots,
        target=f"{color} hat",
        combination=f"hat {color}",
    )


def sample_picture(rng: Generator, *, photo_share: float) -> Picture:
    """A photo or a scene."""
    return sample_photo(rng) if rng.random() < photo_share else sample_scene(rng)


AMOUNTS: dict[str, float] = {"": 1.0, "slightly": 0.5, "strongly": 1.5}


_GRADUAL: frozenset[str] = frozenset(
    ("brighter", "darker", "more_contrast", "less_contrast", "more_saturation", "less_saturation", "warmer", "cooler")
)


def _optimize(rng: Generator, name: FilterName) -> Edit:
    picture = sample_picture(rng, photo_share=0.5)
    degree = pick(rng, tuple(AMOUNTS), (0.7, 0.15, 0.15)) if name in _GRADUAL else ""
    spoil = {
        "sharpen": Filter("blur", 0.3) if rng.random() < 0.5 else None,
        "professional": pick(rng, (Filter("less_contrast", 0.9), Filter("vintage", 0.8), Filter("darker", 0.8))),
    }.get(name)
    return Edit(
        operation=name,
        source=picture,
        goal=picture,
        slots={"degree": degree},
        target=degree,
        spoil=spoil,
        filter=Filter(name, AMOUNTS[degree]),
    )


SPOILS: dict[str, tuple[Filter, ...]] = {
    "fix_light": (Filter("darker", 1.1), Filter("brighter", 1.2)),
    "fix_colors": (Filter("warmer", 1.1), Filter("cooler", 1.1), Filter("less_saturation", 1.2)),
    "denoise": (Filter("noise", 1.0),),
}


def _mend(rng: Generator, name: str) -> Edit:
    return mended(sample_picture(rng, photo_share=0.5), name, pick(rng, SPOILS[name]))


def _time(rng: Generator, name: Time) -> Edit | None:
    if name != "day" and rng.random() < 0.25:
        photo = sample_photo(rng)
        return Edit(operation=name, source=photo, goal=photo, slots={"was": "day"}, filter=Filter(name))
    was: tuple[Time, ...] = ("dusk", "night") if name == "day" else ("day",)
    return timed(sample_scene(rng, Wish(time=pick(rng, was))), name)


def _season(rng: Generator, name: Season) -> Edit | None:
    return seasoned(sample_scene(rng), name)


def _no_winter(rng: Generator) -> Season:
    return pick(rng, ("spring", "summer", "autumn"))


def _weather(rng: Generator, name: Weather) -> Edit | None:
    was: tuple[Weather, ...] = ("rain", "snow", "fog", "cloudy") if name == "clear" else ("clear", "clear", "cloudy")
    weather = pick(rng, was)
    return weathered(sample_scene(rng, Wish(weather=weather)), name)


def _rainbow(rng: Generator) -> Edit:
    scene = sample_scene(rng, Wish(time="day", weather=pick(rng, ("clear", "rain", "cloudy"))))
    return Edit(operation="rainbow", source=scene, goal=replace(scene, has_rainbow=True))


def _switch(rng: Generator, *, is_lit: bool) -> Edit | None:
    groups: tuple[tuple[Kind, ...], ...] = (("house",), ("lamp",), ("car",), ("house", "lamp"))
    kinds = pick(rng, groups, (0.4, 0.25, 0.15, 0.2))
    time = pick(rng, TIMES, (0.12, 0.33, 0.55))
    scene = sample_scene(rng, Wish(time=time, needs=kinds))
    if rng.random() < 0.85:  # by chance alone, few scenes have all these lights in one state
        scene = lit(scene, is_lit=not is_lit, kinds=kinds)
    return switched(scene, kinds, is_lit=is_lit)


def _move_door(rng: Generator, *, is_open: bool) -> Edit | None:
    scene = sample_scene(rng, Wish(needs=("house",)))
    house = some_thing(rng, scene, ("house",))
    if house is None:
        return None
    house = replace(house, is_open=not is_open)
    return door_moved(rng, changed(scene, house), house)


def _light_fire(rng: Generator) -> Edit | None:
    scene = sample_scene(rng, Wish(needs=("house",)))
    house = some_thing(rng, scene, ("house",))
    return fired(rng, scene, house) if house else None


def _named(family: Family, make: Callable[..., Edit | None], **weights: float) -> dict[str, Operation]:
    """Operations that differ by the name that `make` is given."""
    return {name: Operation(family, weight, partial(make, name=name)) for name, weight in weights.items()}


OPERATIONS: dict[str, Operation] = {
    "recolor": Operation("modification", 3.8, _recolor),
    "recolor_part": Operation("modification", 1.2, _recolor_part),
    "remove": Operation("modification", 2.6, _remove),
    "remove_all": Operation("modification", 0.6, _remove_all),
    "add": Operation("modification", 3.6, _add),
    "duplicate": Operation("modification", 0.6, _duplicate),
    "replace": Operation("modification", 2.6, _replace),
    "move": Operation("modification", 1.4, _move),
    "enlarge": Operation("modification", 0.7, partial(_resize, is_larger=True)),
    "shrink": Operation("modification", 0.7, partial(_resize, is_larger=False)),
    "turn_around": Operation("modification", 0.4, _turn_around),
    "swap_places": Operation("modification", 0.6, partial(_swap, swap=swapped_places)),
    "swap_colors": Operation("modification", 0.6, partial(_swap, swap=swapped_colors)),
    "put_on_hat": Operation("modification", 0.8, _put_on_hat),
    **_named("optimization", _optimize, brighter=0.55, darker=0.5, more_contrast=0.4, less_contrast=0.3),
    **_named("optimization", _optimize, more_saturation=0.4, less_saturation=0.3, warmer=0.5, cooler=0.4),
    **_named("optimization", _optimize, sharpen=0.3, blur=0.3, vignette=0.3, black_and_white=0.4, sepia=0.35),
    **_named("optimization", _optimize, vintage=0.25, professional=0.45),
    **_named("optimization", _mend, fix_light=0.3, fix_colors=0.3, denoise=0.3),
    **_named("scene", _time, night=0.9, day=0.7, dusk=0.7),
    **_named("scene", _season, spring=0.5, summer=0.5, autumn=0.5, winter=0.6),
    **_named("scene", _weather, clear=0.5, cloudy=0.3, rain=0.5, snow=0.5, fog=0.4),
    "rainbow": Operation("scene", 0.4, _rainbow),
    "lights_on": Operation("scene", 0.9, partial(_switch, is_lit=True)),
    "lights_off": Operation("scene", 0.9, partial(_switch, is_lit=False)),
    "open_door": Operation("scene", 0.5, partial(_move_door, is_open=True)),
    "close_door": Operation("scene", 0.5, partial(_move_door, is_open=False)),
    "light_fire": Operation("scene", 0.5, _light_fire),
}
