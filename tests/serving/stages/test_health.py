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


class Probes:
    """Counts the probes; `outcome` is what the next one does."""

    def __init__(self) -> None:
        self.num_probes = 0
        self.outcome: Callable[[], Awaitable[object]] = self.succeed

    async def __call__(self) -> None:
        self.num_probes += 1
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
def probes() -> Probes:
    return Probes()


@pytest.fixture
def health(clock: Clock, probes: Probes) -> Health:
    return Health(probes, period_s=10, timeout_s=0.01, clock=clock)


def test_the_first_check_is_a_probe_and_its_success_lasts_for_the_period(
    health: Health, clock: Clock, probes: Probes
) -> None:
    asyncio.run(health.check())
    assert probes.num_probes == 1
    clock.now_s += 9.9
    asyncio.run(health.check())
    assert probes.num_probes == 1
    clock.now_s += 0.1
    asyncio.run(health.check())
    assert probes.num_probes == 2


def test_a_model_that_does_real_work_needs_no_probe(health: Health, clock: Clock, probes: Probes) -> None:
    for _ in range(5):
        clock.now_s += 9
        health.note_work()
        clock.now_s += 9
        asyncio.run(health.check())
    assert probes.num_probes == 0


def test_a_probe_that_raises_fails_its_own_check_only(health: Health, probes: Probes) -> None:
    probes.outcome = probes.fail
    with pytest.raises(RuntimeError, match="a probe of the model failed: out of memory"):
        asyncio.run(health.check())
    probes.outcome = probes.succeed
    asyncio.run(health.check())
    assert probes.num_probes == 2


def test_a_timeout_inside_the_probe_is_no_hanging(health: Health, probes: Probes) -> None:
    async def time_out() -> None:
        raise TimeoutError("of something else")

    probes.outcome = time_out
    with pytest.raises(RuntimeError, match="failed: of something else"):
        asyncio.run(health.check())


def test_a_probe_that_hangs_fails_this_check_and_all_later_ones_at_once(health: Health, probes: Probes) -> None:
    probes.outcome = probes.hang
    with pytest.raises(RuntimeError, match=r"not done within 0\.01 s"):
        asyncio.run(health.check())
    for _ in range(2):
        with pytest.raises(RuntimeError, match="done nothing since"):
            asyncio.run(health.check())
    assert probes.num_probes == 1


def test_a_model_that_comes_back_to_life_is_healthy(health: Health, probes: Probes) -> None:
    probes.outcome = probes.hang
    with pytest.raises(RuntimeError):
        asyncio.run(health.check())
    health.note_work()
    asyncio.run(health.check())
    assert probes.num_probes == 1


def test_a_probe_that_is_late_because_of_real_work_is_no_failure(health: Health, clock: Clock, probes: Probes) -> None:
    async def wait_behind_work() -> None:
        clock.now_s += 1
        health.note_work()
        await asyncio.Event().wait()

    probes.outcome = wait_behind_work
    asyncio.run(health.check())
