import random

from mgie.engine.admission import Admission


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


def test_one_larger_than_the_limit_goes_in_alone_after_its_turn() -> None:
    admission: Admission[str] = Admission(max_pixels=10, max_waiting=9)
    admission.enter("small", 1)
    admission.admit()
    admission.enter("huge", 25)
    admission.enter("next", 10)
    assert admission.admit() == []
    admission.leave("small")
    assert admission.admit() == ["huge"]
    admission.leave("huge")
    assert admission.admit() == ["next"]


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


def test_who_comes_first_in_order_passes_those_behind_and_never_those_before() -> None:
    admission: Admission[str] = Admission(max_pixels=1, max_waiting=100)
    admission.enter("inside", 1, order=0)
    admission.admit()
    for name, order in {"a": 30, "b": 5, "c": 30, "d": 6, "e": 29, "f": 31}.items():
        assert admission.enter(name, 1, order=order)
    assert admission.position("a") == 3
    came_in = []
    for name in ["inside", *"bdeac"]:
        admission.leave(name)
        came_in += admission.admit()
    assert came_in == list("bdeacf")


def test_one_that_lets_others_pass_waits_no_longer_than_its_patience() -> None:
    """One place, held for 1; something comes every 1: without an end to its patience the first would starve."""
    patience, admission = 30, Admission[str](max_pixels=1, max_waiting=1000)
    admission.enter("inside", 1)
    admission.admit()
    admission.enter("batch", 1, order=0 + patience)
    inside, waited = "inside", 0
    while inside != "batch":
        admission.enter(f"interactive {waited}", 1, order=waited)
        admission.leave(inside)
        (inside,) = admission.admit()
        waited += 1
    assert waited == patience + 1  # those of the times 0 to 29, and then itself, before that of the time 30


def test_room_is_for_whoever_is_first_even_if_the_line_is_full_of_others() -> None:
    admission: Admission[str] = Admission(max_pixels=10, max_waiting=1)
    admission.enter("inside", 6, order=0)
    admission.admit()
    assert admission.enter("large", 10, order=30)
    assert not admission.enter("later", 1, order=31)
    assert admission.enter("first", 1, order=1)
    assert admission.admit() == ["first"]


def test_the_first_in_line_is_passed_as_often_whoever_comes_before_it_meanwhile() -> None:
    admission: Admission[object] = Admission(max_pixels=10, max_waiting=100)
    admission.enter("small", 1, order=0)
    admission.admit()
    admission.enter("large", 10, order=5)
    passed = 0
    for i in range(100):
        admission.enter(i, 1, order=6)  # behind it
        passed += len(admission.admit())
        admission.leave(i)
        admission.enter(-i - 1, 1, order=1)  # before it: its turn, no pass
        assert admission.admit() == [-i - 1]
        admission.leave(-i - 1)
    assert passed == 8
