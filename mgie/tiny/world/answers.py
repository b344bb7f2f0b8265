"""What the models shall learn to say: verbose answers and concise expressive instructions, and whether a text says it.

The verbose answer describes, as LLaVA would, what the picture would be like: two to four sentences. The expressive
instruction names the right thing and the change in at most 32 words, however little the user said. The templates
are in `answers.txt`.
"""

import functools
import re
from dataclasses import dataclass
from importlib import resources

from numpy.random import Generator

from mgie.errors import DataError
from mgie.tiny.world.edits import Edit
from mgie.tiny.world.nouns import caption, full_reference, listed, references
from mgie.tiny.world.operations import OPERATIONS
from mgie.tiny.world.scene import Scene, pick
from mgie.tiny.world.wordings import parse_sections

_COUNTS = {"do": 2, "see": 2, "key": 1}  # lines of an answer
_LINE = re.compile(r"(do|see|key): (.*\S)")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Templates of what is said of an operation; `answers.txt` says what each is."""

    do: tuple[str, ...]
    see: tuple[str, ...]
    key: str


@functools.cache
def _read_answers() -> dict[str, Answer]:
    return parse_answers(resources.files("mgie.tiny.world").joinpath("answers.txt").read_text(encoding="utf-8"))


def parse_answers(text: str) -> dict[str, Answer]:
    """Answers by operation.

    Raises:
        DataError: A line is no comment, header, or one of `do`, `see`, `key`; or there are not two, two and one of these.
    """
    answers = {}
    for (_, name), lines in parse_sections(text, ("answer",), lambda line: _LINE.fullmatch(line) is not None).items():
        found = {kind: tuple(line.partition(": ")[2] for line in lines if line.startswith(kind)) for kind in _COUNTS}
        if counts := {kind: len(some) for kind, some in found.items() if len(some) != _COUNTS[kind]}:
            raise DataError(f"answers: {name} has {counts}; it must have {_COUNTS}")
        answers[name] = Answer(do=found["do"], see=found["see"], key=found["key"][0])
    return answers


_OPENINGS = ("", "", "In the edited picture, ", "If the picture were edited in this way, ")
_REST = (
    "The rest would stay as it is.",
    "Nothing else in the picture would change.",
    "Everything else would look the same.",
)
_WHOLE = ("All things would stay in their places.", "What the picture shows would stay the same.")
_MOODS: dict[str, tuple[str, str]] = {
    "night": ("The mood would be quiet and calm.", "The place would look quiet and a little secret."),
    "dusk": ("The mood would be warm and peaceful.", "The light would be soft."),
    "winter": ("The mood would be cold and still.", "The air would look cold and clear."),
    "autumn": ("The colours would be warm.", "The mood would be calm."),
    "spring": ("The mood would be fresh and friendly.", "Everything would look young and bright."),
    "summer": ("The mood would be warm and friendly.", "Everything would look full of life."),
    "rain": ("The mood would be gloomy.", "One would like to be inside."),
    "snow": ("The mood would be still.", "The flakes would dance in the air."),
    "fog": ("The mood would be mysterious.", "Only what is near would be clear to see."),
    "lights_on": ("It would look inviting.", "The mood would be cosy."),
    "light_fire": ("It would look inviting.", "The mood would be cosy."),
    "rainbow": ("The mood would be cheerful.", "It would look like after a shower."),
}


def express(rng: Generator, edit: Edit) -> str:
    """The concise expressive instruction: one sentence, at most 32 words."""
    return _filled(pick(rng, _read_answers()[edit.operation].do), edit)


def describe(rng: Generator, edit: Edit) -> str:
    """The verbose answer: two to four sentences on what the edited picture would be like."""
    sentences = [_capitalized(pick(rng, _OPENINGS) + _filled(pick(rng, _read_answers()[edit.operation].see), edit))]
    if edit.operation in ("night", "dusk") and isinstance(edit.goal, Scene) and edit.goal.of("house", "lamp"):
        sentences.append("The lights would be on and shine.")
    elif edit.operation in _MOODS and rng.random() < 0.7:
        sentences.append(pick(rng, _MOODS[edit.operation]))
    if rng.random() < 0.5:
        sentences += _unchanged(rng, edit)
    sentences.append(pick(rng, _REST if OPERATIONS[edit.operation].family == "modification" else _WHOLE))
    return " ".join(sentences)


def states_change(text: str, edit: Edit) -> bool:
    """Whether a text names the thing and the change of an edit: every keyword, as whole words."""
    said = f" {' '.join(re.findall('[a-z]+', text.lower()))} "
    return all(any(f" {one} " in said for one in group.split("|")) for group in _keywords(edit))


_LIGHTS = {"house": ["house|houses"], "lamp": ["lamp|lamps"], "car": ["headlights"]}


def _keywords(edit: Edit) -> list[str]:
    """What a text must name; each is one word or phrase, or several with `|` between."""
    groups: list[str] = []
    for pattern in _read_answers()[edit.operation].key.split(" "):
        if pattern == "{lights}":
            groups += [one for kind in edit.target.split(" ") for one in _LIGHTS[kind]]
        else:
            groups.append(pattern.format(**edit.slots).removeprefix("the "))
    return [group for group in groups if group]


def _filled(template: str, edit: Edit) -> str:
    text = re.sub(" +", " ", template.format(**edit.slots)).replace(" ,", ",").replace(" .", ".")
    return _capitalized(text) if template[0].isupper() else text


def _capitalized(text: str) -> str:
    return text[0].upper() + text[1:]


def _unchanged(rng: Generator, edit: Edit) -> list[str]:
    """A sentence on what the edit leaves alone, where there is something."""
    if not (isinstance(edit.source, Scene) and isinstance(edit.goal, Scene)):
        return [f"One would still see {caption(edit.source)}."]
    kept = [thing for thing in edit.source.things if thing in edit.goal.things and references(edit.source, thing)]
    named = [full_reference(edit.source, kept[int(i)]) for i in rng.permutation(len(kept))[:2]]
    if not named:
        return []
    return [f"{_capitalized(listed(named))} would {pick(rng, ('not be touched', 'still be there'))}."]
