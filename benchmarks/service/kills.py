"""Edits while processes of the service are killed (SIGKILL): ingress, both stages, controller and proxy, in turn.

Clients send seeded edits without retries of their own, and compare each result with that of an undisturbed run. A kill
counts when its process is gone; the next comes when another has taken its place and edits are answered again. The last line
is JSON: edits lost (sent and not answered with 200), by the process that was killed last.
"""

import asyncio
import dataclasses
import hashlib
import json
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import httpx2
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, for what is shared with the tests

from serving.args import ServingArgs
from serving.demo import draw_landscape
from serving.local_cluster import free_port, local_service
from tests.serving.chaos import kill, processes

KINDS = ("ingress", "mllm", "diffusion", "controller", "proxy")
NUM_EDITS = 6  # different ones
NUM_ANSWERS = 3  # with 200, until a kill is over
BACK_S = 180.0
# Ray's defaults leave a dead proxy for half a minute.
PROXY_CHECKS = {"RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1", "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "2"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """What to measure."""

    bundle: str = "tiny"
    "as `mgie.bundle.bundle.open_bundle` takes it"
    kills: int = 10
    "of each kind"
    kinds: tuple[str, ...] = KINDS
    "of process"
    num_clients: int = 3
    "each sends its next edit when the last is answered"
    steps: int = 20
    "denoising steps of each edit"
    side_px: int = 96
    "of the photo"


class Clients:
    """Send edits until they are stopped.

    A connection for each edit: one that a dead proxy leaves behind would fail the next edit, too.
    """

    def __init__(self, config: BenchmarkConfig, address: str) -> None:
        self._config, self._address = config, address
        self._photo = draw_landscape(config.side_px, config.side_px)
        self._expected: dict[int, str] = {}
        self.killed = "nothing"  # last
        self.sent, self.lost, self.answered = Counter[str](), Counter[str](), Counter[str]()
        self.num_wrong = 0
        self.failures: Counter[str] = Counter()
        self.is_stopped = False

    async def edit(self, number: int) -> str:
        """The digest of a result, or what went wrong."""
        seed = number % NUM_EDITS
        data = {"prompt": f"edit {seed}", "seed": str(seed), "steps": str(self._config.steps), "deterministic": "true"}
        try:
            async with httpx2.AsyncClient(timeout=300) as http:
                answer = await http.post(
                    f"{self._address}/v1/images/edits", files={"image": ("photo", self._photo)}, data=data
                )
        except httpx2.HTTPError as error:
            return type(error).__name__
        if answer.status_code != 200:
            return f"{answer.status_code} {answer.text[:60]}"
        return hashlib.sha256(answer.json()["data"][0]["b64_json"].encode()).hexdigest()

    async def learn(self) -> None:
        """What undisturbed edits give; twice the same, or there is nothing to compare with."""
        for number in range(NUM_EDITS):
            first, second = await self.edit(number), await self.edit(number)
            if first != second or len(first) != 64:
                raise SystemExit(f"undisturbed edits differ or fail: {first}, {second}")
            self._expected[number] = first

    async def run(self, client: int) -> None:
        """One client."""
        number = client
        while not self.is_stopped:
            killed_before = self.killed
            self.sent["all"] += 1
            outcome = await self.edit(number)
            if outcome == self._expected[number % NUM_EDITS]:
                self.answered[self.killed] += 1
            elif len(outcome) == 64 and " " not in outcome:
                self.num_wrong += 1
            else:
                self.lost[self.killed] += 1
                self.failures[f"{killed_before} -> {self.killed}: {outcome}"] += 1
                await asyncio.sleep(0.2)  # as a client that tries again would
            number += 1


async def until(is_so: Callable[[], object], seconds: float, what: str) -> None:
    """Waits for a condition.

    Raises:
        SystemExit: It does not come true.
    """
    deadline = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > deadline:
            raise SystemExit(f"not within {seconds:g} s: {what}")
        await asyncio.sleep(0.05)


async def measure(config: BenchmarkConfig, address: str) -> dict[str, object]:
    """Kills while clients edit."""
    clients = Clients(config, address)
    await clients.learn()
    tasks = [asyncio.create_task(clients.run(number)) for number in range(config.num_clients)]
    recoveries_s: dict[str, list[float]] = {kind: [] for kind in config.kinds}
    for turn in range(config.kills):
        for kind in config.kinds:
            all_before = set(processes(kind))
            clients.killed = kind
            before = clients.answered[kind]
            killed_s = time.monotonic()
            await kill(kind)
            await until(lambda: set(processes(kind)) - all_before, BACK_S, f"another {kind}")  # noqa: B023
            await until(lambda: clients.answered[kind] >= before + NUM_ANSWERS, BACK_S, f"edits after {kind}")  # noqa: B023
            recoveries_s[kind].append(time.monotonic() - killed_s)
        print(f"turn {turn + 1}: sent {clients.sent['all']}, lost {dict(clients.lost)}", flush=True)
    clients.is_stopped = True
    await asyncio.gather(*tasks)
    for failure, number in clients.failures.most_common():
        print(f"  {number} x {failure}")
    return {
        "kills": {kind: len(times) for kind, times in recoveries_s.items()},
        "sent": clients.sent["all"],
        "answered": clients.answered.total(),
        "lost": {kind: clients.lost[kind] for kind in config.kinds},
        "wrong": clients.num_wrong,
        "recovery_s": {
            kind: {"median": round(statistics.median(times), 1), "worst": round(max(times), 1)}
            for kind, times in recoveries_s.items()
        },
    }


def main(config: BenchmarkConfig) -> None:
    """Starts the service, kills, and prints the figures."""
    for name, value in PROXY_CHECKS.items():
        os.environ.setdefault(name, value)
    args = ServingArgs(
        bundle=config.bundle,
        device="cpu",
        ingress_replicas=2,
        mllm_max_replicas=1,
        diffusion_max_replicas=1,
        mllm_cache_bytes=0,
        health_check_period_s=1,
    )
    with local_service(args, port=free_port(prefer_usual=False)) as address:
        figures = asyncio.run(measure(config, address))
    lost = figures["lost"]
    assert isinstance(lost, dict)
    print(json.dumps({"name": "serving_kills", "unit": "edits lost", "ours": sum(lost.values()), **figures}))


if __name__ == "__main__":
    main(tyro.cli(BenchmarkConfig))
