"""Many edits at once: batched stages against the same stages with batches of one.

Both in one run, in one process, over the real stages; results are compared pixel by pixel. The last line is
JSON: seconds until all edits are answered, and how many times faster batching is.
"""

import asyncio
import dataclasses
import io
import json
import math
import statistics
import time

import numpy as np
import tyro

from mgie.images.files import read_image
from mgie.images.geometry import center_square, resize
from serving.demo import draw_landscape
from serving.edits.backend import EditOutcome
from serving.edits.call import EditCall
from serving.edits.in_process import InProcessBackend
from serving.stages.diffusion import DiffusionStage
from serving.stages.messages import EditOptions
from serving.stages.mllm import MLLMStage

SIZES = ((320, 320), (400, 256), (256, 400), (480, 200))
ROWS = 3  # of the denoiser, per image


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """What to measure."""

    bundle: str = "tiny"
    "as `mgie.bundle.bundle.open_bundle` takes it"
    device: str = "cpu"
    "auto, cpu, cuda, ..."
    num_edits: int = 64
    "edits sent at once, in turn of four sizes"
    steps: int = 10
    "denoising steps of each"
    max_batch_size: int = 8
    "largest batch of each stage; the reference has 1"
    num_threads: int = 1
    "of torch"


def make_calls(config: BenchmarkConfig) -> list[EditCall]:
    """Edits of mixed sizes, each with its own words and seed."""
    landscape = center_square(read_image(draw_landscape()))
    photos = []
    for size in SIZES:
        out = io.BytesIO()
        resize(landscape, size).save(out, "JPEG")
        photos.append(out.getvalue())
    return [
        EditCall(
            image=photos[i % len(photos)],
            options=EditOptions(
                instruction=f"make it {'very ' * (i % 5)}dark", overrides={"steps": config.steps}, seed=i
            ),
            deadline=math.inf,
        )
        for i in range(config.num_edits)
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One way of serving all the edits."""

    outcomes: list[EditOutcome]
    latencies_s: list[float]
    total_s: float
    mean_batch_sizes: tuple[float, float]
    "of the MLLM and the diffusion stage"


async def serve_all(config: BenchmarkConfig, calls: list[EditCall], *, max_batch_size: int) -> Run:
    """Sends all edits at once to fresh stages."""
    given = {"device": config.device, "num_threads": config.num_threads}
    mllm = MLLMStage(config.bundle, max_batch_size=max_batch_size, cache_bytes=0, **given)
    diffusion = DiffusionStage(
        config.bundle, max_batch_rows=ROWS * max_batch_size, max_waiting=config.num_edits, **given
    )
    backend = InProcessBackend(mllm, diffusion)
    _ = [event async for event in backend.stream(calls[0])]  # warm
    warm = await backend.stats()
    started_s = time.perf_counter()

    async def one(call: EditCall) -> tuple[EditOutcome, float]:
        *_, outcome = [event async for event in backend.stream(call, is_watched=False)]
        assert isinstance(outcome, EditOutcome)
        return outcome, time.perf_counter() - started_s

    answered = await asyncio.gather(*(one(call) for call in calls))
    total_s = time.perf_counter() - started_s
    done = await backend.stats()
    mllm.close()
    diffusion.close()
    outcomes, latencies_s = zip(*answered, strict=True)
    mean_batch_sizes = (
        (done.mllm.work.num_items - warm.mllm.work.num_items)
        / (done.mllm.work.num_batches - warm.mllm.work.num_batches),
        statistics.mean(outcome.rendered.run.mean_batch_size for outcome in outcomes),
    )
    return Run(
        outcomes=list(outcomes), latencies_s=list(latencies_s), total_s=total_s, mean_batch_sizes=mean_batch_sizes
    )


def main(config: BenchmarkConfig) -> None:
    """Measures both ways and prints the figures."""
    calls = make_calls(config)
    runs = {
        "one at a time": asyncio.run(serve_all(config, calls, max_batch_size=1)),
        "batched": asyncio.run(serve_all(config, calls, max_batch_size=config.max_batch_size)),
    }
    print(f"{config.num_edits} edits at once, {len(SIZES)} sizes, {config.steps} steps, {config.device}")
    for name, run in runs.items():
        mllm, diffusion = run.mean_batch_sizes
        print(
            f"{name:>15}: all after {run.total_s:6.2f} s, median {statistics.median(run.latencies_s):6.2f} s, "
            f"mean batch MLLM {mllm:.2f}, diffusion {diffusion:.2f}"
        )
    worst = 0
    for one, batched in zip(*(run.outcomes for run in runs.values()), strict=True):
        pixels = [np.asarray(read_image(outcome.rendered.images[0])).astype(int) for outcome in (one, batched)]
        worst = max(worst, int(np.abs(pixels[0] - pixels[1]).max()))
    print(f"largest difference of a pixel between the two: {worst} of 255")
    reference, ours = (run.total_s for run in runs.values())
    figures = {
        "name": "serving_concurrency",
        "unit": "s",
        "ours": ours,
        "reference": reference,
        "ratio": reference / ours,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main(tyro.cli(BenchmarkConfig))
