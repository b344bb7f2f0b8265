"""How people ask: reads `wordings.txt`, the templates of every operation and ambiguity."""

import functools
import itertools
import re
from importlib import resources
from typing import Literal, get_args

from mgie.errors import DataError

Kind = Literal["operation", "ambiguity"]
_KINDS: tuple[Kind, ...] = get_args(Kind)
_HELD_OUT = "~"
_CHOICE = re.compile(r"\[([^\[\]|]+(?:\|[^\[\]|]+)+)\]")
_SLOT = re.compile(r"\{[a-z]+\}")


@functools.cache
def templates(kind: Kind, name: str, *, is_held_out: bool) -> tuple[str, ...]:
    """Templates of an operation or ambiguity without alternatives: those that training has, or those it has not."""
    kept = (line for line in _read_wordings()[kind, name] if line.startswith(_HELD_OUT) == is_held_out)
    return tuple(wording for line in kept for wording in _alternatives(line.lstrip(f"{_HELD_OUT} ")))


@functools.cache
def _read_wordings() -> dict[tuple[Kind, str], tuple[str, ...]]:
    return parse_wordings(resources.files("mgie.tiny.world").joinpath("wordings.txt").read_text(encoding="utf-8"))


def parse_wordings(text: str) -> dict[tuple[Kind, str], tuple[str, ...]]:
    """Lines of templates by kind and name; `wordings.txt` itself says what a file of them looks like.

    Raises:
        DataError: A line is no comment, header or template, or a header comes twice or has no templates.
    """
    sections: dict[tuple[Kind, str], list[str]] = {}
    lines: list[str] | None = None
    for number, line in enumerate(map(str.strip, text.splitlines()), start=1):
        if not line or line.startswith("#"):
            continue
        if line.startswith("=="):
            key = _section(line)
            if key is None or key in sections:
                raise DataError(f"wordings, line {number}: {line!r} {'comes twice' if key else 'is no header'}")
            sections[key] = lines = []
        elif lines is None or not _is_template(line):
            reason = "is no template" if lines is not None else "stands before the first header"
            raise DataError(f"wordings, line {number}: {line!r} {reason}")
        else:
            lines.append(line)
    if empty := [name for (_, name), found in sections.items() if not found]:
        raise DataError(f"wordings: {empty[0]} has no templates")
    return {key: tuple(found) for key, found in sections.items()}


def _section(line: str) -> tuple[Kind, str] | None:
    for kind in _KINDS:
        if match := re.fullmatch(rf"== {kind} (\w+)", line):
            return kind, match[1]
    return None


def _is_template(line: str) -> bool:
    """Whether brackets and braces make choices and slots, and something is left of the line."""
    plain = _SLOT.sub("x", line.lstrip(f"{_HELD_OUT} "))
    return bool(plain.strip()) and not set("[]{}|") & set(_CHOICE.sub("", plain))


def _alternatives(line: str) -> list[str]:
    parts = _CHOICE.split(line)  # text and choices in turn
    options = [part.split("|") if number % 2 else [part] for number, part in enumerate(parts)]
    return ["".join(chosen) for chosen in itertools.product(*options)]
