"""Overload: an open loop at several times what the service can do, against its own peak.

The peak is what as many clients as the service takes in at once get, each sending its next edit when the last is
answered. Then edits arrive at a fixed rate, whatever becomes of those before. The last line is JSON: edits answered
with 200 per second.
"""

import asyncio
import dataclasses
import json
import statistics
import time
from collections import Counter

import httpx2
import tyro

from serving.args import ServingArgs
from serving.demo import draw_landscape
from serving.local_cluster import free_port, local_service


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """What to measure."""

    bundle: str = "tiny"
    "as `mgie.bundle.bundle.open_bundle` takes it"
    seconds: float = 90.0
    "of each of the two"
    factor: float = 5.0
    "arrivals, in peaks"
    steps: int = 10
    "denoising steps of each edit"
    side_px: int = 128
    "longer side of the photo"
    max_open_edits: int = 16
    "that the ingress takes in at once"
    timeout_s: float = 30.0
    "deadline of an edit"


@dataclasses.dataclass(frozen=True)
class Answer:
    """One edit."""

    status: int
    ended_s: float
    latency_s: float


class Load:
    """Edits over HTTP."""

    def __init__(self, config: BenchmarkConfig, client: httpx2.AsyncClient) -> None:
        self._client, self._config = client, config
        self._photo = draw_landscape(config.side_px, config.side_px * 7 // 10)
        self._number = 0

    async def edit(self) -> Answer:
        """One edit, with words of its own."""
        self._number += 1
        started_s = time.perf_counter()
        answer = await self._client.post(
            "/v1/images/edits",
            files={"image": ("photo", self._photo)},
            data={"prompt": f"edit {self._number}", "seed": "1", "steps": str(self._config.steps)},
        )
        ended_s = time.perf_counter()
        return Answer(answer.status_code, ended_s, ended_s - started_s)

    async def closed(self, num_clients: int, seconds: float) -> list[Answer]:
        """Each client sends its next edit when the last is answered."""
        answers: list[Answer] = []
        ends_s = time.perf_counter() + seconds

        async def client() -> None:
            while time.perf_counter() < ends_s:
                answers.append(await self.edit())

        await asyncio.gather(*(client() for _ in range(num_clients)))
        return answers

    async def open(self, rate: float, seconds: float) -> list[Answer]:
        """Edits arrive at a fixed rate, whatever becomes of those before."""
        started_s = time.perf_counter()

        async def one(number: int) -> Answer:
            await asyncio.sleep(max(0.0, started_s + number / rate - time.perf_counter()))
            return await self.edit()

        return await asyncio.gather(*(one(number) for number in range(int(rate * seconds))))


def goodput(answers: list[Answer], started_s: float, seconds: float) -> float:
    """Edits answered with 200 per second, of those that ended in time."""
    return sum(answer.status == 200 and answer.ended_s <= started_s + seconds for answer in answers) / seconds


async def measure(config: BenchmarkConfig, address: str) -> dict[str, object]:
    """The peak, then the overload."""
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=64)
    async with httpx2.AsyncClient(base_url=address, timeout=config.timeout_s + 30, limits=limits) as client:
        load = Load(config, client)
        await load.closed(config.max_open_edits, 3)  # warm
        started_s = time.perf_counter()
        peak = goodput(await load.closed(config.max_open_edits, config.seconds), started_s, config.seconds)
        print(f"peak {peak:.2f} edits/s with {config.max_open_edits} clients")
        started_s = time.perf_counter()
        answers = await load.open(config.factor * peak, config.seconds)
        under_load = goodput(answers, started_s, config.seconds)
    statuses = Counter(answer.status for answer in answers)
    accepted_s = [answer.latency_s for answer in answers if answer.status == 200]
    refused_s = [answer.latency_s for answer in answers if answer.status == 429]
    p99_s = statistics.quantiles(accepted_s, n=100, method="inclusive")[-1]
    print(f"at {config.factor:g} times that: {under_load:.2f} edits/s, statuses {dict(statuses)}")
    print(f"accepted: p50 {statistics.median(accepted_s):.2f} s, p99 {p99_s:.2f} s")
    return {
        "name": "serving_overload",
        "unit": "edits/s",
        "ours": under_load,
        "reference": peak,
        "ratio": under_load / peak,
        "statuses": dict(statuses),
        "p99_accepted_s": p99_s,
        "p50_refused_s": statistics.median(refused_s) if refused_s else None,
    }


def main(config: BenchmarkConfig) -> None:
    """Measures and prints the figures."""
    args = ServingArgs(
        bundle=config.bundle,
        device="cpu",
        mllm_max_replicas=1,
        diffusion_max_replicas=1,
        max_open_edits=config.max_open_edits,
        timeout_s=config.timeout_s,
    )
    with local_service(args, port=free_port(prefer_usual=False)) as address:
        print(json.dumps(asyncio.run(measure(config, address))))


if __name__ == "__main__":
    main(tyro.cli(BenchmarkConfig))
