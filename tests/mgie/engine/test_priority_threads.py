import contextlib
import threading
from collections.abc import Iterator

from mgie.engine.priority_threads import PriorityThreads

WAIT_S = 300  # until a test gives up; nothing takes that long


def test_the_most_urgent_runs_first_and_equals_in_order() -> None:
    ran: list[str] = []
    begun, may_go = threading.Event(), threading.Event()

    @contextlib.contextmanager
    def inside() -> Iterator[None]:
        ran.append("in")
        yield
        ran.append("out")

    def block() -> None:
        begun.set()
        may_go.wait(WAIT_S)

    threads = PriorityThreads(1, name="test", inside=inside)
    threads.put(0, block)
    assert begun.wait(WAIT_S)
    for priority, name in ((2, "c"), (1, "a"), (1, "b"), (0, "first")):
        threads.put(priority, lambda name=name: ran.append(name))
    assert threads.is_alive()
    may_go.set()
    threads.close()
    assert ran == ["in", "first", "a", "b", "c", "out"]
    assert not threads.is_alive()


def test_as_many_run_at_once_as_there_are_threads() -> None:
    both = threading.Barrier(2, timeout=WAIT_S)
    threads = PriorityThreads(2, name="test", inside=contextlib.nullcontext)
    met: list[int] = []
    for _ in range(2):
        threads.put(0, lambda: met.append(both.wait()))
    threads.close()
    assert sorted(met) == [0, 1]
