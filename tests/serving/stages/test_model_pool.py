"""The pool of models with strings for models, and loads that a test can hold up."""

import asyncio
import contextlib
import threading
from collections import Counter

import pytest

from mgie.errors import BundleError, ClosedError, ConfigError
from serving.errors import ModelUnavailableError
from serving.stages.model_pool import ModelPool
from tests.waiting import until_async


class Shelf:
    """Loads and closes names, and notes it."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.in_memory: Counter[str] = Counter()
        self.most = 0
        self.held: dict[str, threading.Event] = {}
        self.broken: set[str] = set()

    def load(self, name: str) -> str:
        if name in self.held:
            self.held[name].wait()
        if name in self.broken:
            raise BundleError("a file is damaged")
        self.events.append(f"+{name}")
        self.in_memory[name] += 1
        self.most = max(self.most, self.in_memory.total())
        return name

    def close(self, name: str) -> None:
        self.events.append(f"-{name}")
        self.in_memory[name] -= 1

    def pool(self, max_loaded: int) -> ModelPool[str]:
        return ModelPool(self.load, self.close, max_loaded=max_loaded)


async def use(pool: ModelPool[str], name: str, until: asyncio.Event | None = None) -> str:
    async with pool.use(name) as model:
        if until is not None:
            await until.wait()
        return model


def test_a_model_is_loaded_once_for_all_that_ask_and_stays() -> None:
    shelf = Shelf()
    pool = shelf.pool(2)

    async def main() -> None:
        assert set(await asyncio.gather(*(use(pool, "a") for _ in range(5)))) == {"a"}
        assert await use(pool, "a") == "a"

    asyncio.run(main())
    asyncio.run(use(pool, "a"))  # another event loop
    assert shelf.events == ["+a"]


def test_the_one_used_least_recently_makes_room() -> None:
    shelf = Shelf()
    pool = shelf.pool(2)

    async def main() -> None:
        for name in ("a", "b", "a", "c", "a"):
            await use(pool, name)

    asyncio.run(main())
    assert shelf.events == ["+a", "+b", "-b", "+c"]
    assert (list(pool.models()), shelf.most) == (["c", "a"], 2)


def test_a_model_in_use_is_not_closed_and_the_one_who_waits_for_its_room_is_next() -> None:
    shelf = Shelf()
    pool = shelf.pool(1)

    async def main() -> None:
        done = asyncio.Event()
        holder = asyncio.create_task(use(pool, "a", done))
        await until_async(lambda: "a" in pool.models())
        other = asyncio.create_task(use(pool, "b"))
        late = asyncio.create_task(use(pool, "a"))
        await asyncio.sleep(0.05)
        assert shelf.events == ["+a"]
        assert not other.done()
        assert not late.done()  # else a steady stream of edits would keep the other out for ever
        done.set()
        assert await asyncio.gather(holder, other, late) == ["a", "b", "a"]

    asyncio.run(main())
    assert shelf.events == ["+a", "-a", "+b", "-b", "+a"]
    assert shelf.most == 1


def test_loading_one_does_not_hold_up_another() -> None:
    shelf = Shelf()
    shelf.held["b"] = threading.Event()
    pool = shelf.pool(2)

    async def main() -> None:
        slow = asyncio.create_task(use(pool, "b"))
        for _ in range(3):
            assert await use(pool, "a") == "a"
        assert not slow.done()
        shelf.held["b"].set()
        assert await slow == "b"

    asyncio.run(main())


def test_a_failed_load_fails_those_who_asked_by_name_and_the_next_tries_again() -> None:
    shelf = Shelf()
    shelf.broken.add("b")
    pool = shelf.pool(1)

    async def main() -> None:
        assert await use(pool, "a") == "a"
        for failure in await asyncio.gather(*(use(pool, "b") for _ in range(3)), return_exceptions=True):
            assert isinstance(failure, ModelUnavailableError)
            assert str(failure) == "model 'b' cannot be loaded: a file is damaged"
        assert await use(pool, "a") == "a"
        shelf.broken.clear()
        assert await use(pool, "b") == "b"

    asyncio.run(main())


@pytest.mark.parametrize("held", ["a", "b"])
def test_who_gives_up_waiting_leaves_nothing_behind(held: str) -> None:
    shelf = Shelf()
    shelf.held[held] = threading.Event()
    pool = shelf.pool(1)

    async def main() -> None:
        holder = asyncio.create_task(use(pool, "a"))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(use(pool, "b"), 0.05)
        shelf.held[held].set()
        assert await holder == "a"
        assert [await use(pool, name) for name in ("a", "b", "a")] == ["a", "b", "a"]

    asyncio.run(main())
    assert shelf.most == 1


@pytest.mark.parametrize("max_loaded", [1, 2])
def test_under_load_from_more_models_than_fit_all_are_served(max_loaded: int) -> None:
    shelf = Shelf()
    pool = shelf.pool(max_loaded)

    async def client(number: int) -> None:
        for step in range(40):
            name = "abc"[(number + step) % 3]
            async with pool.use(name) as model:
                assert model == name
                await asyncio.sleep(0.0001 * (number % 3))
                assert shelf.in_memory[name] == 1

    async def main() -> None:
        await asyncio.gather(*(client(number) for number in range(9)))

    asyncio.run(main())
    assert shelf.most <= max_loaded
    # Far fewer loads than uses: everybody who lined up for a model got it together.
    assert sum(event.startswith("+") for event in shelf.events) < 9 * 40 / 2


def test_closing_closes_all_and_refuses_what_comes() -> None:
    shelf = Shelf()
    pool = shelf.pool(2)
    pool.add("a", shelf.load("a"))
    asyncio.run(use(pool, "b"))
    pool.close()
    assert shelf.in_memory.total() == 0
    assert not pool.is_open
    with pytest.raises(ClosedError):
        asyncio.run(use(pool, "a"))


def test_room_for_no_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_loaded is 0"):
        Shelf().pool(0)
