"""Autoscaling by work: its arithmetic against closed forms, and what real stages tell the policy."""

import asyncio
import math
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from serving.stages.autoscaling import (
    RATE_AVERAGED_S,
    ColdStarts,
    Work,
    WorkMeter,
    WorkPolicy,
    desired_replicas,
    growth,
)
from serving.stages.diffusion import DiffusionStage
from serving.stages.mllm import MLLMStage
from tests.serving.asking import ask
from tests.waiting import until_async

Photo = Callable[..., bytes]


def desired(**changes: float) -> int:
    usual: dict[str, Any] = {
        "num_running": 1, "num_asked": 1, "left": 0, "arriving": 0, "rate": 10, "clear_s": 20, "cold_start_s": 0
    }  # fmt: skip
    return desired_replicas(**usual | changes)


@pytest.mark.parametrize(("left", "num"), [(200, 1), (201, 2), (400, 2), (2000, 10)])
def test_a_backlog_asks_for_as_many_as_clear_it_in_time(left: float, num: int) -> None:
    assert desired(left=left) == num


@pytest.mark.parametrize(("arriving", "num"), [(10, 1), (11, 2), (35, 4)])
def test_what_arrives_asks_for_as_many_as_keep_up(arriving: float, num: int) -> None:
    assert desired(arriving=arriving) == num


def test_no_work_asks_for_none() -> None:
    assert desired(num_running=3, num_asked=3) == 0


def test_a_replica_that_would_come_after_the_work_is_done_is_not_asked_for() -> None:
    left = 300.0  # one replica does it in 30 s, two would be needed to do it in 20 s
    assert desired(left=left, cold_start_s=0) == 2
    assert desired(left=left, cold_start_s=29) == 1
    assert desired(left=left, cold_start_s=300) == 1


def test_a_long_cold_start_counts_what_arrives_meanwhile() -> None:
    # 30 a second come, 10 are done: after 40 s there are 800 more, to be cleared in 20 s beside the 30.
    assert desired(arriving=30, cold_start_s=40) == math.ceil((30 + 800 / 20) / 10)


def test_replicas_stay_between_too_late_and_too_few() -> None:
    for asked, num in ((1, 1), (2, 2), (3, 3), (4, 3)):
        # 3 would be needed for the backlog of 600 in 20 s, and none that comes after 60 s would help.
        assert desired(left=600, num_running=1, num_asked=asked, cold_start_s=60) == num


def test_ten_edits_of_100_steps_ask_for_ten_times_the_replicas_of_ten_steps() -> None:
    assert desired(left=10 * 100 * 12, rate=6) == 10 * desired(left=10 * 10 * 12, rate=6)


def test_cold_starts_are_learned_and_one_that_is_overdue_counts() -> None:
    cold = ColdStarts(20)
    assert cold.seconds(0, num_running=1, num_asked=1) == 20
    assert cold.seconds(5, num_running=1, num_asked=2) == 20
    assert cold.seconds(40, num_running=1, num_asked=2) == 35  # overdue
    assert cold.seconds(55, num_running=2, num_asked=2) == 20 + (50 - 20) / 3
    assert cold.seconds(60, num_running=2, num_asked=2) == 20 + (50 - 20) / 3


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_the_rate_counts_busy_time_only() -> None:
    clock = Clock()
    meter = WorkMeter(clock)
    for done in (50, 100):
        clock.now_s += 1000  # idle
        with meter.edit():
            clock.now_s += 10
            with meter.edit():
                clock.now_s += 10
        work = meter.measure(done=done, left=5, has_line=True)
    assert work.rate == pytest.approx(50 / 20)
    assert (work.left, work.taken, work.per_edit) == (5, 105, 105 / 4)


def test_the_rate_is_an_exponential_average() -> None:
    clock = Clock()
    meter = WorkMeter(clock)
    with meter.edit():
        clock.now_s += 5
        meter.measure(done=50, left=0, has_line=True)
        clock.now_s += RATE_AVERAGED_S
        work = meter.measure(done=50 + 20 * RATE_AVERAGED_S, left=0, has_line=True)
    assert work.rate == pytest.approx(20 + (10 - 20) / math.e)


def test_a_replica_without_a_line_may_raise_its_rate_and_does_not_lower_it() -> None:
    clock = Clock()
    meter = WorkMeter(clock)
    done, rates = 0.0, []
    with meter.edit():
        for per_s, has_line in ((10, True), (1, False), (1, True), (90, False)):
            clock.now_s += 3
            done += 3 * per_s
            rates.append(meter.measure(done=done, left=0, has_line=has_line).rate)
    assert rates[0] == rates[1] == 10
    assert rates[2] < 10 < rates[3]


def test_growth_is_per_second_and_never_negative() -> None:
    points = [SimpleNamespace(timestamp=10.0, value=4.0), SimpleNamespace(timestamp=12.0, value=10.0)]
    assert growth(points) == 3.0
    assert growth(points[::-1]) == growth(points[:1]) == growth([]) == 0.0


@dataclass
class Told:
    """What Serve would tell, of replicas with constant figures over ten seconds."""

    current_num_replicas: int = 1
    target_num_replicas: int = 1
    current_time: float | None = 100.0
    total_queued_requests: float = 0.0
    replicas: dict[str, dict[str, float]] = field(default_factory=dict)
    "by name; `arriving` is per second"

    @property
    def raw_metrics(self) -> dict[str, dict[str, list[Any]]]:
        def points(values: dict[str, float], figure: str) -> list[Any]:
            if figure == "taken":
                arriving = values.get("arriving", 0.0)
                return [SimpleNamespace(timestamp=t, value=1000 + arriving * t) for t in (90.0, 100.0)]
            return [SimpleNamespace(timestamp=t, value=values.get(figure, 0.0)) for t in (90.0, 100.0)]

        figures = ("left", "taken", "rate", "per_edit")
        return {figure: {name: points(one, figure) for name, one in self.replicas.items()} for figure in figures}


def policy() -> WorkPolicy:
    return WorkPolicy(clear_s=20, cold_start_s=0)


def test_the_policy_adds_up_replicas_and_averages_their_rates() -> None:
    busy = {"left": 300.0, "rate": 12.0, "per_edit": 50.0, "arriving": 4.0}
    told = Told(2, 2, replicas={"a": busy, "b": busy | {"rate": 8.0}, "fresh": {}})
    assert policy()(told)[0] == math.ceil((8 + 600 / 20) / 10)


def test_edits_that_wait_for_a_replica_count_as_average_ones() -> None:
    told = Told(total_queued_requests=6, replicas={"a": {"rate": 10.0, "per_edit": 100.0}})
    assert policy()(told)[0] == 3


def test_questions_that_wait_for_a_moment_keep_no_replica_awake() -> None:
    one = Told(total_queued_requests=0.2, replicas={"a": {"rate": 10.0, "per_edit": 100.0}})
    assert policy()(one)[0] == 0


def test_before_anything_was_done_who_waits_gets_one_replica() -> None:
    assert policy()(Told(0, 0))[0] == 0
    assert policy()(Told(0, 0, total_queued_requests=50))[0] == 1
    assert policy()(Told(1, 1, replicas={"a": {"left": 9.0}}))[0] == 1


def test_what_was_known_of_the_last_replica_serves_when_there_is_none() -> None:
    one = policy()
    assert one(Told(replicas={"a": {"rate": 10.0, "per_edit": 100.0}}))[0] == 0
    assert one(Told(0, 0, total_queued_requests=6))[0] == 3


class Paced:
    """Stands before a model: each call takes a second of the clock, and waits while it is told to."""

    def __init__(self, model: Callable[..., Any], clock: Clock) -> None:
        self._model, self._clock = model, clock
        self.may_run = threading.Event()
        self.may_run.set()

    def __call__(self, *args: Any, **given: Any) -> Any:
        self.may_run.wait()
        self._clock.now_s += 1
        return self._model(*args, **given)


def decided(work: Work, *, num_running: int = 1) -> float:
    """What the policy asks for when a replica tells this."""
    told = Told(num_running, num_running, replicas={"a": asdict(work)})
    return WorkPolicy(clear_s=1, cold_start_s=0)(told)[0]


def test_many_step_edits_ask_for_the_diffusion_stage_alone_and_long_instructions_for_the_mllm_stage_alone(
    random_bundle: Path, photo: Photo
) -> None:
    """Real stages, whose work the test holds and whose clock it moves, tell the policy."""
    mllm = MLLMStage(str(random_bundle), device="cpu", cache_bytes=0)
    diffusion = DiffusionStage(str(random_bundle), device="cpu")
    clock = Clock()
    for stage in (mllm, diffusion):
        stage._work_meter = WorkMeter(clock)
    [conditioner], [one] = mllm._pool.models().values(), diffusion._pool.models().values()
    deriving, denoising = Paced(conditioner.derive, clock), Paced(one.renderer.denoiser, clock)
    conditioner.derive, one.renderer.denoiser = deriving, denoising

    async def main() -> None:
        async def decisions() -> tuple[float, float]:
            works = [await stage.record_autoscaling_stats() for stage in (mllm, diffusion)]
            of_mllm, of_diffusion = (decided(Work(**work)) for work in works)
            return of_mllm, of_diffusion

        def render(steps: int) -> Any:
            return diffusion.render(photo(), derived, ask(overrides={"steps": steps}))

        derived = await mllm.derive(photo(), ask("p", "a dark sky"))
        await mllm.derive(photo(), ask("p"))
        await render(4)
        assert await decisions() == (0, 0)  # and their rates are known: a call takes a second
        denoising.may_run.clear()
        edits = [asyncio.create_task(render(60)) for _ in range(4)]
        await until_async(lambda: one.engine.stats().num_in_flight + one.engine.stats().num_waiting == len(edits))
        assert await decisions() == (0, 4 * 60)
        for edit in edits:
            edit.cancel()
        await asyncio.wait(edits)
        denoising.may_run.set()
        deriving.may_run.clear()
        long = "make the sky over the lake a little darker, " * 80
        edits = [asyncio.create_task(mllm.derive(photo(seed=i), ask(f"{i} {long}"))) for i in range(4)]
        await until_async(lambda: mllm._tokens_left > 4 * 1000)
        of_mllm, of_diffusion = await decisions()
        assert of_diffusion == 0
        assert of_mllm > 4
        deriving.may_run.set()
        for edit in edits:
            edit.cancel()
        await asyncio.wait(edits)

    asyncio.run(main())
    for stage in (mllm, diffusion):
        stage.close()
