"""Step-level batching (`mgie.engine`) against whole-request batching (`serving.batcher`) of the same renderer.

Edits of two sizes and three numbers of steps arrive at random (Poisson) at 50, 80 and 95 % of what the slower of the
two can do; both see the same arrivals and have the same largest batch. Twice: with a denoiser that only sleeps, a
fixed time per call and per row (an instrument: it shows scheduling and nothing else, whatever the machine is doing),
and with the real model. The last line is JSON: mean latency at 80 % with the instrument, and by how much it is lower.
"""

import asyncio
import copy
import dataclasses
import json
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence

import torch
import tyro
from PIL import Image
from torch import Tensor

from mgie.bundles import open_bundle
from mgie.conditioner import Guidance
from mgie.config import EditSettings
from mgie.engine import Engine
from mgie.renderer import Renderer, RenderRequest
from serving.batcher import GreedyBatcher

SIZES = ((64, 64), (96, 48))
LOADS = (0.5, 0.8, 0.95)
ROWS = 3  # of an edit with both scales

Send = Callable[[RenderRequest], Awaitable[object]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """What to measure."""

    bundle: str = "tiny"
    "as `mgie.bundles.open_bundle` takes it"
    device: str = "cpu"
    "auto, cpu, cuda, ..."
    num_edits: int = 100
    "at each load, with the instrument"
    num_real_edits: int = 48
    "at each load, with the real model; 0 leaves it out"
    work_area_px: int = 32 * 32
    "of the model: small, so that the VAE costs little beside the instrument"
    steps: tuple[int, ...] = (4, 8, 16)
    "edits have one of these"
    max_batch_size: int = 8
    "largest batch of both, in edits"
    call_ms: float = 8.0
    "the instrument: of one call of the denoiser"
    row_ms: float = 0.5
    "the instrument: of one row in it"
    seed: int = 0
    "of arrivals and edits"


class SleepingDenoiser:
    """A timing stand-in for a model: it sleeps as long as one would work, and predicts nothing."""

    def __init__(self, call_ms: float, row_ms: float) -> None:
        self._call_ms, self._row_ms = call_ms, row_ms

    def __call__(self, latents: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:  # noqa: ARG002, D102
        time.sleep((self._call_ms + self._row_ms * len(latents)) / 1000)
        return torch.zeros_like(latents[:, : latents.shape[1] // 2])


def make_requests(config: BenchmarkConfig, num: int) -> list[RenderRequest]:
    """Edits of mixed sizes and steps."""
    chance = random.Random(config.seed)
    condition = torch.randn(32, 64, generator=torch.Generator().manual_seed(config.seed))
    guidance = Guidance(
        expressive="",
        condition=condition,
        null_condition=torch.zeros_like(condition),
        used_fallback=False,
        prompt_tokens=0,
        image_tokens=0,
        output_tokens=0,
        bundle="",
    )
    return [
        RenderRequest(
            image=Image.new("RGB", chance.choice(SIZES), "teal"),
            guidance=guidance,
            settings=EditSettings(steps=chance.choice(config.steps)),
            seed=i,
        )
        for i in range(num)
    ]


async def latencies_s(send: Send, requests: Sequence[RenderRequest], arrivals_s: Sequence[float]) -> list[float]:
    """Seconds from each edit's arrival to its result."""
    started_s = time.perf_counter()

    async def one(request: RenderRequest, arrival_s: float) -> float:
        await asyncio.sleep(max(0.0, started_s + arrival_s - time.perf_counter()))
        await send(request)
        return time.perf_counter() - started_s - arrival_s

    return await asyncio.gather(*map(one, requests, arrivals_s))


def serve_by_steps(
    renderer: Renderer, config: BenchmarkConfig, requests: Sequence[RenderRequest], arrivals_s: Sequence[float]
) -> list[float]:
    """Latencies of the engine."""
    engine = Engine(renderer, max_batch_rows=ROWS * config.max_batch_size, max_waiting=len(requests), num_threads=1)

    async def send(request: RenderRequest) -> None:
        await asyncio.wrap_future(engine.submit(request).result)

    result = asyncio.run(latencies_s(send, requests, arrivals_s))
    engine.close()
    return result


def serve_by_requests(
    renderer: Renderer, config: BenchmarkConfig, requests: Sequence[RenderRequest], arrivals_s: Sequence[float]
) -> list[float]:
    """Latencies of the greedy batcher."""

    def render(batch: Sequence[RenderRequest]) -> Iterator[tuple[int, Image.Image]]:
        torch.set_num_threads(1)
        return renderer.render(batch)

    batcher = GreedyBatcher(
        render,
        key=lambda request: renderer.work_size(request.image.size, request.settings),
        max_batch_size=config.max_batch_size,
        name="render",
    )
    result = asyncio.run(latencies_s(batcher.submit, requests, arrivals_s))
    batcher.close()
    return result


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """One load."""

    load: float
    steps_mean_s: float
    steps_p99_s: float
    requests_mean_s: float
    requests_p99_s: float


def compare(renderer: Renderer, config: BenchmarkConfig, num_edits: int) -> list[Comparison]:
    """Measures capacity, then each load."""
    requests = make_requests(config, num_edits)
    ways = (serve_by_steps, serve_by_requests)
    for way in ways:  # warm
        way(renderer, config, requests[:4], [0.0] * 4)
    rates = [num_edits / max(way(renderer, config, requests, [0.0] * num_edits)) for way in ways]
    print(f"  all at once: {rates[0]:.2f} edits/s by steps, {rates[1]:.2f} edits/s by requests")
    comparisons = []
    for load in LOADS:
        chance, clock_s, arrivals_s = random.Random(config.seed + 1), 0.0, []
        for _ in requests:
            clock_s += chance.expovariate(load * min(rates))
            arrivals_s.append(clock_s)
        by_steps, by_requests = (way(renderer, config, requests, arrivals_s) for way in ways)
        comparison = Comparison(
            load=load,
            steps_mean_s=statistics.mean(by_steps),
            steps_p99_s=statistics.quantiles(by_steps, n=100, method="inclusive")[-1],
            requests_mean_s=statistics.mean(by_requests),
            requests_p99_s=statistics.quantiles(by_requests, n=100, method="inclusive")[-1],
        )
        comparisons.append(comparison)
        print(
            f"  load {load:.0%}: mean {comparison.steps_mean_s:.2f} s by steps, {comparison.requests_mean_s:.2f} s by "
            f"requests; p99 {comparison.steps_p99_s:.2f} s and {comparison.requests_p99_s:.2f} s"
        )
    return comparisons


def main(config: BenchmarkConfig) -> None:
    """Measures with the instrument, then with the real model, and prints the figures."""
    real = open_bundle(config.bundle).load_renderer(device=config.device)
    real.work_area_px = config.work_area_px
    asleep = copy.copy(real)
    asleep.denoiser = SleepingDenoiser(config.call_ms, config.row_ms)
    figures = {}
    print(f"a denoiser that sleeps {config.call_ms} ms per call and {config.row_ms} ms per row")
    figures["instrument"] = compare(asleep, config, config.num_edits)
    if config.num_real_edits:
        print(f"the real model ({config.bundle}, {config.device})")
        figures["real"] = compare(real, config, config.num_real_edits)
    [at_80] = [comparison for comparison in figures["instrument"] if comparison.load == 0.8]
    print(
        json.dumps(
            {
                "name": "engine",
                "unit": "s",
                "ours": at_80.steps_mean_s,
                "reference": at_80.requests_mean_s,
                "ratio": at_80.requests_mean_s / at_80.steps_mean_s,
                "loads": {kind: [dataclasses.asdict(one) for one in all_] for kind, all_ in figures.items()},
            }
        )
    )


if __name__ == "__main__":
    main(tyro.cli(BenchmarkConfig))
