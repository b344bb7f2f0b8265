"""Roll-outs under load: the application is deployed again, with another bundle and other settings, while edits run.

Some clients send short edits one after another, others edits that take longer than the 20 s after which Ray Serve by default
kills a replica that is to stop. The last line is JSON: edits lost (sent and not answered with 200).
"""

import asyncio
import dataclasses
import json
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path

import httpx2
import tyro
from ray import serve

from mgie.bundle.bundle import open_bundle
from serving.app import app
from serving.args import ServingArgs
from serving.demo import draw_landscape
from serving.local_cluster import free_port, local_service

LONG_S = 20.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """What to measure."""

    bundle: str = "tiny"
    "name of an embedded bundle"
    roll_outs: int = 3
    "each to the other of two bundles, which differ in name and identity"
    num_short: int = 2
    "clients with short edits"
    num_long: int = 2
    "clients with long ones"
    short_steps: int = 5
    "denoising steps of short edits"
    long_steps: int = 1000
    "of long ones; enough to take longer than 20 s"
    pause_s: float = 10.0
    "between a roll-out and the next"


class Clients:
    """Send edits until they are stopped."""

    def __init__(self, address: str) -> None:
        self._address, self._photo = address, draw_landscape(96, 64)
        self.outcomes: Counter[str] = Counter()
        self.by_bundle: Counter[str] = Counter()
        self.long_s: list[float] = []
        self.is_stopped = False

    async def run(self, client: int, steps: int) -> None:
        """One client."""
        number = 0
        async with httpx2.AsyncClient(timeout=400) as http:
            while not self.is_stopped:
                number += 1
                started_s = time.monotonic()
                answer = await http.post(
                    f"{self._address}/v1/images/edits",
                    files={"image": ("photo", self._photo)},
                    data={"prompt": f"{client} {number}", "steps": str(steps)},
                )
                if answer.status_code == 200:
                    self.outcomes["200"] += 1
                    self.by_bundle[answer.json()["mgie"]["bundle"]] += 1
                    self.long_s += [taken_s] if (taken_s := time.monotonic() - started_s) > LONG_S else []
                else:
                    self.outcomes[f"{answer.status_code} {answer.text[:120]}"] += 1


def other_bundle(name: str, folder: Path) -> Path:
    """The same weights under another name: another identity, which edits may not mix with the first."""
    source = open_bundle(name).root
    copy = folder / "other"
    shutil.copytree(source, copy)
    config = json.loads((copy / "bundle.json").read_text())
    (copy / "bundle.json").write_text(json.dumps(config | {"name": "other"}))
    return copy


async def measure(config: BenchmarkConfig, address: str, versions: list[ServingArgs]) -> Clients:
    """Deploys again and again while clients edit."""
    clients = Clients(address)
    tasks = [
        asyncio.create_task(clients.run(number, config.short_steps if number < config.num_short else config.long_steps))
        for number in range(config.num_short + config.num_long)
    ]
    for roll_out in range(config.roll_outs):
        await asyncio.sleep(config.pause_s)
        started_s = time.monotonic()
        await asyncio.to_thread(serve.run, app(versions[(roll_out + 1) % 2]), name="mgie")
        print(
            f"roll-out {roll_out + 1} took {time.monotonic() - started_s:.1f} s; so far {dict(clients.outcomes)}",
            flush=True,
        )
    await asyncio.sleep(config.pause_s)
    clients.is_stopped = True
    await asyncio.gather(*tasks)
    return clients


def main(config: BenchmarkConfig) -> None:
    """Starts the service, rolls out, and prints the figures."""
    with tempfile.TemporaryDirectory() as folder:
        first = ServingArgs(bundle=config.bundle, device="cpu", max_steps=config.long_steps, artifacts=folder)
        second = first.model_copy(
            update={"bundle": str(other_bundle(config.bundle, Path(folder))), "mllm_max_batch_size": 4}
        )
        with local_service(first, port=free_port(prefer_usual=False), num_cpus=4) as address:
            clients = asyncio.run(measure(config, address, [first, second]))
    sent, answered = clients.outcomes.total(), clients.outcomes["200"]
    if len(clients.by_bundle) < 2 or not clients.long_s:
        raise SystemExit(f"nothing was shown: bundles {dict(clients.by_bundle)}, {len(clients.long_s)} long edits")
    print(
        json.dumps(
            {
                "name": "serving_rolling",
                "unit": "edits lost",
                "ours": sent - answered,
                "sent": sent,
                "roll_outs": config.roll_outs,
                "longer_than_20_s": len(clients.long_s),
                "longest_s": round(max(clients.long_s), 1),
                "by_bundle": dict(clients.by_bundle),
                "failures": {outcome: count for outcome, count in clients.outcomes.items() if outcome != "200"},
            }
        )
    )


if __name__ == "__main__":
    main(tyro.cli(BenchmarkConfig))
