"""Keys and logs of a service whose stages are scaled to zero, on the private cluster of the tests."""

import hashlib
import io
import json
import re
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2
import pytest
import ray
from PIL import Image

from tests.ray_cluster import HEADERS, KEY
from tests.serving.sending import GUARD_S
from tests.waiting import until

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(GUARD_S)]

if TYPE_CHECKING:
    from tests.ray_cluster import ServiceHost

Photo = Callable[..., bytes]
URL = "/v1/images/edits"
PROMPT, FILE = "canaryprompt of a private kind", "canaryfile.png"
NUM_ANONYMOUS = 200


def test_neither_questions_nor_an_anonymous_flood_wake_a_stage_and_a_key_does(
    asleep: str, service_host: "ServiceHost", photo: Photo
) -> None:
    is_over = threading.Event()
    most: Counter[str] = Counter()

    def look() -> None:
        nonlocal most
        while not is_over.wait(0.2):
            most |= service_host.num_replicas()

    paths = (URL, "/readyz", "/stats", "/v1/models", "/v1/edits/x", "/docs", "/openapi.json", "/metrics", "/nope")

    def send(number: int) -> int:
        path = paths[number % len(paths)]
        headers = [{}, {"authorization": "Bearer wrong"}, {"prefer": "respond-async"}][number // len(paths) % 3]
        if path == URL:
            body = {"files": {"image": ("photo", photo())}, "data": {"prompt": "p"}}
            return client.post(path, headers=headers, **body).status_code
        return client.get(path, headers=headers).status_code

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        with httpx2.Client(base_url=asleep, timeout=GUARD_S) as client, ThreadPoolExecutor(8) as pool:
            for path in ("/readyz", "/stats"):
                assert client.get(path, headers=HEADERS).status_code == 200
            statuses = Counter(pool.map(send, range(NUM_ANONYMOUS)))
            assert statuses == {401: NUM_ANONYMOUS}
            is_over.wait(2 * service_host.usual.look_back_period_s)  # the autoscaler looks every now and then
            assert most.total() == 0
            answer = client.post(URL, files={"image": photo()}, data={"prompt": "p", "steps": "1"}, headers=HEADERS)
            assert answer.status_code == 200, answer.text
            until(lambda: most == {"MLLMStage": 1, "DiffusionStage": 1})  # so the flood would have been seen
    finally:
        is_over.set()
        watcher.join()


def test_no_log_of_the_cluster_and_no_metric_has_a_key_or_words_of_a_user(
    service: str, service_host: "ServiceHost", photo: Photo
) -> None:
    unfit = io.BytesIO()
    Image.new("RGBA", (9, 9)).save(unfit, "PNG")

    def edit(image: bytes, **fields: Any) -> httpx2.Response:
        files = {"image": (FILE, image)} | fields.pop("files", {})
        return client.post(URL, files=files, data={"prompt": PROMPT, "steps": "1"} | fields, headers=HEADERS)

    headers = HEADERS
    with httpx2.Client(base_url=service, timeout=GUARD_S) as client:
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

    def texts() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in service_host.folder.rglob("logs/**/*") if path.is_file()}

    # Our own lines are there, which are written when the answers have gone.
    until(lambda: sum(text.count(b"status=") for text in texts().values()) > len(answers), poll_s=0.2)
    for path, text in texts().items():
        assert b"canary" not in text, f"{path}: {re.findall(rb'.*canary.*', text)[0]!r}"
        assert hashlib.sha256(KEY.encode()).hexdigest().encode() not in text
    names = [path.name for path in service_host.results.rglob("*")]
    assert len(names) > 5
    assert not any("canary" in name for name in names)
    port = ray.nodes()[0]["MetricsExportPort"]
    metrics = httpx2.get(f"http://127.0.0.1:{port}/metrics", timeout=GUARD_S).text
    assert "ray_serve_num_http_requests" in metrics or "ray_serve" in metrics
    assert "canary" not in metrics


def test_logs_are_json_with_the_id_of_the_request_and_the_name_of_the_key(
    service: str, service_host: "ServiceHost", photo: Photo
) -> None:
    headers = HEADERS | {"x-request-id": "turn-42"}
    data = {"prompt": "quote p", "steps": "1"}
    answer = httpx2.post(f"{service}{URL}", files={"image": photo()}, data=data, headers=headers, timeout=GUARD_S)
    assert answer.status_code == 500

    def lines() -> list[dict[str, Any]]:
        return [
            json.loads(line)
            for path in service_host.folder.rglob("logs/serve/replica_mgie_*.log")
            for line in path.read_text().splitlines(keepends=True)
            if line.endswith("\n")  # the last may be half written
        ]

    def ours() -> list[dict[str, Any]]:
        return [line for line in lines() if line.get("request_id") == "turn-42"]

    until(lambda: any("duration_s" in line for line in ours()), poll_s=0.2)  # written when the answer has gone
    (request,) = [line for line in ours() if "duration_s" in line]
    assert (request["method"], request["path"], request["status"], request["key"]) == ("POST", URL, 500, "alice")
    (error,) = [line for line in ours() if line["levelname"] == "ERROR"]
    assert "rough_check.py" in error["exc_text"]
    assert "ValueError: (its words are withheld" in error["exc_text"]
    assert {"MLLMStage", "DiffusionStage"} <= {line.get("deployment", "").rpartition("_")[2] for line in lines()}
