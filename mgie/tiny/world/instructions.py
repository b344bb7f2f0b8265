"""The user's words for an edit: one of the wordings, its slots filled, said politely or plainly."""

import functools
import itertools
import re

from numpy.random import Generator

from mgie.tiny.world.edits import Edit
from mgie.tiny.world.scene import pick
from mgie.tiny.world.wordings import AMBIGUOUS_WORDINGS, WORDINGS

_HELD_OUT = "~"
_CHOICE = re.compile(r"\[([^\]]*)\]")
_IT = ("it", "it", "the picture", "the photo", "the image", "this")
_PIC = ("picture", "photo", "image")
_DEGREES = {
    "": ("",),
    "slightly": (", just a little", " slightly", " a little", ", but only a bit"),
    "strongly": (" a lot", ", and strongly", ", very much so", " by a lot"),
}
_IMPERATIVE = re.compile(
    "(?:make|turn|change|remove|add|put|replace|move|take|get|paint|give|swap|delete|erase|show|let|increase|brighten"
    "|darken|sharpen|blur|open|close|switch|light|enlarge|shrink|fix|correct) [^,]*"
)
_POLITE = ("please {}", "could you {}?", "{}, please", "can you {}?", "I'd like you to {}")


def wordings(edit: Edit, *, is_held_out: bool) -> tuple[str, ...]:
    """The templates for an edit, without alternatives: those that training has, or those it has not."""
    return _expanded(edit.ambiguity or edit.operation, is_ambiguous=bool(edit.ambiguity), is_held_out=is_held_out)


@functools.cache
def _expanded(name: str, *, is_ambiguous: bool, is_held_out: bool) -> tuple[str, ...]:
    """All templates of an operation or ambiguity."""
    table = AMBIGUOUS_WORDINGS if is_ambiguous else WORDINGS
    lines = (line.strip() for line in table[name].strip().splitlines())
    kept = (line.lstrip(f"{_HELD_OUT} ") for line in lines if line.startswith(_HELD_OUT) == is_held_out)
    return tuple(wording for line in kept for wording in _alternatives(line))


def _alternatives(line: str) -> list[str]:
    parts = _CHOICE.split(line)  # text and choices in turn
    options = [part.split("|") if number % 2 else [part] for number, part in enumerate(parts)]
    return ["".join(chosen) for chosen in itertools.product(*options)]


def instruct(rng: Generator, edit: Edit, *, is_held_out: bool = False) -> str:
    """An instruction for an edit.

    Args:
        is_held_out: Use the wordings that training never has.
    """
    template = pick(rng, wordings(edit, is_held_out=is_held_out))
    text = template.format(**{"it": pick(rng, _IT), "pic": pick(rng, _PIC), **edit.slots})
    text += pick(rng, _DEGREES[edit.slots.get("degree", "")])
    if _IMPERATIVE.fullmatch(text) and rng.random() < 0.22:
        text = pick(rng, _POLITE).format(text)
    if rng.random() < 0.25:
        text = text[0].upper() + text[1:]
    return text
