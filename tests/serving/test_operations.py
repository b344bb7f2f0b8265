"""Health, sleep and roll-outs on the private cluster of the tests."""

import asyncio
import itertools
import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2
import numpy as np
import pytest
from ray import serve
from ray.serve.config import AutoscalingPolicy

from serving.app import _autoscaling
from serving.stages.autoscaling import WorkPolicy
from serving.stages.diffusion import DiffusionStage
from serving.stages.health import Monitoring
from serving.stages.mllm import MLLMStage
from tests.ray_cluster import HEADERS
from tests.serving.asking import ask
from tests.serving.sending import GUARD_S, Edited, edit
from tests.waiting import until

if TYPE_CHECKING:
    from tests.ray_cluster import ServiceHost

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(GUARD_S)]

Photo = Callable[..., bytes]
AFRESH = {"deterministic": True}  # derived again, not taken from the cache


class Fragile(DiffusionStage):
    """A stage whose engine can be made to hang."""

    def __init__(self, bundle: str) -> None:
        super().__init__(bundle, device="cpu", monitoring=Monitoring(probe_period_s=0.5, probe_timeout_s=2))

    def hang(self) -> int:
        """From the next step on; returns the process id."""
        [one] = self._pool.models().values()
        one.renderer.denoiser = lambda *_: time.sleep(10_000)  # type: ignore[assignment]
        return os.getpid()

    def pid(self) -> int:
        return os.getpid()


def test_a_stage_wakes_for_work_is_replaced_when_its_model_hangs_and_sleeps_without_work(
    service_host: "ServiceHost", mllm: MLLMStage, random_bundle: Path, photo: Photo
) -> None:
    policy = AutoscalingPolicy(policy_function=WorkPolicy, policy_kwargs={"clear_s": 20, "cold_start_s": 20})
    args = service_host.usual.model_copy(update={"downscale_delay_s": 2})
    stage: Any = serve.deployment(
        name="Fragile",
        health_check_period_s=0.5,
        graceful_shutdown_timeout_s=1,
        ray_actor_options={"num_cpus": 0.1},
        autoscaling_config=_autoscaling(args, min_replicas=0, max_replicas=1, policy=policy),
    )(Fragile)
    handle: Any = serve.run(stage.bind(str(random_bundle)), name="fragile", route_prefix=None)

    def num_replicas() -> int:
        return sum(serve.status().applications["fragile"].deployments["Fragile"].replica_states.values())

    assert num_replicas() == 0
    derived = asyncio.run(mllm.derive(photo(), ask("p")))

    def edit() -> Any:
        return handle.render.remote(photo(), derived, ask(overrides={"steps": 2})).result()

    assert edit().images
    stuck = handle.hang.remote().result()
    assert handle.pid.remote().result() == stuck  # its event loop is well
    until(lambda: handle.pid.remote().result() != stuck, poll_s=0.2)  # who asks keeps one awake
    assert edit().images
    until(lambda: not num_replicas(), poll_s=0.5)
    serve.delete("fragile")


def test_a_roll_out_loses_no_edit(service_host: "ServiceHost", photo: Photo, renamed_bundle: Path) -> None:
    address = service_host.serve_awake()
    is_over = threading.Event()
    seen: list[str] = []

    def send() -> None:
        while not is_over.wait(0.5):
            seen.append(edit(address, photo(), f"make it {len(seen)}", seed=1, steps=2).details["bundle"])

    with ThreadPoolExecutor(1) as pool:
        client = pool.submit(send)
        try:
            until(lambda: seen or client.done())
            service_host.roll_out(service_host.usual.model_copy(update={"bundle": str(renamed_bundle)}))
        finally:
            is_over.set()
        client.result()
    after = edit(address, photo(), "p", seed=1, steps=1).details["bundle"]
    assert after != seen[0]
    assert set(seen) <= {seen[0], after}


@pytest.mark.endure
def test_a_roll_out_loses_no_edit_and_two_bundles_are_served_each_by_the_replicas_that_have_it(
    service_host: "ServiceHost", photo: Photo, random_bundle: Path, renamed_bundle: Path
) -> None:
    address = service_host.serve(service_host.usual)
    of_two = service_host.usual.model_copy(
        update={"bundle": str(renamed_bundle), "bundles": (str(random_bundle),), "max_loaded": 1, "ingress_replicas": 1}
        | {f"{stage}_{bound}_replicas": 2 for stage in ("mllm", "diffusion") for bound in ("min", "max")}
    )
    is_over, has_stepped = threading.Event(), threading.Event()
    seen: list[list[str]] = [[], []]

    def short(client: int) -> None:
        while not is_over.wait(0.5):
            answer = edit(address, photo(), f"make it {client} {len(seen[client])}", seed=1, steps=2)
            seen[client].append(answer.details["bundle"])

    def long() -> str:
        fields = {"prompt": "p", "steps": "400", "stream": "true"}
        with httpx2.stream(
            "POST",
            f"{address}/v1/images/edits",
            files={"image": photo()},
            data=fields,
            headers=HEADERS,
            timeout=GUARD_S,
        ) as response:
            lines = []
            for line in response.iter_lines():
                lines.append(line)
                if line.startswith(": step"):
                    has_stepped.set()
        (answer,) = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
        assert "mgie" in answer, answer
        bundle: str = answer["mgie"]["bundle"]
        return bundle

    with ThreadPoolExecutor(3) as pool:
        clients = [pool.submit(short, client) for client in range(2)]
        running = pool.submit(long)
        try:
            until(lambda: all(seen) or any(client.done() for client in clients))
            assert has_stepped.wait(GUARD_S)
            assert not running.done()
            service_host.roll_out(of_two)
        finally:
            is_over.set()
        for client in clients:
            client.result()
        first = running.result()
    after = edit(address, photo(), "p", seed=1, steps=1).details["bundle"]
    assert first in seen[0] + seen[1]
    assert {first, after} >= set(seen[0] + seen[1])
    assert first != after

    models = httpx2.get(f"{address}/v1/models", headers=HEADERS, timeout=GUARD_S).json()["data"]
    names = [model["id"] for model in models]
    assert names == ["renamed", "random"]

    def send(number: int) -> Edited:
        return edit(address, photo(seed=number), "p", model=names[number % 2], seed=1, steps=2)

    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(send, range(12)))
    for number, edited in enumerate(together):
        assert edited.details["model"] == names[number % 2]
        assert edited.details["bundle"] == models[number % 2]["mgie"]["bundle"]

    def places(edited: Sequence[Edited], stage: str) -> set[str]:
        return {one.details[stage]["replica"] for one in edited}

    # As soon as the router has heard of it, each bundle is served by a replica of its own, and it stays so.
    alone: deque[Edited] = deque(maxlen=12)
    for number in itertools.count():
        alone.append(edit(address, photo(seed=number % 12), "p", model=names[number % 2], seed=1, steps=2, **AFRESH))
        if number % 12 == 11:
            owners = [[places(list(alone)[i::2], stage) for i in (0, 1)] for stage in ("mllm", "diffusion")]
            if all(len(one) == len(other) == 1 and one != other for one, other in owners):
                break
    for one, other in zip(together, alone, strict=True):
        assert np.abs(one.pixels - other.pixels).max() <= 2
