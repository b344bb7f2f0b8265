"""How people ask: reads `wordings.txt`, the templates of every operation and ambiguity."""

import functools
import itertools
import re
from collections.abc import Callable, Sequence
from importlib import resources
from typing import Literal, get_args

from mgie.errors import DataError

Kind = Literal["operation", "ambiguity"]
_HELD_OUT = "~"
_CHOICE = re.compile(r"\[([^\[\]|]+(?:\|[^\[\]|]+)+)\]")
_SLOT = re.compile(r"\{[a-z]+\}")


@functools.cache
def templates(kind: Kind, name: str, *, is_held_out: bool) -> tuple[str, ...]:
    """Templates of an operation or ambiguity without alternatives: those that training has, or those it has not."""
    kept = (line for line in _read_wordings()[kind, name] if line.startswith(_HELD_OUT) == is_held_out)
    return tuple(wording for line in kept for wording in _alternatives(line.lstrip(f"{_HELD_OUT} ")))


@functools.cache
def _read_wordings() -> dict[tuple[str, str], tuple[str, ...]]:
    return parse_wordings(resources.files("mgie.tiny.world").joinpath("wordings.txt").read_text(encoding="utf-8"))


def parse_wordings(text: str) -> dict[tuple[str, str], tuple[str, ...]]:
    """Lines of templates by kind and name; `wordings.txt` itself says what a file of them looks like.

    Raises:
        DataError: A line is no comment, header or template, or a header comes twice or has no templates.
    """
    return parse_sections(text, get_args(Kind), _is_template)


def parse_sections(
    text: str, kinds: Sequence[str], is_good: Callable[[str], bool]
) -> dict[tuple[str, str], tuple[str, ...]]:
    """Lines by kind and name of their header, `== KIND NAME`; comments begin with `#`.

    Raises:
        DataError: A header is of no such kind, comes twice or has no lines, or a line is not good.
    """
    sections: dict[tuple[str, str], list[str]] = {}
    lines: list[str] | None = None
    for number, line in enumerate(map(str.strip, text.splitlines()), start=1):
        if not line or line.startswith("#"):
            continue
        if line.startswith("=="):
            match = re.fullmatch(rf"== ({'|'.join(kinds)}) (\w+)", line)
            if match is None or (match[1], match[2]) in sections:
                raise DataError(f"line {number}: {line!r} {'comes twice' if match else 'is no header'}")
            sections[match[1], match[2]] = lines = []
        elif lines is None or not is_good(line):
            reason = "is no template" if lines is not None else "stands before the first header"
            raise DataError(f"line {number}: {line!r} {reason}")
        else:
            lines.append(line)
    if empty := [name for (_, name), found in sections.items() if not found]:
        raise DataError(f"{empty[0]} has no templates")
    return {key: tuple(found) for key, found in sections.items()}


def _is_template(line: str) -> bool:
    """Whether brackets and braces make choices and slots, and something is left of the line."""
    plain = _SLOT.sub("x", line.lstrip(f"{_HELD_OUT} "))
    return bool(plain.strip()) and not set("[]{}|") & set(_CHOICE.sub("", plain))


def _alternatives(line: str) -> list[str]:
    parts = _CHOICE.split(line)  # text and choices in turn
    options = [part.split("|") if number % 2 else [part] for number, part in enumerate(parts)]
    return ["".join(chosen) for chosen in itertools.product(*options)]
