"""Health, sleep and roll-outs on a private local cluster."""

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
from ray import serve

from serving.app import app
from serving.args import ServingArgs
from serving.demo import free_port, local_cluster, send_edit
from serving.diffusion_stage import DiffusionStage
from serving.stage import Watch

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]

Photo = Callable[..., bytes]
SLEEPY = ServingArgs(
    bundle="random",
    device="cpu",
    mllm_min_replicas=0,
    diffusion_min_replicas=0,
    mllm_max_replicas=1,
    diffusion_max_replicas=1,
    downscale_delay_s=2,
    look_back_period_s=2,
    metrics_interval_s=0.5,
    max_steps=1000,
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[str, Path]]:
    with local_cluster(port=free_port(prefer_usual=False), num_cpus=4) as cluster:
        yield cluster


class Fragile(DiffusionStage):
    """A stage whose engine can be made to hang."""

    def __init__(self, bundle: str) -> None:
        super().__init__(bundle, device="cpu", watch=Watch(trial_period_s=0.5, trial_timeout_s=2))

    def hang(self) -> int:
        """From the next step on; returns the process id."""
        [one] = self._pool.models().values()
        one.renderer.denoiser = lambda *_: time.sleep(10_000)  # type: ignore[assignment]
        return os.getpid()

    def pid(self) -> int:
        return os.getpid()


def test_a_replica_whose_model_hangs_is_replaced(cluster: tuple[str, Path], random_bundle: Path) -> None:
    stage: Any = serve.deployment(
        name="Fragile",
        health_check_period_s=0.5,
        graceful_shutdown_timeout_s=1,
        ray_actor_options={"num_cpus": 0.1},
    )(Fragile)
    handle: Any = serve.run(stage.bind(str(random_bundle)), name="fragile", route_prefix=None)
    stuck = handle.hang.remote().result()
    assert handle.pid.remote().result() == stuck  # its event loop is well
    deadline = time.monotonic() + 120
    while handle.pid.remote().result() == stuck:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    serve.delete("fragile")


def replicas(address: str) -> dict[str, int]:
    body = httpx2.get(f"{address}/stats", timeout=60).raise_for_status().json()["replicas"]
    return {stage: sum(body[stage].values()) for stage in ("MLLMStage", "DiffusionStage")}


def test_stages_without_work_sleep_and_the_first_edit_wakes_them(cluster: tuple[str, Path], photo: Photo) -> None:
    address, folder = cluster
    serve.run(app(SLEEPY.model_copy(update={"artifacts": str(folder / "results")})), name="mgie")
    assert replicas(address) == {"MLLMStage": 0, "DiffusionStage": 0}
    assert httpx2.get(f"{address}/readyz", timeout=60).status_code == 200
    assert replicas(address) == {"MLLMStage": 0, "DiffusionStage": 0}  # neither question has woken anybody
    assert send_edit(address, photo(), "make it night", seed=1)["mgie"]["seed"] == 1
    assert replicas(address) == {"MLLMStage": 1, "DiffusionStage": 1}
    deadline = time.monotonic() + 120
    while any(replicas(address).values()):
        assert time.monotonic() < deadline
        time.sleep(0.5)


def test_a_roll_out_to_another_bundle_loses_no_edit(
    cluster: tuple[str, Path], photo: Photo, renamed_bundle: Path
) -> None:
    address, folder = cluster
    awake = SLEEPY.model_copy(
        update={"artifacts": str(folder / "results"), "mllm_min_replicas": 1, "diffusion_min_replicas": 1}
    )
    serve.run(app(awake), name="mgie")
    stop = False

    def short(client: int) -> list[str]:
        names = []
        while not stop:
            answer = send_edit(address, photo(), f"make it {client} {len(names)}", seed=1)
            names.append(answer["mgie"]["bundle"])
        return names

    def long() -> str:
        fields = {"prompt": "p", "steps": "400"}
        answer = httpx2.post(f"{address}/v1/images/edits", files={"image": photo()}, data=fields, timeout=300)
        bundle: str = answer.raise_for_status().json()["mgie"]["bundle"]
        return bundle

    with ThreadPoolExecutor(3) as pool:
        edits = [pool.submit(short, client) for client in range(2)]
        running = pool.submit(long)
        try:
            time.sleep(2)
            assert not running.done()
            serve.run(app(awake.model_copy(update={"bundle": str(renamed_bundle)})), name="mgie")
        finally:
            stop = True
        seen = [name for edit in edits for name in edit.result()]
        first = running.result()
    after = send_edit(address, photo(), "p", seed=1)["mgie"]["bundle"]
    assert first in seen
    assert {first, after} >= set(seen)
    assert first != after
