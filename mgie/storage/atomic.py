"""Files and folders on a disk that appear complete or not at all; needs no library of stores."""

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """A path to write to: the file gets its name, in place of an older one, when the block ends well, else it vanishes.

    Raises:
        OSError: The folder cannot be written.
    """
    partial = _beside(target)
    try:
        yield partial
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """An empty folder to fill: it gets its name when the block ends well, else it vanishes with all that is in it.

    Args:
        replace: A folder of that name gives way, and stays where the new one cannot take its place; else there must be
            none but an empty one.

    Raises:
        OSError: The folder around it cannot be written, or there is a full one of that name.
    """
    partial = _beside(target)
    partial.mkdir()
    try:
        yield partial
        if replace and target.exists():
            _exchange(partial, target)
        else:
            partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _exchange(new: Path, target: Path) -> None:
    """Old aside, new in, old away: a fault in between loses neither."""
    old = _beside(target)
    target.replace(old)
    try:
        new.replace(target)
    except OSError:
        old.replace(target)
        raise
    shutil.rmtree(old)


def _beside(target: Path) -> Path:
    """A name of its own beside the place, so that moving is one step; the dot hides it from readers after a kill."""
    target.parent.mkdir(parents=True, exist_ok=True)
    return target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
