"""The sample order: every row once per epoch, random access, shares of a mixture."""

from collections import Counter

import numpy as np
import pytest

from mgie.data.order import EpochOrder, MixedOrder, permutation
from mgie.errors import ConfigError


@pytest.mark.parametrize("num_rows", [1, 7, 8, 9, 50])
def test_an_epoch_has_every_row_once(num_rows: int) -> None:
    order = EpochOrder(num_rows, seed=3, shard_rows=8)
    for epoch in range(3):
        places = [order[index] for index in range(epoch * num_rows, (epoch + 1) * num_rows)]
        assert {e for e, _ in places} == {epoch}
        assert sorted(row for _, row in places) == list(range(num_rows))


def test_epochs_and_seeds_and_keys_have_orders_of_their_own() -> None:
    def epoch(order: EpochOrder, number: int) -> tuple[int, ...]:
        return tuple(order[number * 40 + i][1] for i in range(40))

    orders = [EpochOrder(40, seed=seed, key=key, shard_rows=8) for seed, key in ((0, 0), (1, 0), (0, 1))]
    assert len({epoch(order, number) for order in orders for number in range(3)}) == 9


@pytest.mark.parametrize("sizes", [[20_000], [10_000, 10_000]])
def test_batches_mix_rows_from_everywhere(sizes: list[int]) -> None:
    """Each of 64 samples is as likely from any tenth of the rows: almost no batch misses more than two tenths."""
    order = MixedOrder(sizes, seed=1)
    starts = [0, *sizes]
    rows = np.array([starts[place.source] + place.row for place in (order[i] for i in range(20_000))])
    tenths = [len(set(batch)) for batch in (rows // 2000)[:19_968].reshape(-1, 64)]
    assert min(tenths) >= 8


def test_runs_of_version_0_1_keep_rows_that_lie_together_together() -> None:
    order = EpochOrder(64, seed=0, shard_rows=16)
    shards = [order[index][1] // 16 for index in range(64)]
    assert all(len(set(shards[start : start + 16])) == 1 for start in range(0, 64, 16))
    assert shards != sorted(shards)


def test_access_in_any_order_gives_the_same_places() -> None:
    forward = [EpochOrder(30, seed=5, shard_rows=7)[index] for index in range(90)]
    order = EpochOrder(30, seed=5, shard_rows=7)
    assert [order[index] for index in reversed(range(90))] == forward[::-1]


def test_the_order_is_the_same_for_ever() -> None:
    """Recorded from this code: a run must be able to go on under another version of a library."""
    assert permutation(8, 0, 0, 0).tolist() == [5, 2, 3, 1, 0, 6, 7, 4]
    assert [EpochOrder(1000, seed=1)[index][1] for index in (0, 1, 999, 1000)] == [704, 977, 5, 639]
    old = EpochOrder(5000, seed=1, shard_rows=2048)
    assert [old[index][1] for index in (0, 1, 4999, 5000)] == [3488, 3934, 4804, 4715]
    new = EpochOrder(5000, seed=1)
    assert [new[index][1] for index in (0, 1, 4999, 5000)] == [3652, 1559, 2995, 1117]


def test_a_mixture_of_one_is_that_ledger() -> None:
    mixed, alone = MixedOrder([10], seed=2), EpochOrder(10, seed=2)
    assert [(p.epoch, p.row) for p in (mixed[i] for i in range(25))] == [alone[i] for i in range(25)]


def test_ledgers_get_their_shares_and_each_is_read_in_its_own_order() -> None:
    mixed = MixedOrder([100, 5000], seed=4, weights=[3, 1])
    places = [mixed[index] for index in range(2048)]
    assert Counter(place.source for place in places) == {0: 1536, 1: 512}
    for source, num_rows in enumerate((100, 5000)):
        own = EpochOrder(num_rows, seed=4, key=source)
        found = [(place.epoch, place.row) for place in places if place.source == source]
        assert found == [own[index] for index in range(len(found))]
    assert max(place.epoch for place in places if place.source == 0) == 15  # 1,536 samples of 100 rows


@pytest.mark.parametrize("sizes", [[300, 100], [2500, 1, 40]])
def test_without_weights_every_row_of_every_ledger_comes_once_an_epoch(sizes: list[int]) -> None:
    mixed, total = MixedOrder(sizes, seed=0), sum(sizes)
    expected = sorted((source, row) for source, size in enumerate(sizes) for row in range(size))
    for epoch in range(2):
        places = [mixed[index] for index in range(epoch * total, (epoch + 1) * total)]
        assert {place.epoch for place in places} == {epoch}
        assert sorted((place.source, place.row) for place in places) == expected


@pytest.mark.parametrize(
    ("weights", "message"), [([1.0], "each of 2"), ([1.0, 0.0], "above 0"), ([1.0, 1e-6], "leave it out")]
)
def test_bad_weights_are_refused(weights: list[float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MixedOrder([10, 10], seed=0, weights=weights)


def test_an_order_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="num_rows is 0"):
        EpochOrder(0, seed=0)
