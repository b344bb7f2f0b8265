"""Which sample comes when: a permutation per epoch with random access, and the mixing of several ledgers.

A run is one endless sequence of samples with one global index; step s takes the indices from s times the global
batch on, whatever the number of workers. An epoch permutes all rows: 8 bytes of memory for each. Runs of version 0.1.0
permuted shards of neighbouring rows and then the rows within each, and go on so.

Knows nothing of what a row is.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from mgie.errors import ConfigError

_CYCLE = 1024  # draws of a mixture over which every ledger has its share, to within one draw


@dataclass(frozen=True)
class Place:
    """A sample: `row` of ledger `source`, which is read for the `epoch`-th time (from 0)."""

    source: int
    epoch: int
    row: int


class EpochOrder:
    """All rows of one ledger, epoch after epoch.

    Args:
        num_rows: At least 1.
        key: What the permutations follow from, with `seed`; tells ledgers of one run apart.
        shard_rows: Neighbouring rows that stay together; 0 = none do.
    """

    def __init__(self, num_rows: int, *, seed: int, key: int = 0, shard_rows: int = 0) -> None:
        if num_rows < 1:
            raise ConfigError(f"num_rows is {num_rows}; an order needs at least 1 row", param="num_rows")
        self._num_rows, self._seed, self._key, self._shard_rows = num_rows, seed, key, shard_rows or num_rows
        self._starts = lru_cache(maxsize=2)(self._epoch_starts)
        self._within = lru_cache(maxsize=2)(self._shard_rows_of)

    def __getitem__(self, index: int) -> tuple[int, int]:
        """Epoch and row of the sample with this index."""
        epoch, place = divmod(index, self._num_rows)
        shards, starts = self._starts(epoch)
        slot = int(np.searchsorted(starts, place, side="right")) - 1
        shard = int(shards[slot])
        return epoch, shard * self._shard_rows + int(self._within(epoch, shard)[place - int(starts[slot])])

    def _epoch_starts(self, epoch: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Shards in the epoch's order, and the place of the first row of each."""
        num_shards = -(-self._num_rows // self._shard_rows)
        shards = permutation(num_shards, self._seed, self._key, epoch)
        sizes = np.full(num_shards, self._shard_rows)
        sizes[shards == num_shards - 1] = self._num_rows - (num_shards - 1) * self._shard_rows
        return shards, np.concatenate([[0], np.cumsum(sizes)[:-1]])

    def _shard_rows_of(self, epoch: int, shard: int) -> npt.NDArray[np.int64]:
        size = min(self._shard_rows, self._num_rows - shard * self._shard_rows)
        return permutation(size, self._seed, self._key, epoch, shard)


class MixedOrder:
    """Samples of several ledgers, each by its weight; a ledger that is used up begins its next epoch.

    Args:
        num_rows: Number of rows of each ledger.
        weights: Relative shares of the samples; None = the ledgers are one: all rows alike often.
        shard_rows: See `EpochOrder`.
    """

    def __init__(
        self, num_rows: Sequence[int], *, seed: int, weights: Sequence[float] | None = None, shard_rows: int = 0
    ) -> None:
        self._ends = np.cumsum(num_rows)
        self._one = EpochOrder(int(self._ends[-1]), seed=seed, shard_rows=shard_rows) if weights is None else None
        self._orders = [
            EpochOrder(count, seed=seed, key=key, shard_rows=shard_rows) for key, count in enumerate(num_rows)
        ]
        if weights is not None and (len(weights) != len(num_rows) or min(weights) <= 0):
            raise ConfigError(
                f"weights are {list(weights)}; each of {len(num_rows)} ledgers needs one above 0", param="weights"
            )
        self._seed = seed
        self._counts = _shares(weights or [1.0])
        self._slots = lru_cache(maxsize=2)(self._cycle_slots)

    def __getitem__(self, index: int) -> Place:
        """The sample with this global index, from 0."""
        if self._one is not None:
            epoch, row = self._one[index]
            source = int(np.searchsorted(self._ends, row, side="right"))
            return Place(source, epoch, row - (int(self._ends[source - 1]) if source else 0))
        cycle, slot = divmod(index, _CYCLE)
        slots, before = self._slots(cycle)
        source = int(slots[slot])
        return Place(source, *self._orders[source][cycle * int(self._counts[source]) + int(before[slot])])

    def _cycle_slots(self, cycle: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Ledger of each slot of a cycle, and how many slots of the cycle it had before."""
        slots = np.repeat(np.arange(len(self._counts)), self._counts)[permutation(_CYCLE, self._seed, -1, cycle)]
        before = np.empty(_CYCLE, dtype=np.int64)
        for source in range(len(self._counts)):
            places = np.flatnonzero(slots == source)
            before[places] = np.arange(len(places))
        return slots, before


def permutation(count: int, *key: int) -> npt.NDArray[np.int64]:
    """Permutation of range(count) that follows from `key` alone.

    Sorts raw Philox output, whose stream numpy guarantees; that of `Generator.permutation` it does not.
    """
    bits = np.random.Philox(key=key_bits(*key)).random_raw(count)
    return np.argsort(bits, kind="stable")


def key_bits(*key: int | str) -> int:
    """128 bits that follow from the key alone."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:16], "big")


def _shares(weights: Sequence[float]) -> npt.NDArray[np.int64]:
    """Whole numbers near the weights' shares that sum to a cycle, each at least 1 (largest remainder).

    Raises:
        ConfigError: A share is below one draw in a cycle.
    """
    exact = np.array(weights) / sum(weights) * _CYCLE
    counts = np.floor(exact).astype(np.int64)
    for place in np.argsort(counts - exact, kind="stable")[: _CYCLE - int(counts.sum())]:
        counts[place] += 1
    if counts.min() < 1:
        small = int(counts.argmin())
        raise ConfigError(
            f"weight {weights[small]} of ledger {small} is less than 1/{_CYCLE} of all; leave it out", param="weights"
        )
    return counts
