import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from mgie.config import GenerationConfig
from mgie.errors import ConfigError, PromptError
from mgie.inference.condition_cache import ConditionCache, condition_key
from mgie.inference.conditioner import EditCondition

NUM_FLOATS = 2 * 8 * 16  # of the two tensors below
ENTRY_BYTES = 4 * NUM_FLOATS + 1024


def _edit_conditions(text: str = "") -> EditCondition:
    return EditCondition(
        expressive=text, condition=torch.zeros(8, 16), null_condition=torch.zeros(8, 16), used_fallback=False,
        prompt_tokens=1, image_tokens=1, output_tokens=1, bundle="b",
    )  # fmt: skip


class Source:
    """Derives guidance, and counts how often for each key."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def of(self, key: str) -> Callable[[], Awaitable[EditCondition]]:
        async def derive() -> EditCondition:
            self.counts[key] += 1
            await asyncio.sleep(0)
            return _edit_conditions()

        return derive


def test_the_key_tells_apart_all_that_guidance_depends_on() -> None:
    def key(
        image: bytes = b"x",
        instruction: str = "a",
        expressive: str | None = None,
        generation: GenerationConfig | None = None,
        bundle: str = "b",
    ) -> str:
        return condition_key(image, instruction, expressive=expressive, generation=generation, bundle=bundle)

    keys = [
        key(), key(b"y"), key(instruction="A"), key(expressive=""), key(expressive="a"), key(expressive="\ud800"),
        key(generation=GenerationConfig()), key(generation=GenerationConfig(max_new_tokens=7)), key(bundle="c"),
        key(instruction='a", null'), key(instruction="", expressive="a"),
    ]  # fmt: skip
    assert len(set(keys)) == len(keys)
    assert key() == key()
    assert key(generation=GenerationConfig(max_new_tokens=7)) == key(generation=GenerationConfig(max_new_tokens=7))


def test_what_was_derived_is_not_derived_again() -> None:
    cache, source = ConditionCache(10**6), Source()
    first = asyncio.run(cache.get("a", source.of("a")))
    # Another event loop.
    assert asyncio.run(cache.get("a", source.of("a"))) is first
    assert asyncio.run(cache.get("b", source.of("b"))) is not first
    stats = cache.stats()
    assert source.counts == {"a": 1, "b": 1}
    assert (stats.num_hits, stats.num_misses, stats.num_joined, stats.num_entries) == (1, 2, 0, 2)
    assert stats.num_bytes == 2 * ENTRY_BYTES
    assert stats.hit_rate == pytest.approx(1 / 3)


def test_the_one_not_used_for_longest_makes_room() -> None:
    cache, source = ConditionCache(3 * ENTRY_BYTES), Source()

    async def ask(keys: str) -> None:
        for key in keys:
            await cache.get(key, source.of(key))

    asyncio.run(ask("abcadbacd"))  # d drives b out; then b drives c, c drives d (a was used again), d drives b
    assert source.counts == {"a": 1, "b": 2, "c": 2, "d": 2}
    assert cache.stats().num_bytes == 3 * ENTRY_BYTES


def test_sizes_stay_within_the_limit_whatever_the_order() -> None:
    rng = random.Random(0)
    cache = ConditionCache(20 * ENTRY_BYTES)

    async def fill() -> None:
        for _ in range(300):
            text = "x" * rng.randrange(10_000)

            async def derive(text: str = text) -> EditCondition:
                return _edit_conditions(text)

            await cache.get(str(rng.randrange(60)), derive)
            assert cache.stats().num_bytes <= 20 * ENTRY_BYTES
            assert (
                sum(ENTRY_BYTES + 4 * len(kept.expressive) for kept in cache._entries.values())
                == cache.stats().num_bytes
            )

    asyncio.run(fill())
    assert cache.stats().num_entries > 0


def test_one_too_large_drives_nobody_out() -> None:
    cache, source = ConditionCache(ENTRY_BYTES), Source()

    async def derive_large() -> EditCondition:
        return _edit_conditions("x")

    asyncio.run(cache.get("a", source.of("a")))
    asyncio.run(cache.get("large", derive_large))
    asyncio.run(cache.get("a", source.of("a")))
    assert source.counts == {"a": 1}


@pytest.mark.parametrize("max_bytes", [0, 10**6])
def test_equal_requests_at_the_same_time_are_derived_once(max_bytes: int) -> None:
    cache, source = ConditionCache(max_bytes), Source()

    async def ask() -> list[EditCondition]:
        return await asyncio.gather(*(cache.get(key, source.of(key)) for key in "aabab"))

    found = asyncio.run(ask())
    assert source.counts == {"a": 1, "b": 1}
    assert found[0] is found[1] is found[3]
    assert found[2] is found[4]
    stats = cache.stats()
    assert (stats.num_misses, stats.num_joined, stats.num_hits) == (2, 3, 0)


def test_who_waits_derives_in_the_place_of_one_that_is_called_off() -> None:
    cache = ConditionCache(10**6)
    begun: list[int] = []

    async def ask() -> None:
        gate = asyncio.Event()

        async def derive(number: int) -> EditCondition:
            begun.append(number)
            await gate.wait()
            return _edit_conditions(str(number))

        tasks = [asyncio.create_task(cache.get("a", lambda i=i: derive(i))) for i in range(4)]
        await asyncio.sleep(0.01)
        assert begun == [0]
        tasks[1].cancel()  # one that waits: nobody else notices
        await asyncio.sleep(0.01)
        assert begun == [0]
        tasks[0].cancel()  # the one that derives
        await asyncio.sleep(0.05)
        assert len(begun) == 2
        gate.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [isinstance(result, asyncio.CancelledError) for result in results] == [True, True, False, False]
        assert results[2] is results[3]

    asyncio.run(ask())
    assert cache.stats().num_entries == 1


def test_a_failure_is_that_of_its_own_caller() -> None:
    cache = ConditionCache(10**6)
    num_calls = 0

    async def derive() -> EditCondition:
        nonlocal num_calls
        num_calls += 1
        number = num_calls
        await asyncio.sleep(0.01)
        if number == 1:
            raise PromptError("the first one fails")
        return _edit_conditions()

    async def ask() -> list[EditCondition | BaseException]:
        return await asyncio.gather(*(cache.get("a", derive) for _ in range(3)), return_exceptions=True)

    results = asyncio.run(ask())
    assert isinstance(results[0], PromptError)
    assert results[1] is results[2]
    assert num_calls == 2


def test_threads_with_event_loops_of_their_own_share_it() -> None:
    cache, source = ConditionCache(4 * ENTRY_BYTES), Source()

    async def ask(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(60):
            key = rng.choice("abcdef")
            await cache.get(key, source.of(key))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda seed: asyncio.run(asyncio.wait_for(ask(seed), 30)), range(4)))
    stats = cache.stats()
    assert stats.num_hits + stats.num_joined + stats.num_misses == 4 * 60
    assert stats.num_misses == source.counts.total()
    assert (stats.num_entries, stats.num_bytes) == (4, 4 * ENTRY_BYTES)
    assert cache._pending == {}


def test_a_negative_size_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 0"):
        ConditionCache(-1)
