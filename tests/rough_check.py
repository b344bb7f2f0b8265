"""An operator's function that fails as careless code does: with the words in its exceptions."""

from typing import Any


def check(picture: Any, instruction: str, *, where: str) -> None:
    if "quote" in instruction:
        raise ValueError(f"cannot judge {instruction!r}")
