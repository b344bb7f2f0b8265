"""Keys and logs of the service on a private local cluster whose stages are scaled to zero.

The tests run in the order of this file.
"""

import hashlib
import io
import json
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
import ray
from PIL import Image
from ray import serve

from serving.app import app
from serving.args import ServingArgs
from serving.demo import free_port, local_cluster

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]

Photo = Callable[..., bytes]
URL = "/v1/images/edits"
KEY, PROMPT, FILE = "mgie-canarykey-0123456789", "canaryprompt of a private kind", "canaryfile.png"
NUM_ANONYMOUS = 1000
# An operator's function that fails as careless code does: with the words in its exceptions.
ROUGH_CHECK = """
def check(picture, instruction, *, where):
    if "quote" in instruction:
        raise ValueError(f"cannot judge {instruction!r}")
"""


@dataclass(frozen=True)
class Service:
    address: str
    folder: Path
    "of the cluster"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    ours = tmp_path_factory.mktemp("access")
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    (ours / "keys.toml").write_text(f'[[keys]]\nname = "alice"\nsha256 = "{digest}"\nrequests_per_minute = 1000\n')
    (ours / "rough_check.py").write_text(ROUGH_CHECK)
    port = free_port(prefer_usual=False)
    with pytest.MonkeyPatch.context() as patch:
        # For the builder, which runs here, and for Ray's workers.
        patch.syspath_prepend(ours)
        patch.setenv("PYTHONPATH", str(ours), prepend=os.pathsep)
        with local_cluster(port=port, num_cpus=2) as (address, folder):
            args = ServingArgs(
                bundle="random",
                device="cpu",
                mllm_min_replicas=0,
                mllm_max_replicas=1,
                diffusion_min_replicas=0,
                diffusion_max_replicas=1,
                keys_file=str(ours / "keys.toml"),
                artifacts=str(folder / "results"),
                keep_results=True,
                safety_check="rough_check:check",
            )
            serve.run(app(args), name="mgie")
            yield Service(address, folder)


def num_replicas() -> Counter[str]:
    deployments = serve.status().applications["mgie"].deployments
    return Counter({name: sum(deployments[name].replica_states.values()) for name in ("MLLMStage", "DiffusionStage")})


def test_an_anonymous_flood_wakes_no_stage_and_a_key_does(service: Service, photo: Photo) -> None:
    is_over = threading.Event()
    most = num_replicas()
    assert most.total() == 0

    def look() -> None:
        nonlocal most
        while not is_over.wait(0.2):
            most |= num_replicas()

    paths = (URL, "/readyz", "/stats", "/v1/models", "/v1/edits/x", "/docs", "/openapi.json", "/metrics", "/nope")

    def send(number: int) -> int:
        path = paths[number % len(paths)]
        headers = [{}, {"authorization": "Bearer wrong"}, {"prefer": "respond-async"}][number % 3]
        if path == URL:
            body = {"files": {"image": ("photo", photo())}, "data": {"prompt": "p"}}
            return client.post(path, headers=headers, **body).status_code
        return client.get(path, headers=headers).status_code

    watcher = threading.Thread(target=look)
    watcher.start()
    with httpx2.Client(base_url=service.address, timeout=60) as client, ThreadPoolExecutor(8) as pool:
        statuses = Counter(pool.map(send, range(NUM_ANONYMOUS)))
        assert statuses == {401: NUM_ANONYMOUS}
        is_over.wait(5)  # the autoscaler looks every few seconds
        assert most.total() == 0
        headers = {"authorization": f"Bearer {KEY}"}
        answer = client.post(
            URL, files={"image": photo()}, data={"prompt": "p", "steps": "1"}, headers=headers, timeout=200
        )
        assert answer.status_code == 200, answer.text
    is_over.set()
    watcher.join()
    assert most == {"MLLMStage": 1, "DiffusionStage": 1}  # so the flood would have been seen


def test_no_log_of_the_cluster_and_no_metric_has_a_key_or_words_of_a_user(service: Service, photo: Photo) -> None:
    headers = {"authorization": f"Bearer {KEY}"}
    unfit = io.BytesIO()
    Image.new("RGBA", (9, 9)).save(unfit, "PNG")

    def edit(image: bytes, **fields: Any) -> httpx2.Response:
        files = {"image": (FILE, image)} | fields.pop("files", {})
        return client.post(URL, files=files, data={"prompt": PROMPT, "steps": "1"} | fields, headers=headers)

    with httpx2.Client(base_url=service.address, timeout=100) as client:
        answers = [
            edit(photo()),
            edit(photo(), expressive=PROMPT, stream="true", partial_images="1", user="canary"),
            edit(photo(), response_format="url"),
            edit(photo(), prompt=PROMPT * 200),  # longer than is allowed
            edit(photo(), prompt=PROMPT + "\N{SNOWMAN}" * 3900),  # more than the MLLM takes: found in a stage
            edit(photo(), files={"mask": ("canarymask.png", unfit.getvalue())}),  # found in the other stage
            edit(b"no photo"),
            edit(photo(), prompt=f"quote {PROMPT}"),
            edit(photo(), timeout_s="0.001"),
            client.get(f"/v1/models?prompt={PROMPT}&key={KEY}", headers=headers),
            client.get(f"/{KEY}/{PROMPT}?prompt={PROMPT}", headers=headers),
            client.get(f"/{KEY}", headers={"authorization": f"Bearer {KEY}2"}),
            client.get(f"/v1/images/files/{KEY}"),
            client.post(URL, json={"prompt": [PROMPT]}, headers=headers),
            client.post(
                URL, files={"image": (FILE, photo())}, data={"prompt": PROMPT, "steps": "1"},
                headers=headers | {"prefer": "respond-async"},
            ),
        ]  # fmt: skip
        assert client.get("/stats", headers=headers).status_code == 200
    statuses = [answer.status_code for answer in answers]
    assert statuses == [200, 200, 200, 400, 400, 400, 415, 500, 504, 200, 404, 401, 404, 400, 202]
    for answer in answers[3:14]:
        assert "canary" not in answer.text, answer.text
    found = 0
    for path in service.folder.rglob("logs/**/*"):
        if path.is_file():
            text = path.read_bytes()
            found += text.count(b"status=")
            assert b"canary" not in text, f"{path}: {re.findall(rb'.*canary.*', text)[0]!r}"
            assert hashlib.sha256(KEY.encode()).hexdigest().encode() not in text
    assert found > NUM_ANONYMOUS  # our own lines are there, and were looked at
    names = [path.name for path in (service.folder / "results").rglob("*")]
    assert len(names) > 5
    assert not any("canary" in name for name in names)
    port = ray.nodes()[0]["MetricsExportPort"]
    metrics = httpx2.get(f"http://127.0.0.1:{port}/metrics", timeout=30).text
    assert "ray_serve_num_http_requests" in metrics or "ray_serve" in metrics
    assert "canary" not in metrics


def test_logs_are_json_with_the_id_of_the_request_and_the_name_of_the_key(service: Service, photo: Photo) -> None:
    headers = {"authorization": f"Bearer {KEY}", "x-request-id": "turn-42"}
    data = {"prompt": "quote p", "steps": "1"}
    answer = httpx2.post(f"{service.address}{URL}", files={"image": photo()}, data=data, headers=headers, timeout=60)
    assert answer.status_code == 500
    lines = [
        json.loads(line)
        for path in service.folder.rglob("logs/serve/replica_*.log")
        for line in path.read_text().splitlines()
    ]
    ours = [line for line in lines if line.get("request_id") == "turn-42"]
    (request,) = [line for line in ours if "duration_s" in line]
    assert (request["method"], request["path"], request["status"], request["key"]) == ("POST", URL, 500, "alice")
    (error,) = [line for line in ours if line["levelname"] == "ERROR"]
    assert "rough_check.py" in error["exc_text"]
    assert "ValueError: (its words are withheld" in error["exc_text"]
    assert {"MLLMStage", "DiffusionStage"} <= {line.get("deployment", "").rpartition("_")[2] for line in lines}
