"""Keys under attack: what a flood without a valid key costs, and that it wakes no stage.

On a private local cluster whose stages are scaled to zero, clients without a key send requests as fast as they are
answered. The last line is JSON: refused requests per second, against answers of `/healthz`, which nobody decides about.
"""

import asyncio
import dataclasses
import json
import tempfile
import time
from collections import Counter
from pathlib import Path

import httpx2
import tyro
from ray import serve

from serving.access.keys import new_key
from serving.args import ServingArgs
from serving.demo import draw_landscape
from serving.local_cluster import free_port, local_service

STAGES = ("MLLMStage", "DiffusionStage")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """What to measure."""

    bundle: str = "tiny"
    "as `mgie.bundle.bundle.open_bundle` takes it"
    seconds: float = 20.0
    "of each flood"
    num_clients: int = 8
    "that send at the same time"


def num_replicas() -> int:
    """Replicas of both stages, in whatever state."""
    deployments = serve.status().applications["mgie"].deployments
    return sum(sum(deployments[name].replica_states.values()) for name in STAGES)


async def flood(config: BenchmarkConfig, client: httpx2.AsyncClient, method: str, path: str) -> tuple[float, int]:
    """Answers per second, and the most replicas that were seen meanwhile."""
    statuses: Counter[int] = Counter()
    started_s, most = time.perf_counter(), 0
    ends_s = started_s + config.seconds
    body = {"files": {"image": ("photo", draw_landscape(128, 90))}, "data": {"prompt": "p"}} if method == "POST" else {}

    async def one() -> None:
        while time.perf_counter() < ends_s:
            statuses[(await client.request(method, path, **body)).status_code] += 1

    async def watch() -> None:
        nonlocal most
        while time.perf_counter() < ends_s + 5:  # the autoscaler looks every few seconds
            most = max(most, await asyncio.to_thread(num_replicas))
            await asyncio.sleep(0.2)

    watching = asyncio.create_task(watch())
    await asyncio.gather(*(one() for _ in range(config.num_clients)))
    seconds = time.perf_counter() - started_s
    await watching
    print(f"{method} {path}: {statuses.total() / seconds:.0f} answers/s, statuses {dict(statuses)}, replicas {most}")
    expected = 200 if path == "/healthz" else 401
    assert set(statuses) == {expected}, statuses
    return statuses.total() / seconds, most


async def measure(config: BenchmarkConfig, address: str, key: str) -> dict[str, object]:
    """The floods, and then one edit with a key."""
    async with httpx2.AsyncClient(base_url=address, timeout=300) as client:
        reference, _ = await flood(config, client, "GET", "/healthz")
        models, most_models = await flood(config, client, "GET", "/readyz")
        edits, most_edits = await flood(config, client, "POST", "/v1/images/edits")
        started_s = time.perf_counter()
        answer = await client.post(
            "/v1/images/edits",
            files={"image": ("photo", draw_landscape(128, 90))},
            data={"prompt": "p", "steps": "2"},
            headers={"authorization": f"Bearer {key}"},
        )
        assert answer.status_code == 200, answer.text
        first_s = time.perf_counter() - started_s
        woken = num_replicas()
    assert woken >= 2, "an edit with a key started no replica: the floods would not have been seen"
    return {
        "name": "serving_keys",
        "unit": "refused requests/s",
        "ours": edits,
        "reference": reference,
        "ratio": edits / reference,
        "refused_without_body_per_s": models,
        "replicas_started_by_floods": most_models + most_edits,
        "replicas_started_by_a_key": woken,
        "first_edit_from_zero_s": first_s,
    }


def main(config: BenchmarkConfig) -> None:
    """Measures and prints the figures."""
    key, digest = new_key()
    with tempfile.TemporaryDirectory() as folder:
        keys_file = Path(folder) / "keys.toml"
        keys_file.write_text(f'[[keys]]\nname = "benchmark"\nsha256 = "{digest}"\n')
        args = ServingArgs(
            bundle=config.bundle,
            device="cpu",
            mllm_min_replicas=0,
            diffusion_min_replicas=0,
            keys_file=str(keys_file),
        )
        with local_service(args, port=free_port(prefer_usual=False)) as address:
            print(json.dumps(asyncio.run(measure(config, address, key))))


if __name__ == "__main__":
    main(tyro.cli(BenchmarkConfig))
