"""Turns against what fairness means, step by step."""

import random
from collections import Counter

from mgie.engine.fair_scheduler import FairScheduler


def make(max_rows: int = 8, **keys: str) -> FairScheduler[str]:
    turns: FairScheduler[str] = FairScheduler(max_rows)
    for name, key in keys.items():
        turns.join(name, key=key, rows=1, cost=1.0)
    return turns


def test_equal_keys_share_a_batch_and_different_ones_alternate() -> None:
    turns = make(a="x", b="x", c="y")
    assert [turns.next() for _ in range(4)] == [["a", "b"], ["c"], ["a", "b"], ["c"]]


def test_who_comes_late_is_in_the_next_step_and_delays_the_others_by_no_more_than_that() -> None:
    turns = make(a="x", b="y")
    for _ in range(101):
        turns.next()
    turns.join("late", key="x", rows=1, cost=1.0)
    assert turns.next() == ["late", "a"]
    turns.join("other", key="z", rows=1, cost=1.0)
    assert turns.next() == ["other"]
    steps = Counter(name for _ in range(90) for name in turns.next())
    assert set(steps) == {"a", "late", "b", "other"}
    assert all(29 <= count <= 31 for count in steps.values())


def test_those_that_have_not_begun_go_in_the_order_in_which_they_came() -> None:
    turns = make(a="x", b="y")
    for _ in range(10):
        turns.next()
    turns.join("c", key="z", rows=1, cost=9.0)
    turns.next()
    turns.join("first", key="z", rows=1, cost=9.0)  # level with its mates, who are far ahead
    turns.join("second", key="x", rows=1, cost=1.0)
    assert turns.next() == ["first", "c"]
    turns.join("third", key="y", rows=1, cost=1.0)
    assert turns.next() == ["second", "a"]
    assert turns.next() == ["third", "b"]


def test_a_key_with_more_than_fits_a_batch_rotates() -> None:
    turns = make(2, a="x", b="x", c="x")
    assert Counter(name for _ in range(30) for name in turns.next()) == {"a": 20, "b": 20, "c": 20}


def test_work_not_steps_is_shared_out() -> None:
    turns: FairScheduler[str] = FairScheduler(8)
    turns.join("small", key="x", rows=1, cost=1.0)
    turns.join("large", key="y", rows=3, cost=3.0)
    assert Counter(name for _ in range(40) for name in turns.next()) == {"small": 30, "large": 10}


def test_a_sample_of_more_rows_than_the_largest_batch_goes_alone() -> None:
    turns: FairScheduler[str] = FairScheduler(2)
    turns.join("a", key="x", rows=3, cost=3.0)
    turns.join("b", key="x", rows=3, cost=3.0)
    assert [turns.next() for _ in range(3)] == [["a"], ["b"], ["a"]]


def test_nobody_starves_while_others_come_and_go() -> None:
    chance = random.Random(0)
    turns = make(4, old="x")
    present: list[str] = []
    waited = 0
    for i in range(2000):
        if chance.random() < 0.5 and len(present) < 6:
            present.append(f"{i}")
            turns.join(present[-1], key=chance.choice("xyz"), rows=chance.choice([1, 3]), cost=1.0)
        elif present:
            turns.leave(present.pop(chance.randrange(len(present))))
        waited = 0 if "old" in turns.next() else waited + 1
        assert waited < 20


def test_nothing_comes_of_nothing() -> None:
    turns = make(a="x")
    turns.leave("a")
    turns.leave("never there")
    assert turns.next() == []
    assert len(turns) == 0
