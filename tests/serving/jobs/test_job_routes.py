"""Jobs over HTTP: accepting, asking, following, repeating."""

import base64
import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.serving.jobs.conftest import ASYNC, LONG, TTL_S, Replica, Replicas

pytestmark = pytest.mark.slow

Photo = Callable[..., bytes]
URL = "/v1/images/edits"
KEYS = {
    "id", "object", "status", "position", "step", "num_steps", "created_at", "started_at", "ended_at", "estimated_end",
    "expires_at", "attempts", "webhook", "result", "error",
}  # fmt: skip


def error_of(response: Any) -> tuple[int, str | None, str | None]:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return response.status_code, error["param"], error["code"]


def events_of(replica: Replica, job_id: str) -> list[dict[str, Any]]:
    """Follows a job to its end."""
    answer = replica.request("GET", f"/v1/edits/{job_id}/events")
    assert answer.headers["content-type"].startswith("text/event-stream")
    frames = [frame for frame in answer.text.split("\n\n") if frame and not frame.startswith(":")]
    assert all(frame.startswith("event: job\ndata: ") for frame in frames)
    return [json.loads(frame.removeprefix("event: job\ndata: ")) for frame in frames]


@pytest.mark.parametrize("kind", ["form", "json"])
def test_an_edit_is_accepted_as_a_job_and_any_replica_answers_for_it(
    replicas: Replicas, small: bytes, kind: str
) -> None:
    here, there = replicas.open(is_at_work=False), replicas.open(is_at_work=False)
    if kind == "form":
        answer = here.post(small, {"prefer": "wait=5, Respond-Async"})
    else:
        url = f"data:image/png;base64,{base64.b64encode(small).decode()}"
        body = {"images": [{"image_url": url}], "prompt": "p", "steps": 1}
        answer = here.request("POST", URL, json=body, headers=ASYNC)
    assert answer.status_code == 202
    job = answer.json()
    assert set(job) == KEYS
    assert answer.headers["location"] == f"/v1/edits/{job['id']}"
    assert answer.headers["preference-applied"] == "respond-async"
    assert (job["status"], job["position"], job["attempts"]) == ("queued", 0, 0)
    assert job["expires_at"] == pytest.approx(replicas.clock.now_s + TTL_S, abs=1)
    assert there.job(job["id"]) == job


def test_the_result_is_what_a_synchronous_edit_answers(replicas: Replicas, small: bytes) -> None:
    here = replicas.open()
    data = {"prompt": "p", "steps": "1", "seed": "5", "n": "2", "output_format": "webp", "deterministic": "true"}
    plain = here.request("POST", URL, files={"image": small}, data=data).json()
    job = here.wait(here.accept(small, seed="5", n="2", output_format="webp"), "done", "failed")
    result = job["result"]
    assert result["data"] == plain["data"]
    assert result["mgie"]["id"] == job["id"]
    assert result["mgie"]["kept_until"] is None
    for answer in (plain, result):
        for name in ("created", "data"):
            del answer[name]
        for name in ("id", "timings", "mllm", "diffusion"):
            del answer["mgie"][name]
    assert result == plain


def test_a_seed_is_drawn_when_the_job_is_accepted(replicas: Replicas, small: bytes) -> None:
    here = replicas.open(is_at_work=False)
    data = {"prompt": "p", "steps": "1"}
    ids = [here.request("POST", URL, files={"image": small}, data=data, headers=ASYNC).json()["id"] for _ in "ab"]
    seeds = [replicas.jobs().get(job_id).record.order.call["seed"] for job_id in ids]
    assert seeds[0] != seeds[1]
    there = replicas.open()
    assert [there.wait(job_id, "done")["result"]["mgie"]["seed"] for job_id in ids] == seeds


def test_results_by_address_can_be_fetched_and_gone_on_from(replicas: Replicas, small: bytes) -> None:
    here, there = replicas.open(), replicas.open(is_at_work=False)
    job = here.wait(here.accept(small, response_format="url", output_format="jpeg"), "done", "failed")
    (item,) = job["result"]["data"]
    assert set(item) == {"url", "revised_prompt"}
    assert there.request("GET", item["url"]).headers["content-type"] == "image/jpeg"
    assert job["result"]["mgie"]["kept_until"] == job["expires_at"]
    data = {"prompt": "p", "steps": "1", "seed": "2", "previous": job["id"]}
    went_on = there.request("POST", URL, files={"model": (None, "random")}, data=data)
    assert went_on.status_code == 200
    second = here.request("POST", URL, files={"model": (None, "random")}, data=data, headers=ASYNC)
    assert here.wait(second.json()["id"], "done", "failed")["status"] == "done"
    unkept = here.wait(here.accept(small), "done")["id"]
    answer = there.request("POST", URL, files={"model": (None, "random")}, data=data | {"previous": unkept})
    assert error_of(answer) == (404, "previous", "previous_not_found")


@pytest.mark.parametrize(
    ("headers", "fields", "expected"),
    [
        (ASYNC, {"stream": "true"}, (400, "stream", "unsupported_value")),
        (ASYNC, {"webhook_url": "https://a.example/"}, (400, "webhook_url", "unsupported_value")),
        (ASYNC, {"timeout_s": "3601"}, (400, "timeout_s", "unsupported_value")),
        (ASYNC | {"idempotency-key": "a b"}, {}, (400, "Idempotency-Key", "unsupported_value")),
        (ASYNC | {"idempotency-key": "k" * 256}, {}, (400, "Idempotency-Key", "unsupported_value")),
        (ASYNC | {"idempotency-key": ""}, {}, (400, "Idempotency-Key", "unsupported_value")),
        (ASYNC, {"prompt": " "}, (400, "prompt", "invalid_value")),
        (ASYNC, {"model": "no"}, (404, "model", "model_not_found")),
        (ASYNC, {"size": "7x9000"}, (400, "size", "invalid_value")),
        ({"idempotency-key": "k"}, {}, (400, "Idempotency-Key", "unsupported_value")),
        ({}, {"webhook_url": "https://a.example/"}, (400, "webhook_url", "unsupported_value")),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    replicas: Replicas, small: bytes, headers: dict[str, str], fields: dict[str, str], expected: tuple[int, str, str]
) -> None:
    here = replicas.open(is_at_work=False)
    answer = here.request("POST", URL, files={"image": small}, data={"prompt": "p"} | fields, headers=headers)
    assert error_of(answer) == expected
    assert replicas.jobs().line() == []


def test_a_photo_that_cannot_be_read_is_refused_rather_than_accepted(replicas: Replicas) -> None:
    answer = replicas.open(is_at_work=False).post(b"no picture")
    assert error_of(answer)[::2] == (415, "invalid_image")


def test_the_same_key_gives_the_same_job_and_another_request_is_refused(replicas: Replicas, small: bytes) -> None:
    here, there = replicas.open(), replicas.open(is_at_work=False)
    key = {"idempotency-key": "order-1"}
    job_id = here.accept(small, key)
    here.wait(job_id, "done")
    again = there.post(small, key)
    assert (again.status_code, again.json()["id"], again.json()["status"]) == (202, job_id, "done")
    assert again.json()["result"]["data"][0]["b64_json"]
    assert error_of(there.post(small, key, seed="2")) == (422, "Idempotency-Key", "idempotency_key_reused")


@pytest.mark.parametrize("path", ["", "/events"])
@pytest.mark.parametrize("job_id", ["no", "0" * 40, "f" * 40])
def test_a_job_that_is_not_there_is_not_found(replicas: Replicas, path: str, job_id: str) -> None:
    here = replicas.open(is_at_work=False)
    assert error_of(here.request("GET", f"/v1/edits/{job_id}{path}")) == (404, None, "not_found")
    assert error_of(here.request("DELETE", f"/v1/edits/{job_id}")) == (404, None, "not_found")


def test_an_expired_job_is_not_found(replicas: Replicas, small: bytes) -> None:
    here = replicas.open(is_at_work=False)
    job_id = here.accept(small)
    replicas.clock.now_s += TTL_S + 1
    assert error_of(here.request("GET", f"/v1/edits/{job_id}")) == (404, None, "not_found")


def test_events_tell_each_state_to_the_end_from_any_replica(replicas: Replicas, small: bytes) -> None:
    here, there = replicas.open(lease_s=0.4), replicas.open(is_at_work=False)
    job_id = here.accept(small, steps="120")
    events = events_of(there, job_id)
    statuses = [event["status"] for event in events]
    assert statuses[-1] == "done"
    assert [status for i, status in enumerate(statuses) if status not in statuses[:i]][-2:] == ["rendering", "done"]
    steps = [event["step"] for event in events if event["status"] == "rendering"]
    assert steps == sorted(set(steps))
    assert len(steps) > 1
    assert {event["num_steps"] for event in events if event["status"] == "rendering"} == {120}
    assert events[-1] == there.job(job_id)
    assert events_of(here, job_id) == events[-1:]  # of one that has ended


def test_events_of_a_job_that_is_cancelled_end(replicas: Replicas, small: bytes) -> None:
    here = replicas.open()
    job_id = here.accept(small, **LONG)
    here.wait(job_id, "rendering")
    here.request("DELETE", f"/v1/edits/{job_id}")
    assert [event["status"] for event in events_of(here, job_id)] == ["cancelled"]
