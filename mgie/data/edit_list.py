"""Lists of edits as JSON Lines: one object a line, `{"image": ..., "instruction": ...}`, optionally `expressive`, `seed`.

Knows nothing of where images lie: `image` is a path or URI as the file has it.
"""

import json
from collections.abc import Iterable, Iterator
from typing import Any

from mgie.errors import DataError

_KINDS: dict[str, type] = {"image": str, "instruction": str, "expressive": str, "seed": int}
_NEEDED = {"image", "instruction"}


def parse_edit_list(content: bytes, name: str) -> list[dict[str, Any]]:
    """The rows of a list, each with `image` and `instruction` and what else it names.

    Args:
        name: Name of the file, for messages.

    Raises:
        DataError: The file holds no rows, or a line is not such an object (its number is named).
    """
    try:
        text = content.decode(json.detect_encoding(content))  # Notepad and PowerShell write a mark, or UTF-16
    except UnicodeDecodeError as error:
        raise DataError(f"{name} cannot be read: {error}") from error
    rows = []
    # Not splitlines: JSON texts may hold other line separators, such as U+2028.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{name}, line {number} is not JSON: {error}") from error
        if not isinstance(row, dict) or not set(row) >= _NEEDED or not set(row) <= set(_KINDS):
            raise DataError(
                f"{name}, line {number} must be an object with image, instruction and optionally expressive, seed"
            )
        for key, value in row.items():
            if not isinstance(value, _KINDS[key]) or isinstance(value, bool):
                raise DataError(f"{name}, line {number}: {key} is {value!r}; it must be a {_KINDS[key].__name__}")
        rows.append(row)
    if not rows:
        raise DataError(f"{name} holds no rows")
    return rows


def number_names(names: Iterable[str]) -> Iterator[str]:
    """The names, each once, whatever its case: what is taken gets a number, as `photo-edited-2`."""
    taken = set[str]()
    for name in names:
        free, count = name, 1
        while free.casefold() in taken:
            count += 1
            free = f"{name}-{count}"
        taken.add(free.casefold())
        yield free
