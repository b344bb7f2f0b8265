"""A batch that fails is halved down to the item at fault, so that one never costs its neighbours."""

import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from mgie.errors import ConfigError, EditStoppedError, MGIEError

Item = TypeVar("Item")
Result = TypeVar("Result")


def bisect_failures(
    work: Callable[[Sequence[Any]], list[Result]],
    items: Sequence[Item],
    *,
    key: Callable[[Item], Any] = lambda item: item,
) -> list[Result | Exception]:
    """Results of `work` on all items; a batch that fails is halved, down to the single item at fault.

    Memory that ran out and errors of ours are taken so; a single item that fails gives its exception as its
    result. Anything else is a bug and is raised.
    """
    if not items:
        return []
    try:
        results = work([key(item) for item in items])
    except (RuntimeError, MGIEError) as error:
        is_full = _is_out_of_memory(error)
        if isinstance(error, ConfigError | EditStoppedError) or not (is_full or isinstance(error, MGIEError)):
            raise  # wrong for every row, the caller's wish, or a bug
        if len(items) == 1:
            return [error]
        if is_full and (torch := sys.modules["torch"]).cuda.is_available():
            torch.cuda.empty_cache()
    else:
        return list(results)
    middle = len(items) // 2
    return [*bisect_failures(work, items[:middle], key=key), *bisect_failures(work, items[middle:], key=key)]


def one_line(error: Exception) -> str:
    """What an exception says, on one line of bounded length."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _is_out_of_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")  # whoever has not loaded it cannot have raised its error
    return torch is not None and isinstance(error, torch.OutOfMemoryError)
