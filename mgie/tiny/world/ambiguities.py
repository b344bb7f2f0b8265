"""Edits whose instruction does not say what to do: only with the picture is it known.

Each samples a picture in which there is one sensible answer, and that answer: an edit of `edits`, marked with the
ambiguity's name. Over many pictures one instruction has many answers, so words alone do not tell. Knows nothing
of wordings.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from numpy.random import Generator

from mgie.tiny.world.edits import (
    Edit,
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
    timed,
    weathered,
)
from mgie.tiny.world.filters import Filter
from mgie.tiny.world.nouns import reference
from mgie.tiny.world.operations import SPOILS, sample_picture, some_thing
from mgie.tiny.world.photos import sample_photo
from mgie.tiny.world.scene import (
    FRONT_KINDS,
    KINDS,
    Kind,
    Scene,
    Season,
    Thing,
    Weather,
    Wish,
    changed,
    lit,
    new_thing,
    pick,
    sample_scene,
    with_thing,
)


@dataclass(frozen=True)
class Ambiguity:
    """One way to leave something open."""

    weight: float
    make: Callable[[Generator], Edit | None]


def _only_front(rng: Generator, wish: Wish | None = None) -> tuple[Scene, Thing] | None:
    """A scene with one thing in front: what `it` must mean."""
    scene = sample_scene(rng, wish or Wish(num_front=1))
    front = scene.in_row("front")
    return (scene, front[0]) if len(front) == 1 else None


def _change_it(rng: Generator, change: Callable[[Generator, Scene, Thing], Edit | None]) -> Edit | None:
    found = _only_front(rng)
    return change(rng, *found) if found else None


def _other_side(rng: Generator) -> Edit | None:
    found = _only_front(rng)
    if found is None or found[1].place == "middle":
        return None
    scene, thing = found
    free = scene.free_columns("front")
    return moved(rng, scene, thing, free[-1] if thing.place == "left" else free[0])


def _match_house(rng: Generator) -> Edit | None:
    """The only thing in front gets the colour of the only house."""
    found = _only_front(rng, Wish(num_front=1, needs=("house",)))
    if found is None or len(found[0].of("house")) != 1:
        return None
    scene, thing = found
    color = scene.of("house")[0].color
    return recolored(rng, scene, thing, color) if color in KINDS[thing.kind].colors else None


def _match_other(rng: Generator) -> Edit | None:
    """One of two things in front gets the colour of the other, which is named."""
    scene = sample_scene(rng, Wish(num_front=2))
    front = scene.in_row("front")
    if len(front) != 2 or front[0].kind == front[1].kind:
        return None
    order = rng.permutation(2)
    thing, other = front[int(order[0])], front[int(order[1])]
    if other.color not in KINDS[thing.kind].colors:
        return None
    edit = recolored(rng, scene, thing, other.color)
    return edit and replace(edit, slots={**edit.slots, "other": reference(rng, scene, other)})


def _other_color(rng: Generator) -> Edit | None:
    """Two things of one kind, of two colours: the named one gets the other colour."""
    kind: Kind = pick(rng, ("car", "ball", "box", "tent", "person"))
    scene = sample_scene(rng, Wish(num_front=2, needs=(kind, kind)))
    things = scene.of(kind)
    if len(things) != 2:
        return None
    thing, other = things if rng.random() < 0.5 else things[::-1]
    edit = recolored(rng, scene, thing, other.color)
    return edit and replace(edit, slots={**edit.slots, "side": f"{edit.slots['name']} {edit.slots['place']}"})


def _odd_one(rng: Generator) -> Edit | None:
    """Three things, two of them alike: the third goes."""
    common, odd = (pick(rng, FRONT_KINDS) for _ in range(2))
    scene = sample_scene(rng, Wish(num_front=0))
    if common == odd or len(scene.in_row("front")) != 0:
        return None
    columns = scene.free_columns("front")
    odd_column = int(rng.integers(3))
    color = pick(rng, KINDS[common].colors)
    for column, x in enumerate(columns):
        kind = odd if column == odd_column else common
        chosen = pick(rng, KINDS[kind].colors) if kind == odd else color
        scene = with_thing(scene, new_thing(scene, kind, chosen, x, seed=int(rng.integers(2**31))))
    return removed(rng, scene, scene.of(odd)[0])


def _swap(rng: Generator, swap: Callable[[Generator, Scene, Thing, Thing], Edit | None]) -> Edit | None:
    scene = sample_scene(rng, Wish(num_front=2))
    front = scene.in_row("front")
    return swap(rng, scene, *front) if len(front) == 2 else None


def _switch_it(rng: Generator, *, is_lit: bool) -> Edit | None:
    """The lights of one kind: all others are absent or already as wanted."""
    kinds: tuple[Kind, ...] = ("house", "lamp", "car")
    kind = pick(rng, kinds, (0.3, 0.4, 0.3))
    scene = sample_scene(rng, Wish(time=pick(rng, ("dusk", "night")), needs=(kind,)))
    scene = lit(lit(scene, is_lit=is_lit, kinds=kinds), is_lit=not is_lit, kinds=(kind,))
    return switched(scene, (kind,), is_lit=is_lit)


def _toggle_lights(rng: Generator) -> Edit | None:
    """What is on goes off and the other way round: in the house and the lamps alike."""
    is_lit = bool(rng.random() < 0.5)
    scene = sample_scene(rng, Wish(time=pick(rng, ("dusk", "night")), needs=("house",)))
    kinds: tuple[Kind, ...] = ("house", "lamp")
    return switched(lit(scene, is_lit=not is_lit, kinds=kinds), kinds, is_lit=is_lit)


def _cosy(rng: Generator) -> Edit | None:
    """Warm light: in dark houses, a fire where there is light already, the evening by day, warm colours in a photo."""
    if rng.random() < 0.2:
        photo = sample_photo(rng)
        return Edit(operation="warmer", source=photo, goal=photo, slots={"degree": ""}, filter=Filter("warmer"))
    scene = sample_scene(rng, Wish(needs=("house",), time=pick(rng, ("day", "dusk", "night"))))
    if scene.time == "day":
        return timed(scene, "dusk")
    if rng.random() < 0.5:
        scene = lit(scene, is_lit=False)
        return switched(scene, ("house", "lamp"), is_lit=True)
    house = some_thing(rng, scene, ("house",))
    return fired(rng, lit(scene, is_lit=True), replace(house, is_lit=True)) if house else None


def _fix_weather(rng: Generator) -> Edit | None:
    """Bad weather clears up; in clear weather there comes what the season has: rain, or snow in winter."""
    weathers: tuple[Weather, ...] = ("rain", "snow", "fog", "cloudy", "clear")
    scene = sample_scene(rng, Wish(weather=pick(rng, weathers, (0.15, 0.1, 0.15, 0.1, 0.5))))
    if scene.weather != "clear":
        return weathered(scene, "clear")
    return weathered(scene, "snow" if scene.season == "winter" else "rain")


_SEASONS_IN_ORDER: tuple[Season, ...] = ("spring", "summer", "autumn", "winter")


def _seasons_on(rng: Generator, steps: int) -> Edit | None:
    scene = sample_scene(rng)
    return seasoned(scene, _SEASONS_IN_ORDER[(_SEASONS_IN_ORDER.index(scene.season) + steps) % 4])


def _half_a_day(rng: Generator) -> Edit | None:
    scene = sample_scene(rng, Wish(time=pick(rng, ("day", "night"))))
    return timed(scene, "night" if scene.time == "day" else "day")


def _mend(rng: Generator, name: str) -> Edit:
    spoil = pick(rng, SPOILS[name])
    return mended(sample_picture(rng, photo_share=0.4), name, spoil)


def _the_door(rng: Generator) -> Edit | None:
    scene = sample_scene(rng, Wish(needs=("house",)))
    houses = scene.of("house")
    if len(houses) != 1:
        return None
    house = replace(houses[0], is_open=bool(rng.random() < 0.5))
    return door_moved(rng, changed(scene, house), house)


def sample_ambiguous(rng: Generator, name: str) -> Edit | None:
    """An edit that an ambiguity leaves open; None where the sampled picture does not allow it."""
    edit = AMBIGUITIES[name].make(rng)
    return edit and replace(edit, ambiguity=name)


AMBIGUITIES: dict[str, Ambiguity] = {
    "remove_it": Ambiguity(1.3, partial(_change_it, change=removed)),
    "larger": Ambiguity(0.5, partial(_change_it, change=partial(resized, is_larger=True))),
    "smaller": Ambiguity(0.5, partial(_change_it, change=partial(resized, is_larger=False))),
    "one_more": Ambiguity(0.7, partial(_change_it, change=duplicated)),
    "other_side": Ambiguity(0.9, _other_side),
    "match_house": Ambiguity(1.5, _match_house),
    "match_other": Ambiguity(1.1, _match_other),
    "other_color": Ambiguity(0.9, _other_color),
    "odd_one": Ambiguity(0.7, _odd_one),
    "swap_them": Ambiguity(0.5, partial(_swap, swap=swapped_places)),
    "swap_their_colors": Ambiguity(0.5, partial(_swap, swap=swapped_colors)),
    "turn_on": Ambiguity(0.9, partial(_switch_it, is_lit=True)),
    "turn_off": Ambiguity(0.9, partial(_switch_it, is_lit=False)),
    "toggle_lights": Ambiguity(0.6, _toggle_lights),
    "cosy": Ambiguity(1.0, _cosy),
    "fix_weather": Ambiguity(0.7, _fix_weather),
    "half_a_year": Ambiguity(0.6, partial(_seasons_on, steps=2)),
    "next_season": Ambiguity(0.5, partial(_seasons_on, steps=1)),
    "half_a_day": Ambiguity(0.6, _half_a_day),
    "fix_light": Ambiguity(0.7, partial(_mend, name="fix_light")),
    "fix_colors": Ambiguity(0.7, partial(_mend, name="fix_colors")),
    "the_door": Ambiguity(0.4, _the_door),
}
