"""The user's words for an edit: one of the wordings, its slots filled, said politely or plainly."""

import re

from numpy.random import Generator

from mgie.tiny.world.edits import Edit
from mgie.tiny.world.scene import pick
from mgie.tiny.world.wordings import Kind, templates

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
    kind: Kind = "ambiguity" if edit.ambiguity else "operation"
    return templates(kind, edit.ambiguity or edit.operation, is_held_out=is_held_out)


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
