"""What one key may use: closed forms with a clock of the test's."""

import asyncio
import contextlib
import random

import pytest

from mgie.errors import DeadlineError
from serving.access.limits import Allowance, Charge, EditLimits, KeyLimits, TokenBucket, pixel_steps
from serving.errors import CancelledEditError, LimitError, RequestError, StageUnavailableError
from serving.schema import EditForm
from serving.stages.messages import BundleInfo


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_bucket_holds_a_minute_and_refills_at_its_rate(clock: Clock) -> None:
    bucket = TokenBucket(60, clock=clock)
    assert [bucket.take(1) for _ in range(60)] == [0.0] * 60
    assert bucket.take(1) == pytest.approx(1.0)
    clock.now_s += 0.75
    assert bucket.take(1) == pytest.approx(0.25)
    clock.now_s += 0.25
    assert bucket.take(1) == 0.0
    assert bucket.full_in_s == pytest.approx(60.0)
    clock.now_s += 3600
    assert bucket.level == 60


def test_what_is_larger_than_the_bucket_passes_when_it_is_full_and_leaves_a_debt(clock: Clock) -> None:
    bucket = TokenBucket(10, clock=clock)
    assert bucket.take(25) == 0.0
    assert bucket.level == -15
    assert bucket.take(1) == pytest.approx(16 * 6)  # 10 a minute: one in 6 s
    assert bucket.take(25) == pytest.approx(25 * 6)  # not before it is full


def test_over_a_long_time_no_bucket_lets_more_through_than_its_rate(clock: Clock) -> None:
    chance = random.Random(0)
    for per_minute in (0.5, 7, 100):
        bucket, taken, began_s = TokenBucket(per_minute, clock=clock), 0.0, clock.now_s
        for _ in range(5000):
            amount = chance.uniform(0.1, 2) * per_minute
            wait_s = bucket.take(amount)
            if wait_s == 0.0:
                taken += amount
            clock.now_s += chance.uniform(0, 20)
            minutes = (clock.now_s - began_s) / 60
            assert taken <= per_minute * (minutes + 1) + 2 * per_minute  # one bucket full, and one debt
        assert taken > 0.9 * per_minute * minutes  # and hardly less


def test_whoever_waits_as_long_as_told_gets_it(clock: Clock) -> None:
    chance, bucket = random.Random(1), TokenBucket(30, clock=clock)
    num_refused = 0
    for _ in range(500):
        amount = chance.uniform(1, 60)
        wait_s = bucket.take(amount)
        if wait_s > 0:
            num_refused += 1
            clock.now_s += wait_s + 1e-6
            assert bucket.take(amount) == 0.0
    assert num_refused > 100


def test_replicas_share_a_rate(clock: Clock) -> None:
    limits = KeyLimits(requests_per_minute=60, max_concurrent=3, pixel_steps_per_minute=600)
    allowances = [Allowance(limits, num_sharing=4, clock=clock) for _ in range(4)]
    for allowance in allowances:
        for _ in range(15):
            allowance.request()
        with pytest.raises(LimitError) as caught:
            allowance.request()
        assert (caught.value.code, caught.value.retry_after_s) == ("rate_limited", pytest.approx(4.0))
        with allowance.edit(), pytest.raises(LimitError, match="3 edits under way"), allowance.edit():
            pass
        allowance.charge(600)  # more than a part of the rate, not more than the rate


def test_places_for_edits_are_given_back_however_they_end(clock: Clock) -> None:
    allowance = Allowance(KeyLimits(max_concurrent=2), clock=clock)
    for _ in range(3):
        with contextlib.suppress(KeyError), allowance.edit(), allowance.edit():
            with pytest.raises(LimitError) as caught, allowance.edit():
                pass
            assert caught.value.code == "too_many_concurrent"
            raise KeyError
    with allowance.edit(), allowance.edit():
        pass


def test_an_edit_that_never_fits_is_another_error_than_one_that_does_not_fit_now(clock: Clock) -> None:
    allowance = Allowance(KeyLimits(pixel_steps_per_minute=100), clock=clock)
    with pytest.raises(RequestError, match=r"costs 101 pixel-steps .* at most 100 a minute") as never:
        allowance.charge(101)
    assert never.value.code == "cost_too_high"
    allowance.charge(70)
    with pytest.raises(LimitError) as later:
        allowance.charge(70)
    assert (later.value.code, later.value.retry_after_s) == ("cost_limited", pytest.approx(24.0))
    clock.now_s += later.value.retry_after_s + 1e-6
    allowance.charge(70)


def test_without_limits_nothing_is_limited(clock: Clock) -> None:
    allowance = Allowance(KeyLimits(), clock=clock)
    for _ in range(1000):
        allowance.request()
        with allowance.edit():
            allowance.charge(10**15)


def test_changed_limits_hold_at_once_and_equal_ones_change_nothing(clock: Clock) -> None:
    allowance = Allowance(KeyLimits(requests_per_minute=2), clock=clock)
    allowance.request()
    allowance.request()
    allowance.limit(KeyLimits(requests_per_minute=2, max_concurrent=1))
    with pytest.raises(LimitError, match="2 requests a minute"):
        allowance.request()
    with allowance.edit(), pytest.raises(LimitError), allowance.edit():
        pass
    allowance.limit(KeyLimits(requests_per_minute=3))
    for _ in range(3):
        allowance.request()
    with pytest.raises(LimitError, match="3 requests a minute"):
        allowance.request()


@pytest.mark.parametrize(
    ("error", "used", "paid"),
    [
        (None, 0.0, 100),  # it was done, whatever was seen of it
        (StageUnavailableError("m"), 0.5, 0),
        (RuntimeError("a fault of ours"), 1.0, 0),
        (RequestError("found before a step"), 0.0, 0),
        (asyncio.CancelledError(), 0.0, 0),
        (asyncio.CancelledError(), 0.25, 25),
        (asyncio.CancelledError(), 1.0, 100),
        (CancelledEditError("m"), 0.25, 25),
        (DeadlineError("m"), 0.25, 25),
        (GeneratorExit(), 0.5, 50),
    ],
)
def test_what_an_edit_did_not_use_is_given_back(
    clock: Clock, error: BaseException | None, used: float, paid: int
) -> None:
    bucket = TokenBucket(1000, clock=clock)
    bucket.take(100)
    charge = Charge(bucket, 100)
    settled = charge.settled()
    settled.__enter__()
    charge.use(used)
    assert not settled.__exit__(error and type(error), error, None)  # which goes on its way
    assert bucket.level == 1000 - paid


def test_nothing_is_given_back_twice(clock: Clock) -> None:
    bucket = TokenBucket(1000, clock=clock)
    bucket.take(300)
    charge = Charge(bucket, 100)
    with pytest.raises(RuntimeError), charge.settled():
        raise RuntimeError
    charge.give_back()
    assert bucket.level == 800


def test_the_cost_of_an_edit_is_its_pixels_times_steps_times_results() -> None:
    bundle = BundleInfo(
        name="b", identity="i", trained=True, made_by="m", work_area_px=128 * 128, defaults={"steps": 20}
    )
    assert pixel_steps(EditForm(prompt="p"), bundle) == 128 * 128 * 20
    assert pixel_steps(EditForm(prompt="p", steps=7, n=3), bundle) == 128 * 128 * 21


@pytest.mark.parametrize(
    ("given", "param", "words"),
    [
        ({"steps": 11}, "steps", "steps is 11; this service allows at most 10"),
        ({"n": 3}, "n", "n is 3; this service allows at most 2"),
        ({"prompt": "x" * 6}, "prompt", "prompt is 6 characters; this service allows at most 5"),
        ({"expressive": "x" * 6}, "expressive", "expressive is 6 characters"),
    ],
)
def test_everybodys_limits_name_the_field(given: dict[str, object], param: str, words: str) -> None:
    limits = EditLimits(max_steps=10, max_n=2, max_prompt_chars=5)
    limits.check(EditForm(prompt="xxxxx", expressive="xxxxx", steps=10, n=2))
    with pytest.raises(RequestError, match=words) as caught:
        limits.check(EditForm.model_validate({"prompt": "p"} | given))
    assert caught.value.param == param
