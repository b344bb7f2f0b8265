"""Whose turn it is: which samples share the next step, when those of different sizes cannot share one.

Each sample has an account of the work that was done for it. The next batch is that of the sample with the
smallest account, filled with others of its key, the smallest first; everyone in it is charged an equal part. So
all samples advance at the same rate of work whatever their size and whoever shares their key, and a key with many
samples gets more steps' work, not more steps. Those that have not begun go first, in the order in which they came: one that
comes alone is in the next step and delays the others by one; of several with different keys each waits for those before it.

Knows nothing of models or threads: the caller holds the lock.

Source: start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996) with samples as flows.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

ItemT = TypeVar("ItemT", bound=Hashable)


@dataclass(kw_only=True)
class _Account:
    key: Hashable
    rows: int
    cost: float
    spent: float
    number: int
    has_begun: bool = False

    @property
    def order(self) -> tuple[bool, float, int]:
        return self.has_begun, self.spent if self.has_begun else 0.0, self.number


class FairScheduler(Generic[ItemT]):
    """The samples that are being denoised.

    Args:
        max_rows: Largest batch, in rows of the denoiser; a sample with more than that goes alone.
    """

    def __init__(self, max_rows: int) -> None:
        self.max_rows = max_rows
        self._accounts: dict[ItemT, _Account] = {}
        self._number = 0

    def __len__(self) -> int:
        return len(self._accounts)

    def join(self, item: ItemT, *, key: Hashable, rows: int, cost: float) -> None:
        """From now on the item takes its turns.

        Args:
            item: A sample.
            key: Only equal ones share a batch.
            rows: Rows of the denoiser's batch that it takes.
            cost: Work of a step of it.
        """
        # Who comes starts level with those furthest behind, or it would be served until it had caught up.
        mates = [account.spent for account in self._accounts.values() if account.key == key]
        others = [account.spent for account in self._accounts.values()]
        spent = min(mates or others, default=0.0)
        self._accounts[item] = _Account(key=key, rows=rows, cost=cost, spent=spent, number=self._number)
        self._number += 1

    def leave(self, item: ItemT) -> None:
        """The item, if it is there, takes no more turns."""
        self._accounts.pop(item, None)

    def next(self) -> list[ItemT]:
        """The items of the next step, charged for it; empty where there are none."""
        if not self._accounts:
            return []
        key = min(self._accounts.values(), key=lambda account: account.order).key
        group = sorted(
            ((item, account) for item, account in self._accounts.items() if account.key == key),
            key=lambda pair: pair[1].order,
        )
        batch: list[tuple[ItemT, _Account]] = []
        rows = 0
        for item, account in group:
            if batch and rows + account.rows > self.max_rows:
                break
            batch.append((item, account))
            rows += account.rows
        charge = sum(account.cost for _, account in batch) / len(batch)
        for _, account in batch:
            account.spent += charge
            account.has_begun = True
        return [item for item, _ in batch]
