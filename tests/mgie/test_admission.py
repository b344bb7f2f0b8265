import random

import pytest

from mgie.admission import Admission
from mgie.errors import ConfigError


def test_first_come_first_served_within_the_pixels_and_the_line() -> None:
    admission: Admission[str] = Admission(max_pixels=10, max_waiting=2)
    assert [admission.enter(name, 5) for name in "ab"] == [True, True]
    assert admission.admit() == ["a", "b"]
    assert [admission.enter(name, 5) for name in "cde"] == [True, True, False]
    assert admission.admit() == []
    assert (admission.position("c"), admission.position("d"), admission.position("a")) == (0, 1, None)
    admission.leave("b")
    assert admission.admit() == ["c"]
    assert (admission.num_waiting, admission.num_inside, admission.pixels) == (1, 2, 10)


def test_without_a_line_there_is_room_inside_only() -> None:
    admission: Admission[str] = Admission(max_pixels=10, max_waiting=0)
    assert admission.enter("a", 10)
    assert admission.admit() == ["a"]
    assert not admission.enter("b", 1)


def test_the_small_pass_a_large_one_but_not_for_ever() -> None:
    admission: Admission[object] = Admission(max_pixels=10, max_waiting=100)
    admission.enter("small", 1)
    admission.admit()
    admission.enter("large", 10)
    passed = 0
    for i in range(100):
        admission.enter(i, 1)
        passed += len(admission.admit())
        if i > 0:
            admission.leave(i - 1)
    assert passed == 8
    for i in range(100):
        admission.leave(i)
    admission.leave("small")
    assert admission.admit() == ["large"]


def test_one_that_passed_does_not_count_against_the_next_in_line() -> None:
    admission: Admission[object] = Admission(max_pixels=10, max_waiting=100)
    admission.enter("a", 9)
    admission.admit()
    for name in ("first", "second"):
        admission.enter(name, 10)
    for i in range(8):
        admission.enter(i, 1)
        admission.admit()
        admission.leave(i)
    admission.leave("first")
    admission.enter("late", 1)
    assert admission.admit() == ["late"]


def test_what_can_never_come_in_is_refused() -> None:
    with pytest.raises(ConfigError, match="takes 11 pixels in flight; at most 10"):
        Admission(max_pixels=10, max_waiting=1).enter("a", 11)


def test_nothing_is_lost_whatever_comes_and_goes() -> None:
    chance = random.Random(0)
    admission: Admission[int] = Admission(max_pixels=20, max_waiting=5)
    present: list[int] = []
    for i in range(2000):
        if chance.random() < 0.6:
            if admission.enter(i, chance.randint(1, 20)):
                present.append(i)
        elif present:
            admission.leave(present.pop(chance.randrange(len(present))))
        admission.admit()
        assert admission.pixels <= 20
        assert admission.num_waiting <= 5
        assert admission.num_waiting + admission.num_inside == len(present)
    for i in present:
        admission.leave(i)
    assert (admission.num_waiting, admission.num_inside, admission.pixels) == (0, 0, 0)
