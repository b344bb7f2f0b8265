"""Who may come in: a bounded line in front of a bounded amount of memory, counted in pixels.

Knows nothing of models or threads: the caller holds the lock.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

ItemT = TypeVar("ItemT", bound=Hashable)

# So often may those that fit pass the first in line that does not: the memory is used, and nobody waits for ever.
_MAX_PASSES = 8


@dataclass(kw_only=True)
class _Waiting:
    pixels: int
    order: float
    num_passes: int = 0
    "how many were let past while it was first in line"


class Admission(Generic[ItemT]):
    """Items that wait in order, and items that are in.

    Args:
        max_pixels: Limit for the pixels of all that are in; an item with more than that goes in alone.
        max_waiting: Length of the line.
    """

    def __init__(self, *, max_pixels: int, max_waiting: int) -> None:
        self._max_pixels, self._max_waiting = max_pixels, max_waiting
        self._waiting: dict[ItemT, _Waiting] = {}  # in order
        self._inside: dict[ItemT, int] = {}  # -> pixels

    @property
    def num_waiting(self) -> int:
        """Length of the line."""
        return len(self._waiting)

    @property
    def num_inside(self) -> int:
        """Items that are in."""
        return len(self._inside)

    @property
    def pixels(self) -> int:
        """Pixels of all that are in."""
        return sum(self._inside.values())

    def enter(self, item: ItemT, pixels: int, *, order: float = 0.0) -> bool:
        """Puts the item in line; False where there is no room, neither inside nor in line.

        Args:
            item: Not there yet.
            pixels: Pixels that it takes inside.
            order: Decides its place in line: behind those of a smaller or equal one.
        """
        is_first = all(order < other.order for other in self._waiting.values())
        has_room = is_first and self._fits(pixels)
        if not has_room and len(self._waiting) >= self._max_waiting:
            return False
        self._waiting[item] = _Waiting(pixels=pixels, order=order)
        self._waiting = dict(sorted(self._waiting.items(), key=lambda pair: pair[1].order))
        return True

    def admit(self) -> list[ItemT]:
        """The items that come in now."""
        admitted: list[ItemT] = []
        first: _Waiting | None = None  # in line that does not fit
        for item, waiting in list(self._waiting.items()):
            if self._fits(waiting.pixels) and (first is None or first.num_passes < _MAX_PASSES):
                if first is not None:
                    first.num_passes += 1
                self._inside[item] = self._waiting.pop(item).pixels
                admitted.append(item)
            elif first is None:
                first = waiting
        return admitted

    def _fits(self, pixels: int) -> bool:
        return not self._inside or self.pixels + pixels <= self._max_pixels

    def leave(self, item: ItemT) -> None:
        """Frees the item's place, in line or inside."""
        self._waiting.pop(item, None)
        self._inside.pop(item, None)

    def position(self, item: ItemT) -> int | None:
        """Place in line from 0; None for those that are not in it."""
        return next((place for place, waiting in enumerate(self._waiting) if waiting == item), None)
