"""When a model is asked to show that it works, and what comes of it."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from serving.stages.health import Health


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Trials:
    """Counts the trials; `outcome` is what the next one does."""

    def __init__(self) -> None:
        self.num_trials = 0
        self.outcome: Callable[[], Awaitable[object]] = self.succeed

    async def __call__(self) -> None:
        self.num_trials += 1
        await self.outcome()

    async def succeed(self) -> None:
        pass

    async def fail(self) -> None:
        raise ValueError("out of memory")

    async def hang(self) -> None:
        await asyncio.Event().wait()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def trials() -> Trials:
    return Trials()


@pytest.fixture
def health(clock: Clock, trials: Trials) -> Health:
    return Health(trials, period_s=10, timeout_s=0.01, clock=clock)


def test_the_first_check_is_a_trial_and_its_success_lasts_for_the_period(
    health: Health, clock: Clock, trials: Trials
) -> None:
    asyncio.run(health.check())
    assert trials.num_trials == 1
    clock.now_s += 9.9
    asyncio.run(health.check())
    assert trials.num_trials == 1
    clock.now_s += 0.1
    asyncio.run(health.check())
    assert trials.num_trials == 2


def test_a_model_that_does_real_work_needs_no_trial(health: Health, clock: Clock, trials: Trials) -> None:
    for _ in range(5):
        clock.now_s += 9
        health.note_work()
        clock.now_s += 9
        asyncio.run(health.check())
    assert trials.num_trials == 0


def test_a_trial_that_raises_fails_its_own_check_only(health: Health, trials: Trials) -> None:
    trials.outcome = trials.fail
    with pytest.raises(RuntimeError, match="a trial of the model failed: out of memory"):
        asyncio.run(health.check())
    trials.outcome = trials.succeed
    asyncio.run(health.check())
    assert trials.num_trials == 2


def test_a_timeout_inside_the_trial_is_no_hanging(health: Health, trials: Trials) -> None:
    async def time_out() -> None:
        raise TimeoutError("of something else")

    trials.outcome = time_out
    with pytest.raises(RuntimeError, match="failed: of something else"):
        asyncio.run(health.check())


def test_a_trial_that_hangs_fails_this_check_and_all_later_ones_at_once(health: Health, trials: Trials) -> None:
    trials.outcome = trials.hang
    with pytest.raises(RuntimeError, match=r"not done within 0\.01 s"):
        asyncio.run(health.check())
    for _ in range(2):
        with pytest.raises(RuntimeError, match="done nothing since"):
            asyncio.run(health.check())
    assert trials.num_trials == 1


def test_a_model_that_comes_back_to_life_is_healthy(health: Health, trials: Trials) -> None:
    trials.outcome = trials.hang
    with pytest.raises(RuntimeError):
        asyncio.run(health.check())
    health.note_work()
    asyncio.run(health.check())
    assert trials.num_trials == 1


def test_a_trial_that_is_late_because_of_real_work_is_no_failure(health: Health, clock: Clock, trials: Trials) -> None:
    async def wait_behind_work() -> None:
        clock.now_s += 1
        health.note_work()
        await asyncio.Event().wait()

    trials.outcome = wait_behind_work
    asyncio.run(health.check())
