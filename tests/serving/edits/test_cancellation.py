"""Edits called off by their id: the board alone, then over HTTP in two replicas that share one."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from serving.edits import cancellation as cancels
from serving.edits.cancellation import CancelBoard, RunningEdits
from serving.edits.in_process import InProcessBackend
from serving.errors import BoardError, CancelledEditError
from serving.stages.diffusion import DiffusionStage
from serving.stages.mllm import MLLMStage
from tests.live import api_over
from tests.waiting import until_async

pytestmark = pytest.mark.slow

Photo = Callable[..., bytes]
URL = "/v1/images/edits"
FOREVER_S = 10_000.0


class Clock:
    """Far enough from its start for a board to know everybody."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def settled_board() -> CancelBoard:
    clock = Clock()
    board = CancelBoard(clock)
    clock.now_s = 2 * cancels.SETTLE_S
    return board


async def heard_of(board: Any, running: Sequence[RunningEdits]) -> None:
    """Returns when the board knows them."""
    await until_async(lambda: {edits._replica for edits in running} <= set(getattr(board, "board", board)._listeners))


@asynccontextmanager
async def replicas(board: Any, number: int) -> AsyncIterator[list[RunningEdits]]:
    running = [RunningEdits(board) for _ in range(number)]
    listening = [asyncio.create_task(edits.listen()) for edits in running]
    await heard_of(board, running)
    try:
        yield running
    finally:
        for task in listening:
            task.cancel()
        await asyncio.wait(listening)


def test_any_replica_ends_an_edit_and_only_that_one() -> None:
    async def main() -> None:
        async with replicas(settled_board(), 3) as (first, second, third):
            edits = [asyncio.create_task(first.run(name, asyncio.sleep(FOREVER_S))) for name in ("a", "b", "c")]
            await asyncio.sleep(0)
            for asked, task, name in zip((second, third, first), edits, "abc", strict=True):
                assert await asked.cancel(name)
                with pytest.raises(CancelledEditError):
                    await task
                assert not await asked.cancel(name)  # it has ended
            assert not await second.cancel("unknown")
            assert await first.run("a", asyncio.sleep(0, "result")) == "result"

    asyncio.run(main())


def test_a_repeated_id_stands_for_all_its_edits() -> None:
    async def main() -> None:
        async with replicas(settled_board(), 2) as (first, second):
            edits = [asyncio.create_task(first.run("a", asyncio.sleep(FOREVER_S))) for _ in range(2)]
            await asyncio.sleep(0)
            assert await second.cancel("a")
            outcomes = await asyncio.gather(*edits, return_exceptions=True)
            assert [type(outcome) for outcome in outcomes] == [CancelledEditError] * 2

    asyncio.run(main())


def test_a_task_cancelled_by_another_stays_cancelled() -> None:
    async def main() -> None:
        edits = RunningEdits()
        task = asyncio.create_task(edits.run("a", asyncio.sleep(FOREVER_S)))
        await asyncio.sleep(0)
        assert await edits.cancel("a")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())


def test_a_replica_that_does_not_answer_makes_the_answer_uncertain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cancels, "ANSWER_S", FOREVER_S)

    async def main() -> None:
        clock = Clock()
        board = CancelBoard(clock)
        with pytest.raises(BoardError):  # it has just begun, and may not know all
            await RunningEdits(board).cancel("a")
        clock.now_s = 2 * cancels.SETTLE_S
        dead = asyncio.create_task(board.listen("dead", {}))
        async with replicas(board, 2) as (first, second):
            dead.cancel()
            monkeypatch.setattr(cancels, "ANSWER_S", 0.1)
            with pytest.raises(BoardError, match="not every replica"):
                await first.cancel("unknown")
            monkeypatch.setattr(cancels, "ANSWER_S", FOREVER_S)
            edit = asyncio.create_task(first.run("a", asyncio.sleep(FOREVER_S)))
            await asyncio.sleep(0)
            assert await second.cancel("a")  # found all the same
            with pytest.raises(CancelledEditError):
                await edit
            clock.now_s += cancels.POLL_S
            for listener in board._listeners.values():
                listener.heard_s = clock.now_s
            board._listeners["dead"].heard_s = clock.now_s - cancels.FORGET_S
            assert not await first.cancel("unknown")  # the dead one is forgotten

    asyncio.run(main())


def test_a_board_that_fails_harms_no_edit_and_is_found_again_when_it_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cancels, "RETRY_S", 0.01)
    monkeypatch.setattr(cancels, "ANSWER_S", 0.1)

    class Breaking:
        is_broken = False

        def __init__(self) -> None:
            self.board = settled_board()

        async def listen(self, replica: str, answers: Mapping[int, bool]) -> Sequence[tuple[int, str]]:
            if self.is_broken:
                raise OSError("gone")
            return await self.board.listen(replica, answers)

        async def cancel(self, edit_id: str) -> bool | None:
            if self.is_broken:
                await asyncio.sleep(FOREVER_S)
            return await self.board.cancel(edit_id)

    async def main() -> None:
        board = Breaking()
        async with replicas(board, 2) as (first, second):
            board.is_broken = True
            await board.board.cancel("nothing")  # ends the polls that are open
            may_end = asyncio.Event()
            edit = asyncio.create_task(first.run("a", may_end.wait()))
            await asyncio.sleep(0)
            with pytest.raises(BoardError):
                await second.cancel("a")
            monkeypatch.setattr(cancels, "ANSWER_S", FOREVER_S)
            may_end.set()
            assert await edit
            board.board, board.is_broken = settled_board(), False
            await heard_of(board, (first, second))
            edit = asyncio.create_task(first.run("a", asyncio.sleep(FOREVER_S)))
            await asyncio.sleep(0)
            assert await second.cancel("a")
            with pytest.raises(CancelledEditError):
                await edit

    asyncio.run(main())


@pytest.mark.parametrize("stream", ["false", "true"])
def test_delete_at_another_replica_takes_the_edit_out_of_the_engine(
    mllm: MLLMStage, random_bundle: Path, photo: Photo, stream: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cancels, "ANSWER_S", FOREVER_S)
    stage = DiffusionStage(str(random_bundle), device="cpu")

    async def main() -> None:
        board = settled_board()
        apis = [api_over(InProcessBackend(mllm, stage), board=board) for _ in range(2)]
        async with AsyncExitStack() as stack:
            for api in apis:
                await stack.enter_async_context(api.router.lifespan_context(api))
            here, there = [
                await stack.enter_async_context(
                    httpx2.AsyncClient(transport=httpx2.ASGITransport(api), base_url="http://testserver", timeout=None)
                )
                for api in apis
            ]
            edit = asyncio.create_task(
                here.post(
                    URL,
                    files={"image": photo()},
                    data={"prompt": "p", "steps": "1000", "stream": stream},
                    headers={"x-request-id": "my-edit"},
                )
            )
            [engine] = [one.engine for one in stage._pool.models().values()]
            await until_async(lambda: engine.stats().num_steps and len(board._listeners) == 2)
            assert (await there.delete(f"{URL}/other")).status_code == 404
            deleted = await there.delete(f"{URL}/my-edit")
            assert (deleted.status_code, deleted.content) == (204, b"")
            response = await edit
            if stream == "true":
                lines = [line for line in response.text.split("\n\n") if line]
                assert (response.status_code, lines[0]) == (200, ": id my-edit")
                assert '"code":"cancelled"' in lines[-1].replace(" ", "")
                assert "image_edit.completed" not in response.text
            else:
                assert (response.status_code, response.json()["error"]["code"]) == (409, "cancelled")
                assert response.headers["x-should-retry"] == "false"
            gone = await there.delete(f"{URL}/my-edit")
            assert (gone.status_code, gone.json()["error"]["code"]) == (404, "not_found")
            await until_async(lambda: not engine.stats().num_in_flight)

    asyncio.run(main())
    stats: Any = asyncio.run(stage.stats()).work
    assert (stats.num_cancelled, stats.num_in_flight) == (1, 0)
    assert stats.max_steps_after_end <= 1
    assert 0 < stats.num_steps < 1000
    stage.close()
