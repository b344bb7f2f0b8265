"""Autoscaling by work (`serving.stages.autoscaling`) against Ray Serve's default, which counts requests; and waking from zero.

The stage here is a timing stand-in: it works at one edit after another and sleeps as long as each takes, so that the
figures show scaling and nothing else, however busy the machine is. Both policies get the same trace (short and long
edits, two bursts, a lull), bounds, delays and cold start. Then the real service with no replica of either stage gets one edit.
The last line is JSON: replica-seconds, and the share of edits that were done within the deadline.
"""

import asyncio
import dataclasses
import itertools
import json
import random
import statistics
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx2
import tyro
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.handle import DeploymentHandle

from serving.app import app
from serving.args import ServingArgs
from serving.demo import draw_landscape
from serving.local_cluster import free_port, local_cluster, send_edit
from serving.stages.autoscaling import WorkMeter, WorkPolicy

APP, STAGE = "scaling", "TimedStage"
NUM_CPUS = 16  # logical: sleeping takes none


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """What to measure."""

    seconds: float = 120.0
    "of the trace"
    deadline_s: float = 20.0
    "from the arrival of an edit"
    short_s: float = 0.25
    "that a short edit takes"
    long_s: float = 4.0
    "that a long one takes"
    max_replicas: int = 6
    cold_start_s: float = 3.0
    "that the constructor of a replica takes, on top of what Ray takes"
    clear_s: float = 8.0
    "of the policy by work"
    target_ongoing_requests: float = 2.0
    "of the policy by requests; 2 is Serve's default"
    from_zero: int = 2
    "times that the real service is woken; 0 leaves it out"
    seed: int = 0
    "of the arrivals"


class TimedStage:
    """Works at one edit after another, each as long as it says, and reports its work as the real stages do."""

    def __init__(self, cold_start_s: float) -> None:
        time.sleep(cold_start_s)
        self._meter, self._turn = WorkMeter(), asyncio.Lock()
        self._left = self._done = 0.0

    async def edit(self, seconds: float) -> None:
        """One edit."""
        self._left += seconds
        with self._meter.edit():
            async with self._turn:
                await asyncio.sleep(seconds)
                self._left -= seconds
                self._done += seconds

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What the policy by work goes by."""
        return dataclasses.asdict(self._meter.look(done=self._done, left=self._left, has_line=self._turn.locked()))


def make_trace(config: BenchmarkConfig) -> list[tuple[float, float]]:
    """When each edit comes and how long it takes."""
    chance, unit_s = random.Random(config.seed), config.seconds / 12
    trace: list[tuple[float, float]] = []

    def arrive(first: float, last: float, per_s: float, share_long: float) -> None:
        clock_s = first * unit_s
        while (clock_s := clock_s + chance.expovariate(per_s)) < last * unit_s:
            trace.append((clock_s, config.long_s if chance.random() < share_long else config.short_s))

    arrive(0, 3, 1.0, 0.1)
    arrive(3, 4, 12.0, 0.0)  # a burst of short edits: many requests, little work
    arrive(4, 6, 1.0, 0.1)
    arrive(6, 7, 2.0, 1.0)  # a burst of long ones: few requests, much work
    arrive(7, 8, 1.0, 0.1)
    # a lull
    arrive(10, 12, 1.0, 0.1)
    return sorted(trace)


def deploy(config: BenchmarkConfig, policy: AutoscalingPolicy) -> "DeploymentHandle[TimedStage]":
    """The stand-in under a policy."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        scaling = AutoscalingConfig(
            min_replicas=1,
            max_replicas=config.max_replicas,
            target_ongoing_requests=config.target_ongoing_requests,
            upscale_delay_s=2,
            downscale_delay_s=10,
            look_back_period_s=5,
            metrics_interval_s=1,
            policy=policy,
        )
    stage = serve.deployment(
        name=STAGE,
        autoscaling_config=scaling,
        max_ongoing_requests=4,
        ray_actor_options={"num_cpus": 0.1},
        health_check_period_s=2,
    )(TimedStage)
    return serve.run(stage.bind(config.cold_start_s), name=APP, route_prefix=None)


async def replay(
    config: BenchmarkConfig, handle: "DeploymentHandle[TimedStage]", trace: Sequence[tuple[float, float]]
) -> dict[str, float]:
    """Sends the trace; counts what was done in time and the replicas that there were meanwhile."""
    started_s = time.monotonic()
    latencies_s: list[float] = []
    counts: list[tuple[float, int]] = []

    async def send(arrival_s: float, seconds: float) -> None:
        await asyncio.sleep(started_s + arrival_s - time.monotonic())
        await handle.edit.remote(seconds)
        latencies_s.append(time.monotonic() - started_s - arrival_s)

    async def count() -> None:
        while True:
            status = await asyncio.to_thread(serve.status)
            states = status.applications[APP].deployments[STAGE].replica_states
            number = sum(states.get(state, 0) for state in ("STARTING", "RUNNING"))
            counts.append((time.monotonic() - started_s, number))
            await asyncio.sleep(0.5)

    counter = asyncio.create_task(count())
    await asyncio.gather(*(send(arrival_s, seconds) for arrival_s, seconds in trace))
    done_s = time.monotonic() - started_s
    await asyncio.sleep(max(0.0, config.seconds - done_s))
    counter.cancel()
    replica_s = sum(number * (after - before) for (before, number), (after, _) in itertools.pairwise(counts))
    return {
        "replica_s": round(replica_s, 1),
        "in_time": round(sum(one <= config.deadline_s for one in latencies_s) / len(trace), 3),
        "mean_s": round(statistics.mean(latencies_s), 2),
        "p95_s": round(statistics.quantiles(latencies_s, n=20)[-1], 2),
        "worst_s": round(max(latencies_s), 2),
        "most_replicas": max(number for _, number in counts),
    }


def compare(config: BenchmarkConfig) -> dict[str, dict[str, float]]:
    """Both policies on the same trace."""
    policies = {
        "work": AutoscalingPolicy(
            policy_function=WorkPolicy,
            policy_kwargs={"clear_s": config.clear_s, "cold_start_s": 2 * config.cold_start_s},
        ),
        "requests": AutoscalingPolicy(),
    }
    trace = make_trace(config)
    work_s = sum(seconds for _, seconds in trace)
    print(f"{len(trace)} edits, {work_s:.0f} s of work in {config.seconds:g} s", flush=True)
    figures = {}
    for name, policy in policies.items():
        handle = deploy(config, policy)
        handle.edit.remote(config.short_s).result()  # it has a rate
        figures[name] = asyncio.run(replay(config, handle, trace))
        serve.delete(APP)
        print(f"  by {name}: {figures[name]}", flush=True)
    return figures


def wake(config: BenchmarkConfig, address: str, folder: Path) -> list[dict[str, float]]:
    """First and second answer of the real service after it had no replica of either stage."""
    args = ServingArgs(
        bundle="random", device="cpu", mllm_min_replicas=0, diffusion_min_replicas=0, downscale_delay_s=5,
        look_back_period_s=3, metrics_interval_s=1, artifacts=str(folder / "results"),
    )  # fmt: skip
    seen = []
    serve.run(app(args), name="mgie")
    with httpx2.Client(timeout=60) as http:

        def replicas() -> int:
            body: dict[str, Any] = http.get(f"{address}/stats").raise_for_status().json()["replicas"]
            return sum(body[stage].get("RUNNING", 0) for stage in ("MLLMStage", "DiffusionStage"))

        for turn in range(config.from_zero):
            until_s = time.monotonic() + 180
            while replicas():
                if time.monotonic() > until_s:
                    raise SystemExit("the stages did not go to sleep")
                time.sleep(1)
            http.get(f"{address}/readyz").raise_for_status()  # asleep is ready, and asking wakes nobody
            times_s = []
            for seed in (2 * turn, 2 * turn + 1):
                started_s = time.monotonic()
                send_edit(address, draw_landscape(96, 64), f"make it night {seed}", seed=seed)
                times_s.append(round(time.monotonic() - started_s, 2))
            seen.append({"from_zero_s": times_s[0], "awake_s": times_s[1]})
            print(f"  woken: {seen[-1]}", flush=True)
    return seen


def main(config: BenchmarkConfig) -> None:
    """Measures and prints the figures."""
    # One cluster for both: Ray keeps the token of the first that a process has started.
    with local_cluster(port=free_port(prefer_usual=False), num_cpus=NUM_CPUS) as (address, folder):
        figures = compare(config)
        woken = wake(config, address, folder)
    print(
        json.dumps(
            {
                "name": "serving_scaling",
                "unit": "replica-seconds",
                "ours": figures["work"]["replica_s"],
                "reference": figures["requests"]["replica_s"],
                "ratio": figures["requests"]["replica_s"] / figures["work"]["replica_s"],
                "by": figures,
                "woken": woken,
            }
        )
    )


if __name__ == "__main__":
    main(tyro.cli(BenchmarkConfig))
