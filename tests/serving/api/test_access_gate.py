"""The gate: every route of the application, those that do not exist, with and without keys."""

import asyncio
import hashlib
import itertools
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from starlette.routing import Mount, Route

from serving.access.keys import KeyRing
from serving.edits.backend import EditEvent
from serving.edits.call import EditCall
from serving.edits.in_process import InProcessBackend
from serving.stages.diffusion import DiffusionStage
from serving.stages.mllm import MLLMStage
from tests.live import api_over
from tests.waiting import until

pytestmark = pytest.mark.slow

Photo = Callable[..., bytes]
URL = "/v1/images/edits"
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")
OPEN = {("GET", "/"), ("GET", "/page/style.css"), ("GET", "/healthz"), ("GET", "/v1/images/files/some-id")}
NO_ROUTES = (
    "/nope", "/v1", "/v1/", "/page", "/page/", "/healthz/", "/healthz/x", "/v1/images/files",
    "/v1/images/files/", "/v1/images/files/a/b", "/V1/models", "/readyz/", "/metrics", "/-/routes", "/docs/",
    "/page/../readyz", "/%2e%2e/readyz",
)  # fmt: skip


class Counted(InProcessBackend):
    """The real backend, and how often it was asked for anything."""

    num_calls = 0

    def __getattribute__(self, name: str) -> Any:
        if name in {"edit", "stream", "models", "stats", "check_ready"}:
            type(self).num_calls += 1
        return super().__getattribute__(name)


def keys_text(**limits: str) -> str:
    """A keys file: of each name the key `mgie-NAME`."""
    lines = []
    for name, fields in limits.items():
        digest = hashlib.sha256(f"mgie-{name}".encode()).hexdigest()
        lines += ["[[keys]]", f'name = "{name}"', f'sha256 = "{digest}"', fields]
    return "\n".join(lines)


def as_key(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer mgie-{name}"}


@pytest.fixture
def make(mllm: MLLMStage, diffusion: DiffusionStage, tmp_path: Path) -> Callable[..., TestClient]:
    def make(*, backend: Any = None, **settings: Any) -> TestClient:
        api = api_over(backend or InProcessBackend(mllm, diffusion), tmp_path, **settings)
        return TestClient(api, raise_server_exceptions=False)

    return make


def paths_of(api: FastAPI) -> Iterator[str]:
    """One path for each route, from the routes themselves and from those that the document names."""
    for route in api.routes:
        if isinstance(route, Mount):
            yield f"{route.path}/style.css"
        elif isinstance(route, Route | APIRoute):
            yield route.path
    yield from api.openapi()["paths"]


def filled(path: str) -> str:
    for name in ("edit_id", "name", "job_id"):
        path = path.replace("{" + name + "}", "some-id")
    assert "{" not in path, "a route has a parameter that this test does not know"
    return path


def send(client: TestClient, image: bytes, key: str | None = None, /, *, edit_id: str = "e", **fields: Any) -> Any:
    form = {name: (None, str(value)) for name, value in ({"prompt": "p", "steps": 1} | fields).items()}
    headers = {"x-request-id": edit_id} | ({} if key is None else as_key(key))
    return client.post(URL, files={"image": ("photo.png", image)} | form, headers=headers)


def code_of(response: Any) -> str | None:
    code: str | None = response.json()["error"]["code"]
    return code


def test_nothing_but_the_allow_list_opens_without_a_valid_key(
    make: Callable[..., TestClient], mllm: MLLMStage, diffusion: DiffusionStage
) -> None:
    backend = Counted(mllm, diffusion)
    client = make(backend=backend, keys=KeyRing(text=keys_text(alice="")))
    api: Any = client.app
    paths = {filled(path) for path in paths_of(api)} | set(NO_ROUTES)
    known = {URL, f"{URL}/some-id", "/v1/edits/some-id", "/v1/edits/some-id/events", "/v1/models", "/readyz", "/stats"}
    assert known | {"/docs", "/redoc", "/openapi.json"} | {path for _, path in OPEN} <= paths
    opened = set()
    for path, method in itertools.product(sorted(paths), METHODS):
        for headers, code in ({}, "missing_api_key"), (as_key("bob"), "invalid_api_key"):
            response = client.request(method, path, headers=headers, follow_redirects=False)
            if response.status_code == 401:
                assert response.headers["www-authenticate"] == "Bearer"
                assert response.headers["x-request-id"]
                assert method == "HEAD" or code_of(response) == code
            else:
                assert response.status_code in (200, 404), (method, path)  # 404: there is no such file
                opened.add((method, path))
    assert opened == OPEN
    assert Counted.num_calls == 0  # no stage was asked for anything
    # And with the key each of them is what it is without keys.
    anybody = make(backend=backend)
    for path, method in itertools.product(sorted(paths), METHODS):
        answers = [
            client.request(method, path, headers=as_key("alice"), follow_redirects=False),
            anybody.request(method, path, follow_redirects=False),
        ]
        assert answers[0].status_code == answers[1].status_code != 401, (method, path)
    assert Counted.num_calls > 0


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("authorization", "", "missing_api_key"),
        ("authorization", "Bearer", "missing_api_key"),
        ("authorization", "Bearer ", "missing_api_key"),
        ("authorization", "mgie-alice", "missing_api_key"),
        ("authorization", "Basic mgie-alice", "missing_api_key"),
        ("x-api-key", "mgie-alice", "missing_api_key"),
        ("cookie", "authorization=Bearer mgie-alice", "missing_api_key"),
        ("authorization", "Bearer mgie-alice mgie-alice", "invalid_api_key"),
        ("authorization", "Bearer mgie-alicee", "invalid_api_key"),
        ("authorization", "Bearer MGIE-ALICE", "invalid_api_key"),
        ("authorization", "Bearer *", "invalid_api_key"),
        ("authorization", f"Bearer {hashlib.sha256(b'mgie-alice').hexdigest()}", "invalid_api_key"),
        ("authorization", "Bearer mgie-late", "invalid_api_key"),
    ],
)
def test_what_is_no_key_opens_nothing(make: Callable[..., TestClient], name: str, value: str, code: str) -> None:
    client = make(keys=KeyRing(text=keys_text(alice="", late="expires = 2020-01-01T00:00:00Z")))
    for path in (URL, "/v1/models", f"/v1/models?{name}={value}"):
        response = client.get(path, headers={name: value})
        assert (response.status_code, code_of(response)) == (401, code)


def test_two_keys_in_one_request_are_refused(make: Callable[..., TestClient]) -> None:
    client = make(keys=KeyRing(text=keys_text(alice="", bob="")))
    headers = [("authorization", "Bearer mgie-alice"), ("authorization", "Bearer mgie-bob")]
    assert code_of(client.get("/v1/models", headers=headers)) == "invalid_api_key"
    assert client.get("/v1/models", headers={"authorization": "bEARER  mgie-bob "}).status_code == 200


def test_an_anonymous_body_is_not_read(make: Callable[..., TestClient]) -> None:
    client = make(keys=KeyRing(text=keys_text(alice="")))
    received: list[str] = []
    sent: list[Any] = []
    scope = {
        "type": "http", "method": "POST", "path": URL, "query_string": b"", "http_version": "1.1",
        "headers": [(b"content-type", b"multipart/form-data; boundary=x"), (b"content-length", b"1000")],
    }  # fmt: skip

    async def receive() -> Any:
        received.append("asked")
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(client.app(scope, receive, send))
    assert sent[0]["status"] == 401
    assert received == []


def test_without_keys_the_service_is_open_and_says_so_once(
    make: Callable[..., TestClient], photo: Photo, caplog: pytest.LogCaptureFixture
) -> None:
    with make() as client:
        for _ in range(2):
            assert send(client, photo()).status_code == 200
        assert client.get("/stats").status_code == 200
    assert caplog.text.count("the service is open to everybody") == 1


def test_the_official_client_sends_the_key_and_gets_errors_of_its_own(
    make: Callable[..., TestClient], photo: Photo
) -> None:
    client = make(keys=KeyRing(text=keys_text(alice="requests_per_minute = 2")))

    def api(key: str) -> openai.OpenAI:
        return openai.OpenAI(base_url="http://testserver/v1", api_key=key, http_client=client, max_retries=0)

    with pytest.raises(openai.AuthenticationError) as refused:
        api("mgie-bob").images.edit(image=photo(), prompt="p")
    assert refused.value.code == "invalid_api_key"
    for _ in range(2):
        assert api("mgie-alice").images.edit(image=photo(), prompt="p", extra_body={"steps": 1}).data
    with pytest.raises(openai.RateLimitError) as limited:
        api("mgie-alice").images.edit(image=photo(), prompt="p")
    assert limited.value.code == "rate_limited"


def test_too_many_requests_are_told_when_to_come_back_and_others_do_not_notice(
    make: Callable[..., TestClient],
) -> None:
    client = make(keys=KeyRing(text=keys_text(alice="requests_per_minute = 6", bob=""), clock=lambda: 0.0))
    answers = [client.get("/v1/models", headers=as_key("alice")) for _ in range(8)]
    assert [answer.status_code for answer in answers] == [200] * 6 + [429] * 2
    assert {answer.headers["x-ratelimit-limit-requests"] for answer in answers} == {"6"}
    remaining = [int(answer.headers["x-ratelimit-remaining-requests"]) for answer in answers]
    assert remaining == [5, 4, 3, 2, 1, 0, 0, 0]
    assert all(0 < float(answer.headers["x-ratelimit-reset-requests"].removesuffix("s")) <= 60 for answer in answers)
    last = answers[-1]
    assert (code_of(last), last.json()["error"]["type"]) == ("rate_limited", "rate_limit_error")
    assert last.headers["retry-after"] == "10"
    assert client.get("/v1/models", headers=as_key("bob")).status_code == 200
    assert "x-ratelimit-limit-requests" not in client.get("/v1/models", headers=as_key("bob")).headers
    # Who calls an edit off makes room.
    assert client.delete(f"{URL}/some-id", headers=as_key("alice")).status_code == 404


def test_only_so_many_edits_of_a_key_are_under_way(make: Callable[..., TestClient], photo: Photo) -> None:
    ring = KeyRing(text=keys_text(alice="max_concurrent = 1", bob=""))
    # Open: all requests on one event loop, as in a real service.
    with make(keys=ring) as client, ThreadPoolExecutor(1) as pool:
        running = pool.submit(send, client, photo(), "alice", edit_id="long", steps=1000, n=10)
        until(lambda: ring.find("mgie-alice").allowance._num_edits)
        refused = [send(client, photo(), "alice") for _ in range(2)]
        assert send(client, photo(), "bob").status_code == 200
        assert not running.done()
        until(lambda: client.delete(f"{URL}/long", headers=as_key("alice")).status_code == 204)
        assert running.result().status_code == 409
        assert {(code_of(answer), answer.headers["retry-after"]) for answer in refused} == {
            ("too_many_concurrent", "1")
        }
        assert send(client, photo(), "alice").status_code == 200  # the place is free again, also after a stream
        assert send(client, photo(), "alice", stream="true").status_code == 200
        assert send(client, b"no photo", "alice").status_code == 415
        assert send(client, photo(), "alice").status_code == 200


def test_edits_cost_pixel_steps_and_those_that_fail_nothing(make: Callable[..., TestClient], photo: Photo) -> None:
    area = 128 * 128
    client = make(keys=KeyRing(text=keys_text(alice=f"pixel_steps_per_minute = {10 * area}"), clock=lambda: 0.0))
    never = send(client, photo(), "alice", steps=6, n=2)
    assert (never.status_code, code_of(never)) == (400, "cost_too_high")
    assert send(client, photo(), "alice", steps=4, n=2).status_code == 200
    for _ in range(3):  # found only in a stage
        assert send(client, b"no photo", "alice", steps=2).status_code == 415
    later = send(client, photo(), "alice", steps=5)
    assert (later.status_code, code_of(later)) == (429, "cost_limited")
    assert later.headers["retry-after"] == "18"  # 3 of 10 a minute are missing
    assert send(client, photo(), "alice", steps=2).status_code == 200
    assert send(client, photo(), "alice", steps=2).status_code == 429


@pytest.mark.parametrize("is_stream", [False, True])
def test_an_edit_that_is_given_up_pays_for_the_steps_it_was_seen_to_do(
    make: Callable[..., TestClient], photo: Photo, is_stream: bool
) -> None:
    all_steps = 10 * 1000 * 128 * 128
    limit = f"pixel_steps_per_minute = {2 * all_steps}"
    ring = KeyRing(text=keys_text(alice=limit), clock=lambda: 0.0)  # nothing is refilled
    client = make(keys=ring)
    stream = str(is_stream).lower()
    bucket = ring.find("mgie-alice").allowance._cost
    assert bucket is not None
    for timeout_s in (1, 2, 4, 8, 16, 32):  # until it is enough for a first step on this machine
        before = bucket.level
        answer = send(client, photo(), "alice", steps=1000, n=10, timeout_s=timeout_s, expressive="x", stream=stream)
        assert "deadline_exceeded" in answer.text
        if not is_stream or "\n: step " in answer.text:
            break
    if is_stream:
        last = [line for line in answer.text.splitlines() if line.startswith(": step ")][-1]
        done = int(last.removeprefix(": step ").partition("/")[0])
        assert 0 < done < 1000
        assert before - bucket.level == pytest.approx(done * 10 * 128 * 128)
    else:
        assert before - bucket.level == all_steps


def test_everybodys_limits_hold_without_keys(make: Callable[..., TestClient], photo: Photo) -> None:
    client = make(max_steps=5, max_n=2, max_prompt_chars=10)
    assert send(client, photo(), steps=5, n=2, prompt="0123456789").status_code == 200
    for fields in ({"steps": 6}, {"n": 3}, {"prompt": "01234567890"}, {"expressive": "01234567890"}):
        answer = send(client, photo(), **fields)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, next(iter(fields)))


def test_the_priority_of_a_key_reaches_the_stages(
    make: Callable[..., TestClient], mllm: MLLMStage, diffusion: DiffusionStage, photo: Photo
) -> None:
    calls: list[EditCall] = []

    class Seen(InProcessBackend):
        def stream(self, call: EditCall, *, is_watched: bool = True) -> AsyncGenerator[EditEvent, None]:
            calls.append(call)
            return super().stream(call, is_watched=is_watched)

    ring = KeyRing(text=keys_text(alice="", bob='priority = "batch"'))
    client = make(backend=Seen(mllm, diffusion), keys=ring, batch_patience_s=7.0)
    for name in ("alice", "bob"):
        assert send(client, photo(), name).status_code == 200
    assert [call.options.queue_delay_s for call in calls] == [0.0, 7.0]


def test_keys_do_not_reach_each_others_edits(make: Callable[..., TestClient], photo: Photo) -> None:
    # Open: all requests on one event loop, as in a real service.
    with make(keys=KeyRing(text=keys_text(alice="", bob=""))) as client:

        def edit(name: str, **fields: Any) -> Any:
            form = {field: (None, str(value)) for field, value in ({"prompt": "p", "steps": 1} | fields).items()}
            files = {} if "previous" in fields else {"image": ("photo.png", photo())}
            return client.post(URL, files=files | form, headers=as_key(name) | {"x-request-id": "turn-1"})

        assert edit("alice", keep="true", seed=1).status_code == 200
        assert code_of(edit("bob", previous="turn-1")) == "previous_not_found"
        assert edit("bob", keep="true", seed=2).status_code == 200  # the same id: of another edit
        ends = [
            edit(name, previous="turn-1", seed=3).json()["data"][0]["b64_json"] for name in ("alice", "bob", "alice")
        ]
        assert ends[0] == ends[2] != ends[1]
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(edit, "alice", steps=1000, n=10)
            while not running.done():
                assert client.delete(f"{URL}/turn-1", headers=as_key("bob")).status_code == 404
                if client.delete(f"{URL}/turn-1", headers=as_key("alice")).status_code == 204:
                    break
            assert running.result().status_code == 409
