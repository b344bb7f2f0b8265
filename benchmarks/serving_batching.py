"""Greedy batching against `@serve.batch` at its defaults, in live replicas, on a stage of a fixed service time.

The stage is a timing stand-in: it sleeps as long as a model would work, one batch at a time, whatever the batch. It
shows scheduling and nothing else, on any machine. Both get the same requests, one every 30 ms. The last line is JSON:
seconds from the first request to the last answer.
"""

import asyncio
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tyro
from ray import serve
from ray.serve.handle import DeploymentHandle

from serving.local_cluster import free_port, local_cluster
from serving.stages.batcher import GreedyBatcher


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """What to measure."""

    num_requests: int = 60
    "requests to each of the two"
    interval_ms: float = 30.0
    "from one request to the next"
    service_ms: float = 200.0
    "of a batch, whatever its size"
    max_batch_size: int = 8
    "largest greedy batch; that of @serve.batch is 10 by default"


class GreedyStage:
    """The stand-in behind our batcher."""

    def __init__(self, service_s: float, max_batch_size: int) -> None:
        def work(items: Sequence[int], is_wanted: Callable[[int], bool]) -> Iterator[tuple[int, int]]:  # noqa: ARG001
            time.sleep(service_s)
            self.sizes.append(len(items))
            return enumerate(items)

        self.sizes: list[int] = []
        self._batcher: GreedyBatcher[int, int] = GreedyBatcher(
            work, key=lambda _: None, max_batch_size=max_batch_size, name="stand-in"
        )

    async def __call__(self, item: int) -> int:
        """One request."""
        return (await self._batcher.submit(item)).result

    async def mean_batch_size(self) -> float:
        """Of the batches so far."""
        return statistics.mean(self.sizes)


class ServeBatchStage:
    """The stand-in behind `@serve.batch`."""

    def __init__(self, service_s: float) -> None:
        self._service_s = service_s
        self.sizes: list[int] = []

    @serve.batch
    async def _work(self, items: list[int]) -> list[int]:
        await asyncio.to_thread(time.sleep, self._service_s)
        self.sizes.append(len(items))
        return items

    async def __call__(self, item: int) -> int:
        """One request."""
        result: int = await self._work(item)
        return result

    async def mean_batch_size(self) -> float:
        """Of the batches so far."""
        return statistics.mean(self.sizes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One of the two."""

    makespan_s: float
    p50_s: float
    mean_batch_size: float


async def measure(stage: DeploymentHandle[Any], config: BenchmarkConfig) -> Run:
    """Sends the requests at their times, whatever becomes of those before."""
    await stage.remote(-1)  # routing is warm
    started_s = time.perf_counter()

    async def one(number: int) -> float:
        at_s = number * config.interval_ms / 1000
        await asyncio.sleep(max(0.0, started_s + at_s - time.perf_counter()))
        assert await stage.remote(number) == number
        return time.perf_counter() - started_s - at_s

    latencies_s = await asyncio.gather(*map(one, range(config.num_requests)))
    makespan_s = time.perf_counter() - started_s
    mean_batch_size: float = await stage.mean_batch_size.remote()
    return Run(makespan_s=makespan_s, p50_s=statistics.median(latencies_s), mean_batch_size=mean_batch_size)


def main(config: BenchmarkConfig) -> None:
    """Measures both and prints the figures."""
    common: dict[str, Any] = {"max_ongoing_requests": 1000, "ray_actor_options": {"num_cpus": 0.2}}
    service_s = config.service_ms / 1000
    ways = {
        "greedy": serve.deployment(name="greedy", **common)(GreedyStage).bind(service_s, config.max_batch_size),
        "@serve.batch": serve.deployment(name="serve_batch", **common)(ServeBatchStage).bind(service_s),
    }
    print(
        f"{config.num_requests} requests {config.interval_ms:g} ms apart, a stand-in of {config.service_ms:g} ms a batch"
    )
    runs: dict[str, Run] = {}
    with local_cluster(port=free_port(prefer_usual=False)):
        for number, (name, application) in enumerate(ways.items()):
            stage: DeploymentHandle[Any] = serve.run(application, name=f"way{number}", route_prefix=f"/way{number}")
            run = runs[name] = asyncio.run(measure(stage, config))
            print(
                f"{name:>13}: makespan {run.makespan_s:.2f} s, p50 {run.p50_s:.2f} s, mean batch {run.mean_batch_size:.2f}"
            )
            serve.delete(f"way{number}")
    ours, reference = runs.values()
    print(
        json.dumps(
            {
                "name": "serving_batching",
                "unit": "s",
                "ours": ours.makespan_s,
                "reference": reference.makespan_s,
                "ratio": reference.makespan_s / ours.makespan_s,
                "ratio_p50": reference.p50_s / ours.p50_s,
                "runs": {name: dataclasses.asdict(run) for name, run in runs.items()},
            }
        )
    )


if __name__ == "__main__":
    main(tyro.cli(BenchmarkConfig))
