"""The greedy batcher with real threads and plain functions as work."""

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace

import pytest

from mgie.errors import ClosedError, ConfigError
from serving.stages.batcher import GreedyBatcher


class Gate:
    """Work that doubles numbers and halts while the gate is shut, so that a test decides what waits."""

    def __init__(self, *, is_open: bool = True) -> None:
        self.opened = threading.Event()
        self.entered = threading.Event()
        self.batches: list[list[int]] = []
        self.done: list[int] = []
        if is_open:
            self.opened.set()

    def __call__(self, items: Sequence[int], is_wanted: Callable[[int], bool]) -> Iterator[tuple[int, int]]:
        self.batches.append(list(items))
        self.entered.set()
        self.opened.wait()
        for index, item in enumerate(items):
            if item < 0:
                raise ValueError(f"item {item}")
            if is_wanted(index):
                self.done.append(item)
                yield index, 2 * item


def gated(gate: Gate, *, max_batch_size: int = 4, modulus: int = 1) -> GreedyBatcher[int, int]:
    return GreedyBatcher(gate, key=lambda item: item % modulus, max_batch_size=max_batch_size, name="test")


async def queue_behind_one(batcher: GreedyBatcher[int, int], gate: Gate, items: list[int]) -> list[asyncio.Task]:
    """Occupies the worker with item 0, then queues `items` in order."""
    tasks = [asyncio.create_task(batcher.submit(0))]
    await asyncio.to_thread(gate.entered.wait)
    for item in items:
        tasks.append(asyncio.create_task(batcher.submit(item)))
        await asyncio.sleep(0)
    return tasks


def test_all_that_waits_while_the_worker_is_busy_forms_the_next_batch() -> None:
    gate = Gate(is_open=False)
    batcher = gated(gate, max_batch_size=8)

    async def main() -> None:
        tasks = await queue_behind_one(batcher, gate, [1, 2, 3, 4, 5])
        gate.opened.set()
        answers = await asyncio.gather(*tasks)
        assert [answer.result for answer in answers] == [0, 2, 4, 6, 8, 10]
        assert [answer.run.batch_size for answer in answers] == [1, 5, 5, 5, 5, 5]
        assert len({answer.run.batch for answer in answers[1:]}) == 1

    asyncio.run(main())
    assert gate.batches == [[0], [1, 2, 3, 4, 5]]
    stats = batcher.stats()
    assert (stats.num_items, stats.num_batches, stats.mean_batch_size) == (6, 2, 3.0)
    batcher.close()


def test_a_lone_item_does_not_wait_for_company() -> None:
    batcher = gated(Gate(), max_batch_size=64)
    answer = asyncio.run(batcher.submit(7))
    assert answer.result == 14
    assert (answer.run.batch, answer.run.batch_size) == (0, 1)
    batcher.close()


def test_batches_keep_to_the_limit_and_to_one_key_oldest_first() -> None:
    gate = Gate(is_open=False)
    batcher = gated(gate, max_batch_size=2, modulus=2)

    async def main() -> None:
        tasks = await queue_behind_one(batcher, gate, [1, 2, 3, 4, 5, 7])
        gate.opened.set()
        await asyncio.gather(*tasks)

    asyncio.run(main())
    # 2 and 4 are older than 5 and 7: the odd ones, though more, do not push the even ones back.
    assert gate.batches == [[0], [1, 3], [2, 4], [5, 7]]
    batcher.close()


def test_results_are_delivered_before_the_batch_ends() -> None:
    may_end = threading.Event()

    def work(items: Sequence[int], is_wanted: Callable[[int], bool]) -> Iterator[tuple[int, int]]:
        yield 1, items[1]
        may_end.wait()
        yield 0, items[0]

    gate = Gate(is_open=False)

    def first_blocks(items: Sequence[int], is_wanted: Callable[[int], bool]) -> Iterator[tuple[int, int]]:
        return gate(items, is_wanted) if items[0] == 0 else work(items, is_wanted)

    batcher = GreedyBatcher(first_blocks, key=lambda _: None, max_batch_size=2, name="test")

    async def main() -> None:
        tasks = await queue_behind_one(batcher, gate, [1, 2])
        gate.opened.set()
        assert (await tasks[2]).result == 2
        assert not tasks[1].done()
        may_end.set()
        assert (await tasks[1]).result == 1

    asyncio.run(main())
    batcher.close()


def test_only_the_guilty_item_of_a_batch_fails_and_the_loop_lives_on() -> None:
    gate = Gate(is_open=False)
    batcher = gated(gate)

    async def main() -> None:
        tasks = await queue_behind_one(batcher, gate, [1, -2, 3])
        gate.opened.set()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert [getattr(answer, "result", None) for answer in answers] == [0, 2, None, 6]
        assert isinstance(answers[2], ValueError)
        assert str(answers[2]) == "item -2"
        assert (await batcher.submit(5)).result == 10

    asyncio.run(main())
    assert gate.batches == [[0], [1, -2, 3], [-2], [3], [5]]  # item 1 had its result, so it is not run again
    assert batcher.stats().num_failed == 1
    assert batcher.is_alive()
    batcher.close()


def test_an_item_that_the_work_forgets_gets_an_error_instead_of_waiting_for_ever() -> None:
    batcher: GreedyBatcher[int, int] = GreedyBatcher(
        lambda items, is_wanted: [], key=lambda _: None, max_batch_size=2, name="test"
    )
    with pytest.raises(RuntimeError, match="without a result for 1 of 1"):
        asyncio.run(asyncio.wait_for(batcher.submit(1), 5))
    batcher.close()


def test_a_key_that_raises_fails_its_caller_only() -> None:
    batcher: GreedyBatcher[int, int] = GreedyBatcher(
        lambda items, is_wanted: enumerate(items), key=lambda item: 1 // item, max_batch_size=2, name="test"
    )
    with pytest.raises(ZeroDivisionError):
        asyncio.run(batcher.submit(0))
    assert asyncio.run(batcher.submit(3)).result == 3
    batcher.close()


def test_a_cancelled_caller_is_dropped_before_its_batch_starts() -> None:
    gate = Gate(is_open=False)
    batcher = gated(gate)

    async def main() -> None:
        tasks = await queue_behind_one(batcher, gate, [1, 2, 3])
        tasks[2].cancel()
        await asyncio.sleep(0)
        gate.opened.set()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(main())
    assert gate.batches == [[0], [1, 3]]
    assert batcher.stats().num_dropped == 1
    batcher.close()


def test_an_item_cancelled_while_it_runs_is_no_longer_wanted_and_the_others_are_served() -> None:
    gates = [Gate(is_open=False), Gate(is_open=False), Gate()]
    numbers = iter(range(3))

    def work(items: Sequence[int], is_wanted: Callable[[int], bool]) -> Iterator[tuple[int, int]]:
        return gates[next(numbers)](items, is_wanted)

    batcher: GreedyBatcher[int, int] = GreedyBatcher(work, key=lambda _: 0, max_batch_size=4, name="test")

    async def main() -> None:
        [first, *tasks] = await queue_behind_one(batcher, gates[0], [4, 5, 6])
        gates[0].opened.set()
        await first
        await asyncio.to_thread(gates[1].entered.wait, 10)
        tasks[1].cancel()
        await asyncio.wait({tasks[1]})
        assert (batcher.stats().num_running, batcher.stats().num_cancelled) == (2, 1)
        gates[1].opened.set()
        assert [(await tasks[i]).result for i in (0, 2)] == [8, 12]
        assert (await batcher.submit(7)).result == 14

    asyncio.run(main())
    assert [gate.batches for gate in gates] == [[[0]], [[4, 5, 6]], [[7]]]
    assert gates[1].done == [4, 6]
    assert (batcher.stats().num_cancelled, batcher.stats().num_dropped, batcher.stats().num_failed) == (1, 0, 0)
    batcher.close()


def test_a_batch_whose_items_are_all_cancelled_ends_and_is_not_run_again() -> None:
    gate = Gate(is_open=False)
    batcher = gated(gate)

    async def main() -> None:
        [task] = await queue_behind_one(batcher, gate, [])
        task.cancel()
        await asyncio.wait({task})
        assert batcher.stats().num_running == 0
        gate.opened.set()
        assert (await batcher.submit(7)).result == 14

    asyncio.run(main())
    assert gate.batches == [[0], [7]]
    assert gate.done == [7]
    batcher.close()


def test_many_threads_of_callers_all_get_their_own_answer() -> None:
    gate = Gate()
    batcher = gated(gate, max_batch_size=16, modulus=3)
    answers: dict[int, int] = {}

    def caller(start: int) -> None:
        async def main() -> None:
            for answer, item in zip(
                await asyncio.gather(*(batcher.submit(start + i) for i in range(50))), range(50), strict=True
            ):
                answers[start + item] = answer.result

        asyncio.run(main())

    threads = [threading.Thread(target=caller, args=(100 * k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert answers == {100 * k + i: 2 * (100 * k + i) for k in range(4) for i in range(50)}
    assert all(len({item % 3 for item in items}) == 1 and len(items) <= 16 for items in gate.batches)
    batcher.close()


def test_closing_fails_what_waits_and_refuses_what_comes() -> None:
    gate = Gate(is_open=False)
    batcher = gated(gate)

    async def main() -> None:
        tasks = await queue_behind_one(batcher, gate, [1])
        closing = asyncio.create_task(asyncio.to_thread(batcher.close))
        with pytest.raises(ClosedError):
            await tasks[1]
        gate.opened.set()
        assert (await tasks[0]).result == 0  # the batch that ran was allowed to end
        await closing
        with pytest.raises(ClosedError):
            await batcher.submit(2)

    asyncio.run(main())
    assert not batcher.is_alive()


def test_a_batch_size_below_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_batch_size is 0"):
        gated(Gate(), max_batch_size=0)


def test_the_patient_let_later_ones_pass_until_their_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(monotonic=lambda: now_s)
    now_s = 100.0
    monkeypatch.setattr("serving.stages.batcher.time", clock)
    gate = Gate(is_open=False)
    batcher = gated(gate, max_batch_size=2)
    patience = {1: 0.2, 2: 60.0, 3: 0.0, 4: 60.0, 5: 0.0, 6: 0.0}

    async def main() -> None:
        nonlocal now_s
        tasks = await queue_behind_one(batcher, gate, [])
        for item, queue_delay_s in patience.items():
            if item == 6:
                now_s += 0.25  # beyond the patience of 1, within that of 2
            tasks.append(asyncio.create_task(batcher.submit(item, queue_delay_s=queue_delay_s)))
            await asyncio.sleep(0)
        gate.opened.set()
        await asyncio.gather(*tasks)

    asyncio.run(main())
    assert gate.batches == [[0], [3, 5], [1, 6], [2, 4]]
    batcher.close()


def test_the_urgent_go_before_all_that_wait() -> None:
    gate = Gate(is_open=False)
    batcher = gated(gate, max_batch_size=1)

    async def main() -> None:
        tasks = await queue_behind_one(batcher, gate, [1])
        tasks.append(asyncio.create_task(batcher.submit(2, is_urgent=True)))
        await asyncio.sleep(0)
        gate.opened.set()
        await asyncio.gather(*tasks)

    asyncio.run(main())
    assert gate.batches == [[0], [2], [1]]
    batcher.close()
