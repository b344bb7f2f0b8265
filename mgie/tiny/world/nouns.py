"""What things, places and pictures are called: noun phrases, references that fit one thing only, captions."""

from collections import Counter

from numpy.random import Generator

from mgie.tiny.world.photos import Photo, Style
from mgie.tiny.world.scene import KINDS, Color, Kind, Place, Scene, Thing, Weather, pick

NOUNS: dict[Kind, str] = {kind: "pine tree" if kind == "pine" else kind for kind in KINDS}
COLORLESS: frozenset[Kind] = frozenset({"tree", "pine", "bush", "lamp"})
PLACES: dict[Place, str] = {"left": "on the left", "middle": "in the middle", "right": "on the right"}
_PLURALS = {"bush": "bushes", "bench": "benches", "box": "boxes", "person": "people", "fence": "fences"}
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
_STYLES: dict[Style, str] = {
    "leaves": "overlapping {colors} leaves and stones",
    "shapes": "soft {colors} shapes",
    "texture": "a rough {colors} surface",
    "gradient": "a smooth wash of {colors} light",
    "view": "misty {colors} hills",
    "closeup": "a close view of a small place",
}
_WEATHERS: dict[Weather, str] = {
    "clear": "under a clear sky",
    "cloudy": "under grey clouds",
    "rain": "in the rain",
    "snow": "in falling snow",
    "fog": "in thick fog",
}


def plural(noun: str) -> str:
    """Plural of a noun that may have words before it."""
    *before, last = noun.split(" ")
    return " ".join([*before, _PLURALS.get(last, last + "s")])


def listed(names: "list[str] | tuple[str, ...]") -> str:
    """`a, b and c`."""
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)


def with_article(noun: str) -> str:
    """`a car`, `an orange car`."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def described(kind: Kind, color: Color) -> str:
    """A thing without an article: `red car`, `person in red`, `tree`."""
    if kind in COLORLESS:
        return NOUNS[kind]
    return f"person in {color}" if kind == "person" else f"{color} {NOUNS[kind]}"


def is_unique(scene: Scene, thing: Thing, *attributes: str) -> bool:
    """Whether no other thing of the same kind shares these attributes."""
    return not any(
        all(getattr(other, one) == getattr(thing, one) for one in attributes)
        for other in scene.of(thing.kind)
        if other.id != thing.id
    )


def references(scene: Scene, thing: Thing) -> list[str]:
    """What can be said of this thing and no other of the scene, brief first; empty where words are not enough."""
    noun, where = NOUNS[thing.kind], PLACES[thing.place]
    is_plain = thing.kind in COLORLESS
    found = [f"the {noun}"] if is_unique(scene, thing) else []
    if not is_plain and is_unique(scene, thing, "color"):
        found.append(f"the {described(thing.kind, thing.color)}")
    if is_unique(scene, thing, "place"):
        found.append(f"the {noun} {where}")
    return found


def reference(rng: Generator, scene: Scene, thing: Thing) -> str:
    """One of the references, brief ones more often."""
    found = references(scene, thing)
    return pick(rng, found, (0.55, 0.3, 0.15)[: len(found)])


def full_reference(scene: Scene, thing: Thing) -> str:
    """All that tells a thing apart: colour, and place where colour is not enough or says nothing."""
    name = f"the {described(thing.kind, thing.color)}"
    needs_place = not is_unique(scene, thing, "color") or thing.kind in COLORLESS
    return f"{name} {PLACES[thing.place]}" if needs_place and is_unique(scene, thing, "place") else name


def caption(picture: Scene | Photo) -> str:
    """What a picture shows, in one phrase."""
    if isinstance(picture, Photo):
        return f"a photo of {_STYLES[picture.style].format(colors=listed(picture.colors))}"
    groups = Counter(described(thing.kind, thing.color) for thing in sorted(picture.things, key=lambda thing: thing.y))
    names = [with_article(name) if count == 1 else f"{_NUMBERS[count]} {_many(name)}" for name, count in groups.items()]
    ground = "a sandy place" if picture.is_sandy and picture.season != "winter" else "a meadow"
    where = f"{ground} by the water" if picture.has_water else ground
    season = picture.season
    when = f"at sunset in {season}" if picture.time == "dusk" else f"on {with_article(season)} {picture.time}"
    rainbow = " with a rainbow" if picture.has_rainbow else ""
    what = f"{listed(names)} on {where}" if names else where
    return f"{what} {when} {_WEATHERS[picture.weather]}{rainbow}"


def _many(name: str) -> str:
    return f"people in {name.removeprefix('person in ')}" if name.startswith("person in ") else plural(name)
