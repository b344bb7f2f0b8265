"""Threads that run jobs, the most urgent first.

Knows nothing of what the jobs do.
"""

import queue
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

_CLOSE = 2**31  # a priority after all others


@dataclass(order=True)
class _Job:
    priority: int
    number: int
    "jobs of one priority run in the order they came"
    run: Callable[[], None] | None = field(compare=False)


class PriorityThreads:
    """Runs jobs on threads of its own.

    Args:
        num_threads: How many jobs run at once.
        name: Name of the threads, for stack dumps.
        inside: Gives the context that each thread lives in.
    """

    def __init__(self, num_threads: int, *, name: str, inside: Callable[[], AbstractContextManager[None]]) -> None:
        self._jobs: queue.PriorityQueue[_Job] = queue.PriorityQueue()
        self._inside, self._number, self._lock = inside, 0, threading.Lock()
        self._threads = [
            threading.Thread(target=self._run, name=f"{name}-{i}", daemon=True) for i in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def put(self, priority: int, run: Callable[[], None]) -> None:
        """Has a job run; smaller priorities first. It must not raise: that ends its thread."""
        self._put(priority, run)

    def is_alive(self) -> bool:
        """Whether all threads are there."""
        return all(thread.is_alive() for thread in self._threads)

    def close(self) -> None:
        """Runs what was put, then ends the threads."""
        for _ in self._threads:
            self._put(_CLOSE, None)
        for thread in self._threads:
            thread.join()

    def _put(self, priority: int, run: Callable[[], None] | None) -> None:
        with self._lock:
            self._number += 1
            self._jobs.put(_Job(priority, self._number, run))

    def _run(self) -> None:
        with self._inside():
            while (run := self._jobs.get().run) is not None:
                run()
                del run  # or it would keep what it was done with until the next
