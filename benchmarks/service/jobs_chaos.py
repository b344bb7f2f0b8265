"""Jobs while processes of the service are killed (SIGKILL): ingress, both stages and the controller, in random order.

Clients send seeded jobs with idempotency keys, and send again what was not answered. A kill counts when the process
lived and is gone. In the end every job must be done, once, with the pixels of an undisturbed run in this process,
and its webhook must have come, signed. Exits with an error otherwise. The last line is JSON.
"""

import asyncio
import base64
import dataclasses
import hashlib
import hmac
import json
import os
import random
import secrets
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import httpx2
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, for what is shared with the tests

from serving.args import ServingArgs
from serving.demo import draw_landscape
from serving.edits.backend import EditOutcome
from serving.edits.call import EditCall, edit_options
from serving.edits.in_process import InProcessBackend
from serving.jobs.webhooks import SECRET_VARIABLE
from serving.local_cluster import free_port, local_service
from serving.schema import EditForm
from serving.stages.diffusion import DiffusionStage
from serving.stages.mllm import MLLMStage
from tests.serving.chaos import kill, processes

KINDS = ("ingress", "mllm", "diffusion", "controller")
BACK_S, POLL_S = 180.0, 0.5
ENDED = ("done", "failed", "cancelled")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """What to measure."""

    bundle: str = "tiny"
    "as `mgie.bundle.bundle.open_bundle` takes it"
    jobs: int = 500
    "in all, spread over the kills"
    kills: int = 10
    "of each kind"
    distinct: int = 50
    "different edits among the jobs"
    steps: int = 2
    "denoising steps of each"
    side_px: int = 96
    "of the photo"
    max_running: int = 4
    "jobs that one ingress replica runs at a time"
    lease_s: float = 6.0
    "of a job"
    patience_s: float = 900.0
    "after the last kill, for what is left"
    seed: int = 0
    "of the order of the kills"


class Receiver:
    """Takes webhooks: what each job was told, and how often. Refuses every fifth at first."""

    def __init__(self, secret: bytes) -> None:
        self.told: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self.num_forged = self.num_refused = 0
        receiver, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                content = f"{self.headers['webhook-id']}.{self.headers['webhook-timestamp']}.".encode() + body
                signature = base64.b64encode(hmac.new(secret, content, hashlib.sha256).digest()).decode()
                with lock:
                    is_forged = self.headers["webhook-signature"] != f"v1,{signature}"
                    receiver.num_forged += is_forged
                    is_refused = not is_forged and (len(receiver.told) + receiver.num_refused) % 5 == 4
                    receiver.num_refused += is_refused
                    if not is_forged and not is_refused:
                        job = json.loads(body)
                        receiver.told[job["id"]].append(job)
                self.send_response(503 if is_refused or is_forged else 204)
                self.end_headers()

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self._server.server_port}"
        self.url = f"http://{self.host}/hook"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()


@dataclasses.dataclass
class Sent:
    """A job, and what was seen of it."""

    number: int
    key: str
    id: str = ""
    num_sent: int = 0
    results: list[str] = dataclasses.field(default_factory=list)
    "fingerprints of its result each time that it was read"
    pixels: str = ""
    attempts: int = 0
    started_s: float = 0.0
    ended_s: float = 0.0
    status: str = ""


class Client:
    """Sends jobs and watches them, through whatever happens."""

    def __init__(self, config: BenchmarkConfig, address: str, webhook_url: str) -> None:
        self._config, self._address, self._webhook_url = config, address, webhook_url
        self._photo = draw_landscape(config.side_px, config.side_px)
        self.jobs = [Sent(number, secrets.token_hex(16)) for number in range(config.jobs)]
        self.failures: Counter[str] = Counter()
        self.num_ended = 0

    def fields(self, job: Sent) -> dict[str, str]:
        """Of its form."""
        seed = job.number % self._config.distinct
        return {"prompt": f"edit {seed}", "seed": str(seed), "steps": str(self._config.steps), "deterministic": "true"}

    async def _ask(self, method: str, path: str, **content: Any) -> httpx2.Response | None:
        """None: not now."""
        try:
            async with httpx2.AsyncClient(timeout=60) as http:
                answer = await http.request(method, self._address + path, **content)
        except httpx2.HTTPError as error:
            self.failures[type(error).__name__] += 1
            return None
        if answer.status_code >= 500 or answer.status_code == 429:
            self.failures[str(answer.status_code)] += 1
            return None
        return answer.raise_for_status()

    async def follow(self, job: Sent) -> None:
        """Sends a job until it is accepted, then looks until it has ended."""
        headers = {"prefer": "respond-async", "idempotency-key": job.key}
        data = self.fields(job) | {"webhook_url": self._webhook_url}
        while not job.id:
            job.num_sent += 1
            answer = await self._ask(
                "POST", "/v1/images/edits", files={"image": ("photo", self._photo)}, data=data, headers=headers
            )
            if answer is None:
                await asyncio.sleep(POLL_S)
            else:
                job.id = answer.json()["id"]
        while not await self.look(job):  # noqa: ASYNC110  the service is asked
            await asyncio.sleep(POLL_S)
        self.num_ended += 1

    async def look(self, job: Sent) -> bool:
        """Whether it has ended."""
        answer = await self._ask("GET", f"/v1/edits/{job.id}")
        if answer is None:
            return False
        seen = answer.json()
        job.attempts, job.status = seen["attempts"], seen["status"]
        if job.status not in ENDED:
            return False
        job.started_s, job.ended_s = seen["started_at"], seen["ended_at"]
        if seen["result"] is not None:
            job.pixels = digest(base64.b64decode(seen["result"]["data"][0]["b64_json"]))
            job.results.append(fingerprint(seen))
        return True


def digest(data: bytes) -> str:
    """Of a picture."""
    return hashlib.sha256(data).hexdigest()


def fingerprint(job: dict[str, Any]) -> str:
    """Of one run: its times and replicas tell it from any other of the same job."""
    return json.dumps([job["started_at"], job["ended_at"], job["result"] and job["result"]["mgie"]], sort_keys=True)


async def kill_when_back(kind: str) -> float:
    """Kills one of a kind, once there is one; returns when, Unix time.

    Raises:
        SystemExit: None came back since the last.
    """
    until_s = time.monotonic() + BACK_S
    while not processes(kind):
        if time.monotonic() > until_s:
            raise SystemExit(f"no {kind} came back within {BACK_S:g} s")
        await asyncio.sleep(0.1)
    killed_s = time.time()
    await kill(kind)
    return killed_s


async def measure(config: BenchmarkConfig, client: Client) -> dict[str, list[float]]:
    """Sends and kills; returns the times of the kills by kind."""
    kinds = [kind for kind in KINDS for _ in range(config.kills)]
    random.shuffle(kinds)
    killed_s: dict[str, list[float]] = {kind: [] for kind in KINDS}
    waiting = list(client.jobs)
    tasks: list[asyncio.Task[None]] = []

    def send(number: int) -> None:
        tasks.extend(asyncio.create_task(client.follow(job)) for job in waiting[:number])
        del waiting[:number]

    share = max(1, config.jobs // (len(kinds) + 1))
    for turn, kind in enumerate(kinds):
        send(share)
        await asyncio.sleep(random.uniform(0.2, 2.0))  # some of them are being run, others wait, others are done
        killed_s[kind].append(await kill_when_back(kind))
        # The next when the service works again, or it would be one long outage.
        until_s = time.monotonic() + BACK_S
        while client.num_ended < config.jobs - len(waiting) - share // 2:
            if time.monotonic() > until_s:
                raise SystemExit(f"jobs do not end within {BACK_S:g} s after {kind} was killed")
            await asyncio.sleep(0.1)
        print(f"kill {turn + 1}/{len(kinds)}: {kind}, {client.num_ended} jobs have ended", flush=True)
    send(len(waiting))
    await asyncio.wait(tasks, timeout=config.patience_s)
    for task in tasks:
        if task.done():
            task.result()
        task.cancel()
    return killed_s


async def undisturbed(config: BenchmarkConfig, client: Client, photo: bytes) -> list[str]:
    """Digests of the results, without a service."""
    mllm = MLLMStage(config.bundle, device="cpu", num_threads=1, cache_bytes=0)
    diffusion = DiffusionStage(config.bundle, device="cpu", num_threads=1)
    backend, digests = InProcessBackend(mllm, diffusion), []
    for job in client.jobs[: config.distinct]:
        form = EditForm.model_validate(client.fields(job))
        call = EditCall(image=photo, options=edit_options(form), deadline=time.monotonic() + 600)
        *_, outcome = [event async for event in backend.stream(call, is_watched=False)]
        assert isinstance(outcome, EditOutcome)
        digests.append(digest(outcome.rendered.images[0]))
    mllm.close()
    diffusion.close()
    return digests


async def run(config: BenchmarkConfig, address: str, receiver: Receiver) -> dict[str, Any]:
    """The whole of it; returns the figures."""
    client = Client(config, address, receiver.url)
    killed_s = await measure(config, client)
    until_s = time.monotonic() + config.patience_s
    while {job.id for job in client.jobs} - set(receiver.told) and time.monotonic() < until_s:  # noqa: ASYNC110
        await asyncio.sleep(1)
    for job in client.jobs:  # once more: a second commit would show another run
        while job.id and not await client.look(job):  # noqa: ASYNC110
            await asyncio.sleep(POLL_S)
    expected = await undisturbed(config, client, draw_landscape(config.side_px, config.side_px))
    told_twice = [
        job for job in client.jobs if {fingerprint(told) for told in receiver.told[job.id]} - set(job.results)
    ]
    kills = sorted((at_s, kind) for kind, times in killed_s.items() for at_s in times)
    recoveries_s: dict[str, list[float]] = {kind: [] for kind in KINDS}  # to a second, as jobs tell their times
    for job in client.jobs:
        before = [(at_s, kind) for at_s, kind in kills if at_s <= job.started_s + 1]
        if job.attempts > 1 and before:
            recoveries_s[before[-1][1]].append(job.ended_s + 0.5 - before[-1][0])
    return {
        "jobs": config.jobs,
        "kills": {kind: len(times) for kind, times in killed_s.items()},
        "lost": sum(job.status != "done" for job in client.jobs),
        "accepted_twice": config.jobs - len({job.id for job in client.jobs}),
        "committed_twice": len(
            {job.id for job in client.jobs if len(set(job.results)) > 1} | {job.id for job in told_twice}
        ),
        "wrong_pixels": sum(job.pixels != expected[job.number % config.distinct] for job in client.jobs),
        "webhooks_missed": sum(not receiver.told[job.id] for job in client.jobs),
        "webhooks_forged": receiver.num_forged,
        "webhooks_repeated": sum(len(told) - 1 for told in receiver.told.values() if told),
        "webhooks_refused_at_first": receiver.num_refused,
        "sent_again": sum(job.num_sent - 1 for job in client.jobs),
        "requests_failed": dict(client.failures),
        "interrupted": sum(job.attempts > 1 for job in client.jobs),
        "most_attempts": max(job.attempts for job in client.jobs),
        "recovery_s": {
            kind: {"median": round(statistics.median(times), 1), "worst": round(max(times), 1)}
            for kind, times in (recoveries_s | {"all": [s for times in recoveries_s.values() for s in times]}).items()
            if times
        },
    }


def main(config: BenchmarkConfig) -> None:
    """Starts the service, and prints the figures.

    Raises:
        SystemExit: Something was lost, wrong or done twice.
    """
    random.seed(config.seed)
    secret = secrets.token_bytes(32)
    with tempfile.TemporaryDirectory() as folder, Receiver(secret) as receiver:
        file = Path(folder, "secret")
        file.write_text(f"whsec_{base64.b64encode(secret).decode()}")
        os.environ.pop(SECRET_VARIABLE, None)
        args = ServingArgs(
            bundle=config.bundle,
            device="cpu",
            ingress_replicas=2,
            mllm_max_replicas=1,
            diffusion_max_replicas=1,
            health_check_period_s=1,
            max_running_jobs=config.max_running,
            job_lease_s=config.lease_s,
            webhook_hosts=(receiver.host,),
            webhook_secret_file=str(file),
        )
        with local_service(args, port=free_port(prefer_usual=False)) as address:
            figures = asyncio.run(run(config, address, receiver))
    faults = ("lost", "accepted_twice", "committed_twice", "wrong_pixels", "webhooks_missed", "webhooks_forged")
    num_faults = sum(figures[name] for name in faults)
    line = {
        "name": "serving_jobs_chaos",
        "unit": "jobs lost, wrong or twice",
        "ours": num_faults,
        "reference": 0,
        "ratio": None,
    }
    print(json.dumps(line | figures))
    if num_faults:
        raise SystemExit(1)


if __name__ == "__main__":
    main(tyro.cli(BenchmarkConfig))
