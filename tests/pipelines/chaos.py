"""What the tests and the benchmark of killed jobs share: a private cluster, drawn rows, an endpoint that counts.

Every wait is for a condition. The times are guards against a job that hangs, far beyond what a slow machine takes.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any, Self

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from mgie.data.ledger import MANIFEST_SCHEMA, count_ledger, read_ledger, row_id, to_table, write_images_root
from mgie.storage.folder import Folder, open_folder

ROOT = Path(__file__).resolve().parents[2]
JOB = ROOT / "pipelines" / "summarize.py"
_WORDS = [
    "make",
    "it",
    "night",
    "winter",
    "red",
    "balloon",
    "add",
    "remove",
    "car",
    "brighter",
    "darker",
    "warm",
    "cold",
    "sky",
    "house",
]
_NUM_IMAGES = 16
GUARD_S = 900.0


# ---- rows


def write_manifest(folder: Folder, num_rows: int, *, seed: int = 0, side_px: int = 64, has_bad: bool = True) -> int:
    """Draws a manifest; some images are missing, some damaged. Returns the number of rows that can be described."""
    rng = random.Random(seed)
    for i in range(_NUM_IMAGES):
        buffer = BytesIO()
        color = tuple(rng.randrange(256) for _ in range(3))
        Image.new("RGB", (side_px + i % 3 * 8, side_px), color).save(buffer, "PNG")
        folder.write(f"images/{i}.png", buffer.getvalue())
    folder.write("images/broken.png", b"no image")
    rows, num_good = [], 0
    for i in range(num_rows):
        source = f"images/{i % _NUM_IMAGES}.png"
        if has_bad and i % 17 == 5:
            source = "images/missing.png"
        elif has_bad and i % 19 == 3:
            source = "images/broken.png"
        else:
            num_good += 1
        instruction = f"{' '.join(rng.choices(_WORDS, k=rng.randrange(2, 7)))} {i}"
        rows.append(
            {
                "id": row_id(str(i).encode(), b"goal", instruction, "forward"),
                "dataset": "drawn",
                "split": "train",
                "source": source,
                "goal": f"images/{(i + 1) % _NUM_IMAGES}.png",
                "instruction": instruction,
                "provenance": "{}",
            }
        )
    table, half = to_table(rows, MANIFEST_SCHEMA), num_rows // 2
    for number, part in enumerate((table.slice(0, half), table.slice(half))):
        with folder.publish(f"part-{number}.parquet") as path:
            pq.write_table(part, path)
    write_images_root(folder, ".")
    return num_good


def ledger_rows(out: Folder) -> dict[int, dict[str, Any]]:
    """Rows by id, as the reader gives them."""
    columns = ["id", "status", "reason", "attempt", "verbose", "expressive", "instruction"]
    batches = read_ledger(out, status=None, columns=columns)
    rows = pa.Table.from_batches(batches).to_pylist()
    by_id = {row["id"]: row for row in rows}
    assert len(by_id) == len(rows), "the reader repeats ids"
    return by_id


def num_described(out: Folder) -> int:
    """Rows in the ledger's files that a model has described."""
    if not count_ledger(out).num_rows:
        return 0
    return sum(row["verbose"] is not None for row in ledger_rows(out).values())


# ---- who describes


def answer(instruction: str) -> str:
    """What the endpoint says: follows from the instruction."""
    digest = hashlib.sha256(instruction.encode()).digest()
    words = [_WORDS[byte % len(_WORDS)] for byte in digest[:8]]
    return f"The image will show {' '.join(words)}. It will be {words[0]}."


@dataclass
class Endpoint:
    """An OpenAI-compatible endpoint on loopback that takes `service_s` per question, and counts them."""

    service_s: float
    asked: list[str] = field(default_factory=list)
    most: int | None = None
    "questions that it answers; whoever asks more waits until `answer_to` allows it"
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def __enter__(self) -> Self:
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                question = body["messages"][0]["content"][1]["text"]
                with endpoint._changed:
                    endpoint.asked.append(question)
                    number = len(endpoint.asked)
                    endpoint._changed.wait_for(lambda: endpoint.most is None or number <= endpoint.most)
                time.sleep(endpoint.service_s)
                message = {"content": answer(question)}
                usage = {"prompt_tokens": len(question), "completion_tokens": 20}
                data = json.dumps({"choices": [{"message": message}], "usage": usage}).encode()
                self.send_response_only(200)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: Any) -> None:
                """Says nothing."""

        class Server(ThreadingHTTPServer):
            def handle_error(self, *args: Any) -> None:
                """A caller that was killed has hung up: that is what we are here for."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.answer_to(None)
        self._server.shutdown()
        self._server.server_close()

    def answer_to(self, most: int | None) -> None:
        """Answers so many questions and no more; None = all."""
        with self._changed:
            self.most = most
            self._changed.notify_all()


# ---- the cluster and the job

# How the titles of a job's processes begin that do something.
_WORKING = ("ray::Map", "ray::RayTrainWorker", "ray::TrainController")


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster of this process alone."""

    env: dict[str, str]
    folder: Path

    def workers(self, title: str) -> list[int]:
        """Ids of this cluster's worker processes whose title begins so."""
        found = []
        for raylet in psutil.process_iter(["name", "cmdline"]):
            if raylet.info["name"] != "raylet" or not any(str(self.folder) in arg for arg in raylet.info["cmdline"]):
                continue
            for child in raylet.children(recursive=True):
                try:
                    if child.cmdline()[:1] and child.cmdline()[0].startswith(title):
                        found.append(child.pid)
                except psutil.Error:  # it has ended meanwhile
                    continue
        return found

    def settle(self) -> None:
        """Waits until nothing of a killed job works any more."""
        wait_for(lambda: not any(map(self.workers, _WORKING)), "the end of a killed job's workers")


# Ray's own patience with its processes, which on a slow machine take longer to start and to answer.
PATIENCE = {
    "RAY_agent_register_timeout_ms": "900000",
    "RAY_worker_register_timeout_seconds": "900",
    "RAY_health_check_failure_threshold": "100",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "900",
}
_STARTED = "Ray runtime started"
_STARTS = 20


@contextmanager
def private_cluster(num_cpus: int, *, dashboard_port: int | None = None) -> Iterator[Cluster]:
    """A cluster of one node on this machine; stopped at the end, and nothing else is.

    Args:
        dashboard_port: Of a dashboard, which takes jobs that bring their own code: its workers find none here.
    """
    env = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        **PATIENCE,
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    dashboard = "--include-dashboard false"
    if dashboard_port is not None:
        dashboard = f"--include-dashboard true --dashboard-host 127.0.0.1 --dashboard-port {dashboard_port}"
        del env["PYTHONPATH"]
    said = ""
    for _ in range(_STARTS):  # Ray itself gives up what takes more than half a minute
        with _starting(f"--num-cpus {num_cpus} {dashboard}", env) as (process, cluster, log):
            wait_for(partial(_has_started_or_ended, process, log), "the cluster's start")
            said = log.read_text()
            if process.poll() is None:
                yield cluster
                return
    raise RuntimeError(f"the cluster did not start:\n{said}")


def _has_started_or_ended(process: "subprocess.Popen[bytes]", log: Path) -> bool:
    return _STARTED in log.read_text() or process.poll() is not None


@contextmanager
def _starting(flags: str, env: dict[str, str]) -> Iterator[tuple["subprocess.Popen[bytes]", Cluster, Path]]:
    """The process that starts and holds a cluster, and the file to which it talks."""
    folder = Path(tempfile.mkdtemp(prefix="mgie-ray-"))  # short: paths of sockets are limited to about 100 bytes
    with socket.socket() as free, socket.socket() as another:
        free.bind(("127.0.0.1", 0))
        another.bind(("127.0.0.1", 0))
        port, agent_port = free.getsockname()[1], another.getsockname()[1]
    command = (
        f"start --head --block --node-ip-address 127.0.0.1 --port {port} --temp-dir {folder} {flags} "
        f"--dashboard-agent-listen-port {agent_port} "
        "--object-store-memory 300000000 --min-worker-port 0 --max-worker-port 0"
    )
    log = folder / "start.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", "ray.scripts.scripts", *command.split()],
            env=env,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process, Cluster({**env, "RAY_ADDRESS": f"127.0.0.1:{port}"}, folder), log
    finally:
        for member in _family(process, folder):
            try:
                member.kill()
            except psutil.NoSuchProcess:
                continue
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _family(process: "subprocess.Popen[bytes]", folder: Path) -> list[psutil.Process]:
    """The process and all below it; if it has ended, what is left of its cluster."""
    if process.poll() is None:
        parent = psutil.Process(process.pid)
        return [*parent.children(recursive=True), parent]
    left = psutil.process_iter(["cmdline"])
    return [one for one in left if any(str(folder) in part for part in one.info["cmdline"] or [])]


def wait_for(is_so: Callable[[], bool], what: str) -> None:
    """Returns when it is so."""
    deadline = time.monotonic() + GUARD_S
    while not is_so():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {GUARD_S:.0f} s for {what}")
        time.sleep(0.1)


class Job:
    """The command, started in the background; what it prints goes to a file. A context manager that leaves none behind."""

    def __init__(self, flags: list[str], env: dict[str, str], *, cwd: Path, script: Path = JOB) -> None:
        with tempfile.NamedTemporaryFile(prefix="mgie-job-", suffix=".log", delete=False) as log:
            self._log = Path(log.name)
            self.process = subprocess.Popen(
                [sys.executable, str(script), *flags], env=env, cwd=cwd, stdout=log, stderr=subprocess.STDOUT
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.is_running():
            self.kill()
        self._log.unlink(missing_ok=True)

    def is_running(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        """SIGKILL, which must hit a running job."""
        assert self.is_running(), f"the job had ended before it was killed:\n{self.output()}"
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def output(self) -> str:
        return self._log.read_text()

    def finish(self, timeout_s: float = GUARD_S) -> tuple[int, str]:
        """Exit status and output."""
        return self.process.wait(timeout_s), self.output()

    def wait_until(self, is_so: Callable[[], bool], what: str) -> None:
        """Waits for something that the running job brings about."""

        def is_it() -> bool:
            if not self.is_running() and not is_so():
                raise AssertionError(f"the job ended before {what}:\n{self.output()}")
            return is_so()

        wait_for(is_it, what)


# ---- killing


@dataclass
class Chaos:
    """What a series of kills did."""

    lost_per_driver_kill: list[int] = field(default_factory=list)
    killed: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    num_asked: int = 0


def run_with_kills(
    flags: list[str],
    cluster: Cluster,
    out: Folder,
    *,
    num_good: int,
    driver_kills: int,
    worker_titles: list[str],
    seed: int,
    cwd: Path,
    endpoint: Endpoint | None,
) -> Chaos:
    """Runs the command to its end, killing its driver at random points, then in its last run workers and actors.

    Points are numbers of questions asked (without an endpoint: of rows written). The endpoint answers no more than
    that many until the kill has come, so a kill hits a job at work however slow the machine is.
    """
    chaos, rng = Chaos(), random.Random(seed)
    num_lost = 0
    before = len(endpoint.asked) if endpoint else 0  # by other jobs, which shared the endpoint

    def progress() -> int:
        return len(endpoint.asked) if endpoint else num_described(out)

    def stop_at(point: int | None) -> None:
        if endpoint:
            endpoint.answer_to(point)

    for kill in range(driver_kills):
        with Job(flags, cluster.env, cwd=cwd) as job:
            # Somewhere in the kill's share of the first two thirds of what is to do.
            share = (num_good * 2 / 3 - num_described(out)) / (driver_kills - kill)
            point = progress() + max(1, round(share * rng.uniform(0.6, 1.3)))
            stop_at(point)
            job.wait_until(lambda point=point: progress() >= point, f"row {point}")
            job.kill()
            cluster.settle()
            stop_at(None)
            if endpoint:
                asked = len(endpoint.asked) - before
                chaos.lost_per_driver_kill.append(asked - num_described(out) - num_lost)
                num_lost = asked - num_described(out)
            assert num_described(out) < num_good, "the kill came when all was done"
            chaos.killed.append(f"driver at row {point}")
            chaos.outputs.append(job.output())
    with Job(flags, cluster.env, cwd=cwd) as job:
        left = num_good - num_described(out)
        for title in worker_titles:
            point = progress() + left // (len(worker_titles) + 2)
            stop_at(point)
            job.wait_until(lambda point=point: progress() >= point, f"row {point}")
            job.wait_until(lambda title=title: bool(cluster.workers(title)), f"a process {title}")
            assert job.is_running()
            os.kill(rng.choice(cluster.workers(title)), signal.SIGKILL)
            assert num_described(out) < num_good, "the kill came when all was done"
            stop_at(None)
            chaos.killed.append(title)
        status, output = job.finish()
        chaos.outputs.append(output)
        assert status == 0, output
    if endpoint:
        chaos.num_asked = len(endpoint.asked) - before
    return chaos


def drawn(folder: Path, num_rows: int) -> tuple[Folder, int]:
    """A manifest on the local disk, and the number of its rows that can be described."""
    manifest = open_folder(folder)
    return manifest, write_manifest(manifest, num_rows)
