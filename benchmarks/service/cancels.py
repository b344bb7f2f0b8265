"""Edits called off at random moments: by hanging up, by `DELETE` and by deadlines, half of them with hostile headers.

Headers are hostile that switch off Ray Serve's own watch over clients and deadlines. The service tells how many
steps an edit took part in after its end, and what it still holds when all are gone. The last line is JSON: most steps
after the end of an edit.
"""

import asyncio
import base64
import contextlib
import dataclasses
import json
import random
import time
import uuid
from collections import Counter
from typing import Any

import httpx2
import tyro

from serving.args import ServingArgs
from serving.demo import draw_landscape
from serving.local_cluster import free_port, local_service

HOSTILE = {"x-request-disconnect-disabled": "?1", "x-request-timeout-seconds": "0"}
KINDS = ("disconnect", "delete", "deadline")
SETTLE_S = 20.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """What to measure."""

    bundle: str = "tiny"
    "as `mgie.bundle.bundle.open_bundle` takes it"
    cancels: int = 200
    "edits called off, a third each way"
    num_clients: int = 8
    "at a time"
    steps: int = 1000
    "denoising steps of each: none ends by itself"
    longest_s: float = 3.0
    "of the random times after which they are called off"
    num_after: int = 8
    "edits after all that, compared with those before"
    seed: int = 0
    "of the random times"


class Client:
    """Edits over HTTP, most of them called off."""

    def __init__(self, config: BenchmarkConfig, http: httpx2.AsyncClient) -> None:
        self._config, self._http = config, http
        self._photo = draw_landscape(160, 112)
        self.outcomes: Counter[str] = Counter()

    async def edit(self, number: int, **fields: str) -> httpx2.Response:
        """One edit."""
        headers = fields.pop("headers", {})
        return await self._http.post(
            "/v1/images/edits",
            headers=headers,
            files={"image": ("photo", self._photo)},
            data={"prompt": f"edit {number}", "seed": "1", "deterministic": "true"} | fields,
        )

    async def results(self) -> list[bytes]:
        """Edits that are let be."""
        answers = [await self.edit(i, steps="5") for i in range(self._config.num_after)]
        return [base64.b64decode(answer.raise_for_status().json()["data"][0]["b64_json"]) for answer in answers]

    async def call_off(self, number: int, kind: str, after_s: float, *, is_hostile: bool) -> None:
        """An edit that is called off, and what its client and whoever called it off were told."""
        edit_id = str(uuid.uuid4())
        sent: dict[str, Any] = {"steps": str(self._config.steps)}
        sent["headers"] = {"x-request-id": edit_id} | (HOSTILE if is_hostile else {})
        if kind == "deadline":
            answer = await self.edit(number, timeout_s=str(after_s), **sent)
            self.outcomes[f"deadline: {answer.status_code}"] += 1
            return
        task = asyncio.create_task(self.edit(number, **sent))
        await asyncio.sleep(after_s)
        if kind == "disconnect":
            task.cancel()  # closes the connection
            with contextlib.suppress(asyncio.CancelledError):
                await task
            self.outcomes["disconnect"] += 1
        else:
            deleted = await self._http.delete(f"/v1/images/edits/{edit_id}")
            if deleted.status_code == 404:  # too early: it has not been read yet
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                answer = await task
                self.outcomes[f"delete: {deleted.status_code}, its client {answer.status_code}"] += 1
                return
            self.outcomes["delete: 404, before it was accepted"] += 1


def held(stats: dict[str, Any]) -> int:
    """Slots in use."""
    mllm, diffusion = stats["mllm"]["work"], stats["diffusion"]["work"]
    names = ("num_in_flight", "num_waiting", "num_denoising")
    return int(mllm["num_running"] + mllm["num_waiting"] + sum(diffusion[name] for name in names))


async def measure(config: BenchmarkConfig, address: str) -> dict[str, object]:
    """Edits before, those called off, edits after."""
    chance = random.Random(config.seed)
    async with httpx2.AsyncClient(base_url=address, timeout=120) as http:

        async def stats() -> dict[str, Any]:
            body: dict[str, Any] = (await http.get("/stats")).raise_for_status().json()
            return body

        client = Client(config, http)
        before = await client.results()
        plans = iter(
            [(i, KINDS[i % 3], chance.uniform(0.0, config.longest_s), i // 3 % 2 == 0) for i in range(config.cancels)]
        )

        async def worker() -> None:
            for number, kind, after_s, is_hostile in plans:
                await client.call_off(1000 + number, kind, after_s, is_hostile=is_hostile)

        await asyncio.gather(*(worker() for _ in range(config.num_clients)))
        ends_s = time.monotonic() + SETTLE_S
        while held(figures := await stats()) and time.monotonic() < ends_s:  # noqa: ASYNC110  it is elsewhere
            await asyncio.sleep(0.1)
        after = await client.results()
    num_unharmed = sum(one == other for one, other in zip(before, after, strict=True))
    most = figures["diffusion"]["work"]["max_steps_after_end"]
    for outcome, number in sorted(client.outcomes.items()):
        print(f"{number:4} {outcome}")
    work = figures["mllm"]["work"]
    print(f"MLLM: {work['num_dropped']} left the line, {work['num_cancelled']} a running batch")
    print(f"steps after the end of an edit: at most {most}; slots leaked: {held(figures)}")
    print(f"{num_unharmed} of {config.num_after} later edits equal those before")
    return {
        "name": "serving_cancels",
        "unit": "steps",
        "ours": most,
        "reference": config.steps,
        "ratio": None,
        "slots_leaked": held(figures),
        "unharmed": f"{num_unharmed}/{config.num_after}",
        "outcomes": client.outcomes,
    }


def main(config: BenchmarkConfig) -> None:
    """Measures and prints the figures."""
    args = ServingArgs(
        bundle=config.bundle, device="cpu", mllm_max_replicas=1, diffusion_max_replicas=1, max_steps=config.steps
    )
    with local_service(args, port=free_port(prefer_usual=False)) as address:
        print(json.dumps(asyncio.run(measure(config, address))))


if __name__ == "__main__":
    main(tyro.cli(BenchmarkConfig))
