"""Who may come in: a bounded line in front of a bounded amount of memory, counted in pixels.

Knows nothing of models or threads: the caller holds the lock.
"""

from collections.abc import Hashable
from typing import Generic, TypeVar

from mgie.errors import ConfigError

ItemT = TypeVar("ItemT", bound=Hashable)

# So often may those that fit pass the first in line that does not: the memory is used, and nobody waits for ever.
_MAX_PASSES = 8


class Admission(Generic[ItemT]):
    """Items that wait, first come first served, and items that are in.

    Args:
        max_pixels: Of all that are in.
        max_waiting: Length of the line.
    """

    def __init__(self, *, max_pixels: int, max_waiting: int) -> None:
        self._max_pixels, self._max_waiting = max_pixels, max_waiting
        self._waiting: dict[ItemT, int] = {}  # -> pixels, in order of arrival
        self._inside: dict[ItemT, int] = {}
        self._passes = 0  # of the first in line

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
        """Of all that are in."""
        return sum(self._inside.values())

    def enter(self, item: ItemT, pixels: int) -> bool:
        """Puts the item in line; False where there is no room, neither inside nor in line.

        Raises:
            ConfigError: It could never come in.
        """
        if pixels > self._max_pixels:
            raise ConfigError(f"the edit takes {pixels} pixels in flight; at most {self._max_pixels} are allowed")
        has_room = not self._waiting and self.pixels + pixels <= self._max_pixels
        if not has_room and len(self._waiting) >= self._max_waiting:
            return False
        self._waiting[item] = pixels
        return True

    def admit(self) -> list[ItemT]:
        """The items that come in now."""
        admitted: list[ItemT] = []
        free = self._max_pixels - self.pixels
        is_first = True
        for item, pixels in list(self._waiting.items()):
            if pixels <= free and (is_first or self._passes < _MAX_PASSES):
                self._passes = 0 if is_first else self._passes + 1
                self._inside[item] = self._waiting.pop(item)
                free -= pixels
                admitted.append(item)
            else:
                is_first = False
        return admitted

    def leave(self, item: ItemT) -> None:
        """Frees the item's place, in line or inside."""
        if next(iter(self._waiting), None) == item:
            self._passes = 0
        self._waiting.pop(item, None)
        self._inside.pop(item, None)

    def position(self, item: ItemT) -> int | None:
        """Place in line from 0; None for those that are not in it."""
        return next((place for place, waiting in enumerate(self._waiting) if waiting == item), None)
