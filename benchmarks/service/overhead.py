"""What HTTP, Ray Serve and two stages add to an edit: p50 over HTTP against p50 of `Editor.edit`, one at a time.

From the same encoded photo to the same encoded result, with the same number of threads; in turns, so that whatever
else the machine does is shared fairly. The last line is JSON: milliseconds.
"""

import base64
import dataclasses
import json
import statistics
import time

import httpx2
import torch
import tyro

from mgie.bundle.bundle import open_bundle
from mgie.config import SOFTWARE
from mgie.editor import Editor
from mgie.images.files import EditMetadata, write_image
from serving.args import ServingArgs
from serving.demo import draw_landscape
from serving.local_cluster import free_port, local_service


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """What to measure."""

    bundle: str = "tiny"
    "as `mgie.bundle.bundle.open_bundle` takes it"
    num_edits: int = 30
    "edits each way"
    steps: int = 10
    "denoising steps of each"
    side_px: int = 256
    "longer side of the photo"
    num_threads: int = 1
    "of torch, in each way"


def main(config: BenchmarkConfig) -> None:
    """Measures both ways and prints the figures."""
    torch.set_num_threads(config.num_threads)
    photo = draw_landscape(config.side_px, config.side_px * 7 // 10)
    bundle = open_bundle(config.bundle)
    editor = Editor.load(bundle, device="cpu")
    args = ServingArgs(
        bundle=config.bundle,
        device="cpu",
        mllm_max_replicas=1,
        diffusion_max_replicas=1,
        mllm_num_threads=config.num_threads,
        diffusion_num_threads=config.num_threads,
        mllm_cache_bytes=0,
    )

    def by_editor(number: int) -> bytes:
        result = editor.edit(photo, f"edit {number}", seed=number, steps=config.steps)
        metadata = EditMetadata(seed=number, bundle=bundle.identity, software=SOFTWARE)
        return write_image(result.image, format="png", metadata=metadata)

    def by_http(number: int) -> bytes:
        answer = client.post(
            "/v1/images/edits",
            files={"image": ("photo", photo)},
            data={"prompt": f"edit {number}", "seed": str(number), "steps": str(config.steps)},
        ).raise_for_status()
        return base64.b64decode(answer.json()["data"][0]["b64_json"])

    ways = {"Editor.edit": by_editor, "HTTP": by_http}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    num_equal = 0
    with (
        local_service(args, port=free_port(prefer_usual=False)) as address,
        httpx2.Client(base_url=address, timeout=120) as client,
    ):
        for number in range(-3, config.num_edits):  # the first three are for warmth
            results = []
            for name, way in ways.items():
                started_s = time.perf_counter()
                results.append(way(abs(number)))
                if number >= 0:
                    seconds[name].append(time.perf_counter() - started_s)
            num_equal += number >= 0 and results[0] == results[1]
    p50_ms = {name: 1000 * statistics.median(times) for name, times in seconds.items()}
    overhead_ms = p50_ms["HTTP"] - p50_ms["Editor.edit"]
    print(f"{config.num_edits} edits each way, {config.steps} steps, {config.num_threads} threads")
    print(", ".join(f"{name}: p50 {p50:.1f} ms" for name, p50 in p50_ms.items()), f"overhead {overhead_ms:.1f} ms")
    print(f"{num_equal} of {config.num_edits} results are equal byte for byte")
    print(
        json.dumps(
            {
                "name": "serving_overhead",
                "unit": "ms",
                "ours": p50_ms["HTTP"],
                "reference": p50_ms["Editor.edit"],
                "ratio": p50_ms["HTTP"] / p50_ms["Editor.edit"],
                "overhead_ms": overhead_ms,
                "num_equal": num_equal,
            }
        )
    )


if __name__ == "__main__":
    main(tyro.cli(BenchmarkConfig))
