"""Running jobs in this process: on the cluster that it has joined, or without Ray; and cutting them off.

A process that imports torch costs seconds, so a test starts one only where the process is what it is about.
"""

import _thread
import contextlib
import gc
import io
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import pyarrow as pa
import pytest
import ray
import ray.data

from pipelines.runs.lease import HeldLease
from tests.pipelines.chaos import Cluster, Job, wait_for


def run_here(main: Callable[[], int], flags: Sequence[object]) -> tuple[int, str]:
    """What a job's script does, in this process. Gives the exit status, and what was said with single spaces."""
    if ray.is_initialized():
        wait_for_room()
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        patch.setattr(sys, "argv", ["job", *map(str, flags)])
        status = main()
    return status, " ".join(said.getvalue().split())


def wait_for_room() -> None:
    """Waits until all CPUs of the cluster are free: a job itself is patient for some seconds only."""

    def is_free() -> bool:
        gc.collect()  # what a job that failed still refers to
        return bool(ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"])

    wait_for(is_free, "free CPUs")


# ---- cutting off


@contextlib.contextmanager
def stuck(path: Path) -> Iterator[None]:
    """Instead of the file there is, for as long as the block lasts, one that whoever reads it waits for.

    A job that needs it cannot end before it is killed, however slow the machine or the test is.
    """
    content = path.read_bytes()
    path.unlink()
    os.mkfifo(path)
    try:
        yield
    finally:
        path.unlink()
        path.write_bytes(content)


def kill_when(flags: Sequence[object], cluster: Cluster, script: Path, cwd: Path, is_so: Callable[[], bool]) -> None:
    """Starts the job as a process, kills it when it is so, and waits until its workers are gone, too."""
    with Job(list(map(str, flags)), cluster.env, cwd=cwd, script=script) as job:
        job.wait_until(is_so, "what it was to be killed at")
        job.kill()
    cluster.settle()


class Cut(BaseException):
    """The end of a job that is cut off in this process: nobody catches it."""


@contextlib.contextmanager
def cut_after(num_blocks: int) -> Iterator[None]:
    """Cuts off the job that runs in the block when so many of its blocks of rows are written."""
    left = iter(range(num_blocks - 1))

    def check(hold: HeldLease) -> None:
        if next(left, None) is None:
            raise Cut

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HeldLease, "check", check)
        try:
            yield
        except Cut:
            return
    pytest.fail("the job ended before it was cut off")


# ---- without Ray


class _Blocks:
    """As much of a dataset of Ray Data as the jobs use: the stages run here, one block after the other."""

    def __init__(self, blocks: Iterable[Any]) -> None:
        self._blocks = blocks

    def map_batches(
        self, stage: Any, *, fn_constructor_args: Sequence[Any] = (), fn_constructor_kwargs: Any = None, **_: Any
    ) -> Self:
        def run() -> Iterator[pa.Table]:
            made = stage(*fn_constructor_args, **(fn_constructor_kwargs or {})) if isinstance(stage, type) else stage
            yield from map(made, self._blocks)

        return type(self)(run())

    def map(self, stage: Callable[[dict[str, Any]], dict[str, Any]], **_: Any) -> Self:
        return type(self)(pa.Table.from_pylist([stage(row)]) for row in self.iter_rows())

    def iter_batches(self, **_: Any) -> Iterator[pa.Table]:
        return iter(self._blocks)

    def iter_rows(self) -> Iterator[dict[str, Any]]:
        for block in self._blocks:
            yield from block.to_pylist()


def _from_items(items: Sequence[dict[str, Any]], **_: Any) -> _Blocks:
    return _Blocks(pa.Table.from_pylist([item]) for item in items)


class _Actor:
    """An actor that lives here. Its coroutines are run to their end, so none may wait for another."""

    def __init__(self, made: Any) -> None:
        self._made = made

    def __getattr__(self, name: str) -> Any:
        def remote(*args: Any) -> None:
            with contextlib.suppress(StopIteration):
                getattr(self._made, name)(*args).send(None)
                raise AssertionError(f"{name} waits for what nobody will do")

        return SimpleNamespace(remote=remote)


def leave_ray_out(patch: pytest.MonkeyPatch) -> None:
    """From now on the jobs run their stages in this process, one block after the other, on no cluster."""
    for name in ("start_ray", "check_cluster", "check_shared"):
        patch.setattr(f"pipelines.runs.run.{name}", lambda *_, **__: None)
    patch.setattr("ray.data.from_items", _from_items)
    actors = SimpleNamespace(
        remote=lambda **_: lambda made: SimpleNamespace(remote=lambda *args: _Actor(made(*args))),
        get=lambda value: value,
        data=ray.data,
        exceptions=ray.exceptions,
    )
    patch.setattr("pipelines.summarize.ray", actors)


class Background:
    """Something that is done to a job which runs in this process's main thread; what it raises is raised at the end."""

    def __init__(self, act: Callable[[], None]) -> None:
        self._act = act
        self._failed: list[BaseException] = []
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            self._act()
        except BaseException as error:  # noqa: BLE001
            self._failed.append(error)
            _thread.interrupt_main()  # the job may wait for what will not be done to it now

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._thread.join()
        if self._failed:
            raise self._failed[0]
