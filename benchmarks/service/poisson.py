"""Step-level batching (`mgie.engine`) against whole-request batching (`serving.stages.batcher`) and `@serve.batch`.

Edits of two sizes and three numbers of steps arrive at random (Poisson) at 50, 80 and 95 % of what the slowest of the
three can do; all see the same arrivals, the same renderer in one live replica (of a private Ray cluster: `@serve.batch`
works nowhere else), and the same largest batch. Twice: with a denoiser that only sleeps, a fixed time per call and per row
(an instrument: it shows scheduling and nothing else, whatever the machine is doing), and with the real model. `--plot`
draws the latencies. The last line is JSON: mean latency at 80 % with the instrument, and by how much it is lower.
"""

import asyncio
import copy
import dataclasses
import itertools
import json
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import tyro
from PIL import Image
from ray import serve
from ray.serve.handle import DeploymentHandle
from torch import Tensor

from mgie.bundle.bundle import open_bundle
from mgie.config import EditSettings
from mgie.engine.engine import Engine
from mgie.inference.conditioner import EditCondition, EditRequest
from mgie.inference.renderer import Renderer, RenderRequest
from serving.local_cluster import free_port, local_cluster
from serving.stages.batcher import GreedyBatcher

SIZES = ((64, 64), (96, 48))
LOADS = (0.5, 0.8, 0.95)
ROWS = 3  # of an edit with both scales

Send = Callable[[RenderRequest], Awaitable[object]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """What to measure."""

    bundle: str = "tiny"
    "as `mgie.bundle.bundle.open_bundle` takes it"
    device: str = "cpu"
    "auto, cpu, cuda, ..."
    num_edits: int = 100
    "at each load, with the instrument"
    num_real_edits: int = 48
    "at each load, with the real model; 0 leaves it out"
    asleep_area_px: int = 32 * 32
    "work pixels with the instrument: few, so that the VAE costs little beside it"
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
    plot: Path | None = None
    "where to draw the latencies, an SVG file"


class SleepingDenoiser:
    """A timing stand-in for a model: it sleeps as long as one would work, and predicts nothing."""

    def __init__(self, call_ms: float, row_ms: float) -> None:
        self._call_ms, self._row_ms = call_ms, row_ms

    def __call__(self, latents: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:  # noqa: ARG002, D102
        time.sleep((self._call_ms + self._row_ms * len(latents)) / 1000)
        return torch.zeros_like(latents[:, : latents.shape[1] // 2])


def make_requests(config: BenchmarkConfig, num: int, edit_condition: EditCondition) -> list[RenderRequest]:
    """Edits of mixed sizes and steps."""
    chance = random.Random(config.seed)
    return [
        RenderRequest(
            image=Image.new("RGB", chance.choice(SIZES), "teal"),
            edit_condition=edit_condition,
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Served:
    """One way, one load."""

    latencies_s: list[float]
    max_join_steps: int | None = None
    "of the engine: most steps of others between an edit's being ready and its own first step"

    @property
    def mean_s(self) -> float:
        """Mean latency."""
        return statistics.mean(self.latencies_s)

    @property
    def p99_s(self) -> float:
        """99th percentile of latency."""
        return statistics.quantiles(self.latencies_s, n=100, method="inclusive")[-1]


def serve_by_steps(
    renderer: Renderer, config: BenchmarkConfig, requests: Sequence[RenderRequest], arrivals_s: Sequence[float]
) -> Served:
    """The engine."""
    engine = Engine(renderer, max_batch_rows=ROWS * config.max_batch_size, max_waiting=len(requests), num_threads=1)

    join_steps: list[int] = []

    async def send(request: RenderRequest) -> None:
        handle = engine.submit(request)
        await asyncio.wrap_future(handle.result)
        join_steps.append(handle.run.join_steps)

    result = asyncio.run(latencies_s(send, requests, arrivals_s))
    engine.close()
    return Served(latencies_s=result, max_join_steps=max(join_steps))


def serve_by_requests(
    renderer: Renderer, config: BenchmarkConfig, requests: Sequence[RenderRequest], arrivals_s: Sequence[float]
) -> Served:
    """The greedy batcher."""

    def render(
        batch: Sequence[RenderRequest],
        is_wanted: Callable[[int], bool],  # noqa: ARG001
    ) -> Iterator[tuple[int, Image.Image]]:
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
    return Served(latencies_s=result)


def serve_by_serve_batch(
    renderer: Renderer, config: BenchmarkConfig, requests: Sequence[RenderRequest], arrivals_s: Sequence[float]
) -> Served:
    """Ray Serve's decorator, which knows nothing of sizes: a batch of several is rendered size by size."""

    def size(request: RenderRequest) -> tuple[int, int]:
        return renderer.work_size(request.image.size, request.settings)

    def render(batch: Sequence[RenderRequest]) -> None:
        torch.set_num_threads(1)
        for _, same_size in itertools.groupby(sorted(batch, key=size), key=size):
            list(renderer.render(list(same_size)))

    @serve.batch(max_batch_size=config.max_batch_size)
    async def send(batch: list[RenderRequest]) -> list[None]:
        await asyncio.to_thread(render, batch)
        return [None] * len(batch)

    return Served(latencies_s=asyncio.run(latencies_s(send, requests, arrivals_s)))


WAYS = {"steps": serve_by_steps, "requests": serve_by_requests, "serve_batch": serve_by_serve_batch}

Comparison = dict[str, Served]  # by way


class Bench:
    """The replica that all is measured in."""

    def __init__(self, config: BenchmarkConfig) -> None:
        self._config = config
        bundle = open_bundle(config.bundle)
        self._real = bundle.load_renderer(device=config.device)
        request = EditRequest(image=Image.new("RGB", SIZES[0], "teal"), instruction="make it brighter")
        [self._edit_conditions] = bundle.load_conditioner(device=config.device).derive([request])
        self._asleep = copy.copy(self._real)
        self._asleep.work_area_px = config.asleep_area_px
        self._asleep.denoiser = SleepingDenoiser(config.call_ms, config.row_ms)

    async def compare(self, kind: str, num_edits: int) -> tuple[dict[str, float], dict[float, Comparison]]:
        """See `compare`."""
        renderer = {"instrument": self._asleep, "real": self._real}[kind]
        requests = make_requests(self._config, num_edits, self._edit_conditions)
        return await asyncio.to_thread(compare, renderer, self._config, requests)


def compare(
    renderer: Renderer, config: BenchmarkConfig, requests: Sequence[RenderRequest]
) -> tuple[dict[str, float], dict[float, Comparison]]:
    """Edits per second of each way when all come at once, and what each does with each load."""
    for way in WAYS.values():  # warm
        way(renderer, config, requests[:4], [0.0] * 4)
    rates = {
        name: len(requests) / max(way(renderer, config, requests, [0.0] * len(requests)).latencies_s)
        for name, way in WAYS.items()
    }
    comparisons: dict[float, Comparison] = {}
    for load in LOADS:
        chance, clock_s, arrivals_s = random.Random(config.seed + 1), 0.0, []
        for _ in requests:
            clock_s += chance.expovariate(load * min(rates.values()))
            arrivals_s.append(clock_s)
        comparisons[load] = {name: way(renderer, config, requests, arrivals_s) for name, way in WAYS.items()}
    return rates, comparisons


def show(rates: Mapping[str, float], comparisons: Mapping[float, Comparison]) -> None:
    """Prints the figures of one model."""
    print("  all at once: " + ", ".join(f"{rate:.2f} edits/s by {name}" for name, rate in rates.items()))
    for load, served in comparisons.items():
        print(
            f"  load {load:.0%}: "
            + "; ".join(f"{name} mean {one.mean_s:.2f} s, p99 {one.p99_s:.2f} s" for name, one in served.items())
            + f"; a late edit waits for at most {served['steps'].max_join_steps} steps"
        )


_COLORS = dict(zip(WAYS, ("#1565c0", "#ef6c00", "#777"), strict=True))
_WIDTH, _HEIGHT, _MARGIN = 300, 240, 44


def plot(figures: Mapping[str, Mapping[float, Comparison]]) -> str:
    """An SVG: for each kind of model, mean (solid) and p99 (dashed) latency over the load."""
    panels = [_panel(left * _WIDTH, kind, comparisons) for left, (kind, comparisons) in enumerate(figures.items())]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH * len(panels)} {_HEIGHT}" fill="none" '
        f'font-family="sans-serif" font-size="10"><rect width="100%" height="100%" fill="#fff"/>{"".join(panels)}</svg>\n'
    )


def _panel(left: float, kind: str, comparisons: Mapping[float, Comparison]) -> str:
    most_s = max(one.p99_s for served in comparisons.values() for one in served.values())
    low, high = min(LOADS), max(LOADS)

    def place(load: float, latency_s: float) -> str:
        x = left + _MARGIN + (_WIDTH - 2 * _MARGIN) * (load - low) / (high - low)
        return f"{x:.1f},{_HEIGHT - _MARGIN - (_HEIGHT - 2 * _MARGIN) * latency_s / most_s:.1f}"

    def text(x: float, y: float, words: str, color: str = "#333") -> str:
        return f'<text x="{left + x}" y="{y}" fill="{color}">{words}</text>'

    parts = [f'<polyline points="{place(low, most_s)} {place(low, 0)} {place(high, 0)}" stroke="#333"/>']
    for number, (name, color) in enumerate(_COLORS.items()):
        for figure, dashes in (("mean_s", ""), ("p99_s", ' stroke-dasharray="4 3"')):
            points = " ".join(place(load, getattr(served[name], figure)) for load, served in comparisons.items())
            parts.append(f'<polyline points="{points}" stroke="{color}"{dashes}/>')
        parts.append(text(_MARGIN + 6, _MARGIN + 12 * number, name, color))
    parts += [
        text(_MARGIN + (_WIDTH - 2 * _MARGIN) * (load - low) / (high - low) - 8, _HEIGHT - _MARGIN + 14, f"{load:.0%}")
        for load in comparisons
    ]
    parts.append(text(4, _MARGIN, f"{most_s:.2f} s"))
    parts.append(text(_MARGIN, 20, f"{kind}: mean (solid) and p99 (dashed) latency over load"))
    return "".join(parts)


def main(config: BenchmarkConfig) -> None:
    """Measures with the instrument, then with the real model, and prints the figures."""
    kinds = {
        "instrument": (
            config.num_edits,
            f"a denoiser that sleeps {config.call_ms} ms per call, {config.row_ms} per row",
        ),
        "real": (config.num_real_edits, f"the real model ({config.bundle}, {config.device})"),
    }
    figures: dict[str, dict[float, Comparison]] = {}
    with local_cluster(port=free_port(prefer_usual=False)):
        bench = serve.deployment(max_ongoing_requests=1000, ray_actor_options={"num_cpus": 1})(Bench)
        replica: DeploymentHandle[Any] = serve.run(bench.bind(config), name="bench")
        for kind, (num_edits, words) in kinds.items():
            if num_edits:
                print(words)
                rates, figures[kind] = replica.compare.remote(kind, num_edits).result()
                show(rates, figures[kind])
    if config.plot is not None:
        config.plot.write_text(plot(figures))
    at_80 = figures["instrument"][0.8]
    print(
        json.dumps(
            {
                "name": "serving_poisson",
                "unit": "s",
                "ours": at_80["steps"].mean_s,
                "reference": at_80["requests"].mean_s,
                "ratio": at_80["requests"].mean_s / at_80["steps"].mean_s,
                "ratio_serve_batch": at_80["serve_batch"].mean_s / at_80["steps"].mean_s,
                "max_join_steps": max(
                    served["steps"].max_join_steps for loads in figures.values() for served in loads.values()
                ),
                "loads": {
                    kind: {
                        f"{load:.0%}": {
                            name: {"mean_s": one.mean_s, "p99_s": one.p99_s} for name, one in served.items()
                        }
                        for load, served in loads.items()
                    }
                    for kind, loads in figures.items()
                },
            }
        )
    )


if __name__ == "__main__":
    main(tyro.cli(BenchmarkConfig))
