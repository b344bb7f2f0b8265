"""How the summarize job scales over actors, and what memory it takes for ten times the rows.

    python benchmarks/jobs/summarize_scaling.py            rows/s at 1, 2, 4 and 8 actors; a plot in out/summarize_scaling.svg
    python benchmarks/jobs/summarize_scaling.py --memory   peaks of driver and object store for N and 10 N rows

A measuring instrument, not a model: each describing actor sleeps 500 ms per batch of 8 rows, as if a GPU worked, and
each summarising actor does so too. All else (Ray Data, fetching, decoding, commits) is the job's own. Actors are
logical: n of them sleep on however few cores there are, so what is measured is whether the pipeline keeps them busy.
"""

import argparse
import contextlib
import json
import logging
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import ray
import ray.cloudpickle
from PIL import Image
from ray.data import DataContext

import pipelines.summarize
from mgie.storage.folder import open_folder
from pipelines.runs.cluster import StageSize, start_ray
from pipelines.stages.describers import Description
from pipelines.summarize import SummarizeConfig, plan, stream
from tests.pipelines.chaos import write_manifest

BATCH_ROWS, SERVICE_S = 8, 0.5


class SleepingDescriber:
    """Takes a fixed time per batch."""

    model, revision = "sleeping", "0"

    def __init__(self, service_s: float, _config: SummarizeConfig) -> None:
        self._service_s = service_s

    def describe(self, _images: Sequence[Image.Image], instructions: Sequence[str]) -> list[Description]:
        """Says what it was told."""
        time.sleep(self._service_s)
        return [Description(text=text, prompt_tokens=1, output_tokens=1) for text in instructions]


class SleepingSummarizer:
    """Takes a fixed time per batch."""

    model, revision = "sleeping", "0"

    def __init__(self, service_s: float, _config: SummarizeConfig) -> None:
        self._service_s = service_s

    def summarize(self, texts: Sequence[str]) -> list[tuple[str, int, int]]:
        """Says what it was told."""
        time.sleep(self._service_s)
        return [(text, 1, 1) for text in texts]


@dataclass(frozen=True)
class Written:
    """A block of rows reached the disk."""

    at_s: float
    num_rows: int


def run(folder: Path, num_rows: int, num_actors: int, *, service_s: float, side_px: int = 64) -> list[Written]:
    """The job's pipeline with sleeping stages, from a fresh manifest to a ledger."""
    manifest, out = open_folder(folder / "manifest"), open_folder(folder / "ledger")
    write_manifest(manifest, num_rows, side_px=side_px, has_bad=False)
    size = StageSize(min_actors=num_actors, max_actors=num_actors, num_cpus=0.5, batch_size=BATCH_ROWS)
    config = SummarizeConfig(manifest=manifest.url, out=out.url, describe=size, summarize=size, max_rows_in_flight=1024)
    written = []
    for block in stream(
        config,
        out,
        manifest,
        plan(config, manifest, out),
        describer=partial(SleepingDescriber, service_s),
        summarizer=partial(SleepingSummarizer, service_s),
    ):
        assert block["status"] == {"ok": block["rows"]}, block
        written.append(Written(time.perf_counter(), block["rows"]))
    assert sum(block.num_rows for block in written) == num_rows
    return written


def steady_rate(written: Sequence[Written], num_actors: int) -> float:
    """Rows per second while all actors work: without the first two blocks and the last of each actor."""
    kept = written[2 * num_actors : -num_actors]
    return sum(block.num_rows for block in kept[1:]) / (kept[-1].at_s - kept[0].at_s)


def start(num_cpus: int) -> None:
    """A cluster of this process alone, with so many logical CPUs."""
    ray.init(
        address="local",
        num_cpus=num_cpus,
        include_dashboard=False,
        object_store_memory=512 << 20,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    start_ray()
    # As when the job runs as a script: its functions travel by value, and workers load only what these need.
    ray.cloudpickle.register_pickle_by_value(pipelines.summarize)
    DataContext.get_current().wait_for_min_actors_s = 600  # so that loading is not measured


def scaling(counts: Sequence[int], seconds: float) -> None:
    """Rows per second against actors."""
    rates = {}
    start(max(counts) + 4)
    for num_actors in counts:
        # So many blocks that the steady part lasts about `seconds`, whatever the number of actors.
        block_s = 32 / BATCH_ROWS * SERVICE_S
        num_blocks = num_actors * (4 + round(seconds / block_s))
        with tempfile.TemporaryDirectory(prefix="mgie-bench-") as folder:
            written = run(Path(folder), num_blocks * 32, num_actors, service_s=SERVICE_S)
        rates[num_actors] = steady_rate(written, num_actors)
        efficiency = rates[num_actors] / (num_actors * rates[counts[0]] / counts[0])
        ideal = num_actors * BATCH_ROWS / SERVICE_S
        print(
            f"{num_actors} actors: {rates[num_actors]:7.2f} rows/s of {ideal:g} that they could do, "
            f"efficiency {efficiency:.3f}",
            flush=True,
        )
    ray.shutdown()
    plot = Path("out") / "summarize_scaling.svg"
    plot.parent.mkdir(exist_ok=True)
    plot.write_text(svg(rates))
    print(f"plot: {plot}")
    most, one = max(counts), counts[0]
    reference = most * rates[one] / one
    result = {
        "name": f"summarize scaling to {most} actors",
        "unit": "rows/s",
        "ours": round(rates[most], 3),
        "reference": round(reference, 3),
        "ratio": round(rates[most] / reference, 4),
    }
    print(json.dumps(result))


def svg(rates: dict[int, float]) -> str:
    """Rows per second against actors, with the straight line through the first point."""
    width, height, margin = 480, 360, 56
    first, last = min(rates), max(rates)
    top = max(*rates.values(), last * rates[first] / first) * 1.08

    def at(num_actors: float, rate: float) -> str:
        x = margin + (width - 1.5 * margin) * num_actors / last
        return f"{x:.1f},{height - margin - (height - 1.5 * margin) * rate / top:.1f}"

    def text(point: str, content: str, anchor: str = "middle", dy: int = 0) -> str:
        x, y = point.split(",")
        return f'<text x="{x}" y="{float(y) + dy}" text-anchor="{anchor}">{content}</text>'

    ideal = (
        f'<polyline points="{at(0, 0)} {at(last, last * rates[first] / first)}" stroke="#999" stroke-dasharray="5 4"/>'
    )
    measured = (
        f'<polyline points="{" ".join(at(n, rate) for n, rate in rates.items())}" stroke="#1565c0" stroke-width="2"/>'
    )
    axes = f'<polyline points="{at(0, top)} {at(0, 0)} {at(last, 0)}" stroke="#333"/>'
    dots = "".join(
        '<circle cx="{}" cy="{}" r="4" fill="#1565c0"/>'.format(*at(*point).split(",")) for point in rates.items()
    )
    labels = "".join(
        text(at(n, 0), str(n), dy=18) + text(at(n, rate), f"{rate:.0f}", "end", dy=-9) for n, rate in rates.items()
    )
    titles = text(at(last / 2, 0), "actors per stage", dy=38) + text(
        at(0, top), "rows/s; dashed: n times one actor", "start", dy=-8
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" fill="none" '
        f'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="#fff"/>{axes}{ideal}{measured}'
        f'{dots}<g fill="#333">{labels}{titles}</g></svg>\n'
    )


@contextlib.contextmanager
def peak_of_store(peak: list[int]) -> Iterator[None]:
    """Watches the bytes in the object store while the block runs."""
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    state, ended = get_state_from_address(ray.get_runtime_context().gcs_address), threading.Event()

    def watch() -> None:
        while not ended.wait(0.1):
            stats = get_memory_info_reply(state).store_stats
            peak[0] = max(peak[0], stats.object_store_bytes_used)
            peak[1] = max(peak[1], stats.spilled_bytes_total)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def memory_of(num_rows: int) -> None:
    """One run in this process; prints its peaks."""
    start(num_cpus=6)
    peak = [0, 0]
    with tempfile.TemporaryDirectory(prefix="mgie-bench-") as folder, peak_of_store(peak):
        run(Path(folder), num_rows, 2, service_s=0.1, side_px=512)
    driver = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"rows": num_rows, "driver": driver, "store": peak[0], "spilled": peak[1]}))


def memory(num_rows: int) -> None:
    """Peaks for `num_rows` and ten times as many, each in a process of its own."""
    peaks = []
    for count in (num_rows, 10 * num_rows):
        command = [sys.executable, __file__, "--memory-of", str(count)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        peaks.append(json.loads(output.splitlines()[-1]))
        print({name: f"{value / 2**20:.1f} MiB" if name != "rows" else value for name, value in peaks[-1].items()})
    few, many = peaks
    for name in ("driver", "store"):
        result = {
            "name": f"summarize, peak memory of {name}, {num_rows} to {10 * num_rows} rows",
            "unit": "MiB",
            "ours": round(many[name] / 2**20, 1),
            "reference": round(few[name] / 2**20, 1),
            "ratio": round(many[name] / few[name], 3),
        }
        print(json.dumps(result))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--actors", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--seconds", type=float, default=20, help="of the steady part of each run")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--rows", type=int, default=500, help="for --memory")
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        memory_of(args.memory_of)
    elif args.memory:
        memory(args.rows)
    else:
        scaling(args.actors, args.seconds)


if __name__ == "__main__":
    main()
