"""Results that are kept: their addresses, and edits that go on from them."""

import base64
import io
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from fastapi.testclient import TestClient

from mgie.images.files import read_image
from serving.edits import results as kept
from serving.edits.in_process import InProcessBackend
from serving.stages.diffusion import DiffusionStage
from serving.stages.mllm import MLLMStage
from serving.storage.artifacts import ArtifactStore
from tests.live import api_over
from tests.serving.s3_store import S3Store
from tests.waiting import until

pytestmark = pytest.mark.slow

Photo = Callable[..., bytes]
URL = "/v1/images/edits"
FILES = "/v1/images/files/"


class Clock:
    def __init__(self) -> None:
        self.now_s = time.time()

    def __call__(self) -> float:
        return self.now_s


class Replicas:
    """Any number of ingresses over the same stages and the same place for results."""

    def __init__(self, mllm: MLLMStage, diffusion: DiffusionStage, url: str) -> None:
        self._backend, self.url, self.clock = InProcessBackend(mllm, diffusion), url, Clock()

    def open(self, *, keeps_all: bool = False, **settings: Any) -> TestClient:
        store = ArtifactStore.open(self.url, ttl_s=3600, clock=self.clock)
        api = api_over(self._backend, store=store, keep_results=keeps_all, **settings)
        return TestClient(api, raise_server_exceptions=False)


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Store]:
    with S3Store(monkeypatch) as store:
        yield store


@pytest.fixture
def replicas(mllm: MLLMStage, diffusion: DiffusionStage, tmp_path: Path) -> Replicas:
    return Replicas(mllm, diffusion, str(tmp_path / "results"))


def send(client: TestClient, **fields: Any) -> Any:
    files = {name: fields.pop(name) for name in ("image", "mask") if name in fields}
    sent = {name: (None, str(value)) for name, value in ({"prompt": "p", "steps": 1, "seed": 1} | fields).items()}
    return client.post(URL, files=sent | files)


def b64(response: Any, index: int = 0) -> bytes:
    assert response.status_code == 200, response.text
    return base64.b64decode(response.json()["data"][index]["b64_json"])


def error_of(response: Any) -> tuple[int, str | None, str | None]:
    error = response.json()["error"]
    return response.status_code, error["param"], error["code"]


def test_a_url_leads_to_the_file_through_any_replica(replicas: Replicas, photo: Photo) -> None:
    here, there = replicas.open(), replicas.open()
    api = openai.OpenAI(base_url="http://testserver/v1", api_key="unused", http_client=here, max_retries=0)
    extra = {"seed": 3, "steps": 1}
    for output_format in ("png", "webp"):
        plain, kept = [
            api.images.edit(
                image=io.BytesIO(photo()), prompt="p", n=2, output_format=output_format,
                response_format=response_format, extra_body=extra,
            )
            for response_format in ("b64_json", "url")
        ]  # fmt: skip
        assert plain.data is not None
        assert kept.data is not None
        assert plain.model_dump()["mgie"]["kept_until"] is None
        assert kept.model_dump()["mgie"]["kept_until"] == pytest.approx(replicas.clock.now_s + 3600, abs=1)
        for one, other in zip(plain.data, kept.data, strict=True):
            assert other.b64_json is None
            assert other.url is not None
            assert other.url.startswith("http://testserver" + FILES)
            answer = there.get(other.url)
            assert answer.content == base64.b64decode(one.b64_json or "")
            assert answer.headers["content-type"] == f"image/{output_format}"
            assert "private" in answer.headers["cache-control"]


def test_an_address_is_where_the_operator_says_that_the_service_is(replicas: Replicas, photo: Photo) -> None:
    client = replicas.open(public_url="https://photos.example/api/")
    (result,) = send(client, image=photo(), response_format="url").json()["data"]
    assert set(result) == {"url", "revised_prompt"}
    assert result["url"].startswith("https://photos.example/api" + FILES)


def test_results_in_s3_have_signed_addresses_and_are_found_again(
    mllm: MLLMStage, diffusion: DiffusionStage, s3: S3Store, photo: Photo
) -> None:
    replicas = Replicas(mllm, diffusion, f"s3://{s3.bucket}/results")
    answer = send(replicas.open(), image=photo(), response_format="url").json()
    with urllib.request.urlopen(answer["data"][0]["url"]) as response:
        kept = response.read()
    assert kept == b64(send(replicas.open(), image=photo()))
    went_on = send(replicas.open(), previous=answer["mgie"]["id"], steps=2)
    assert b64(went_on) == b64(send(replicas.open(), image=kept, steps=2))


@pytest.mark.parametrize("output_format", ["png", "jpeg"])
def test_an_edit_goes_on_from_a_result_without_loss(replicas: Replicas, photo: Photo, output_format: str) -> None:
    lossless = [b64(send(replicas.open(), image=photo(), n=2), index) for index in (0, 1)]
    kept = send(replicas.open(), image=photo(), n=2, keep="true", output_format=output_format)
    assert kept.json()["data"][0]["b64_json"]
    edit_id = kept.json()["mgie"]["id"]
    assert edit_id == kept.headers["x-request-id"]
    for name, source in ((edit_id, lossless[0]), (f"{edit_id}:0", lossless[0]), (f"{edit_id}:1", lossless[1])):
        went_on = send(replicas.open(), previous=name, seed=7, steps=2)
        assert b64(went_on) == b64(send(replicas.open(), image=source, seed=7, steps=2))
    assert error_of(send(replicas.open(), previous=f"{edit_id}:2")) == (404, "previous", "previous_not_found")


def test_a_third_turn_keeps_what_a_mask_protects(replicas: Replicas, photo: Photo, mask: Photo) -> None:
    client, source = replicas.open(), np.asarray(read_image(photo()))
    answer = send(client, image=photo(), mask=mask((0, 0, 50, 64)), keep="true")
    for box in ((0, 0, 20, 64), (30, 0, 50, 64)):
        assert (np.asarray(read_image(b64(answer)))[:, 50:] == source[:, 50:]).all()
        answer = send(client, previous=answer.json()["mgie"]["id"], mask=mask(box), keep="true")
    assert (np.asarray(read_image(b64(answer)))[:, 50:] == source[:, 50:]).all()
    assert (np.asarray(read_image(b64(answer)))[:, :50] != source[:, :50]).any()


def test_a_stream_is_kept_where_asked(replicas: Replicas, photo: Photo) -> None:
    streamed = send(replicas.open(), image=photo(), stream="true", keep="true", steps=3).text
    edit_id = streamed.split("\n\n")[0].removeprefix(": id ")
    assert f'"id":"{edit_id}"' in streamed
    assert '"kept_until":null' not in streamed
    plain = b64(send(replicas.open(), image=photo(), steps=3))
    assert b64(send(replicas.open(), previous=edit_id)) == b64(send(replicas.open(), image=plain))


def test_only_what_is_asked_for_is_kept_unless_the_operator_wants_all(replicas: Replicas, photo: Photo) -> None:
    for keeps_all, asked, is_kept in (
        (False, {}, False), (False, {"keep": "true"}, True), (True, {}, True), (True, {"keep": "false"}, False),
    ):  # fmt: skip
        before = set(Path(replicas.url).rglob("*.*"))
        answer = send(replicas.open(keeps_all=keeps_all), image=photo(), **asked)
        assert (answer.json()["mgie"]["kept_until"] is not None) == is_kept
        assert (set(Path(replicas.url).rglob("*.*")) > before) == is_kept
        status = send(replicas.open(), previous=answer.json()["mgie"]["id"]).status_code
        assert status == (200 if is_kept else 404)


def test_what_has_expired_is_not_found_any_more(replicas: Replicas, photo: Photo) -> None:
    client = replicas.open()
    answer = send(client, image=photo(), response_format="url").json()
    replicas.clock.now_s = answer["mgie"]["kept_until"] + 0.01
    assert error_of(send(client, previous=answer["mgie"]["id"])) == (404, "previous", "previous_not_found")
    assert error_of(client.get(answer["data"][0]["url"])) == (404, None, "not_found")
    for name in ("0" * 40, "..%2f..%2fetc%2fpasswd", "x", "%00"):
        assert client.get(FILES + name).status_code == 404


def test_what_has_expired_is_deleted_while_the_service_runs(
    replicas: Replicas, photo: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "SWEEP_EVERY_S", 0.02)
    sweep, sweeps = ArtifactStore.sweep, list[int]()

    def counted(store: ArtifactStore, *args: Any) -> int:
        sweeps.append(sweep(store, *args))
        return sweeps[-1]

    monkeypatch.setattr(ArtifactStore, "sweep", counted)

    def files() -> list[Path]:
        return [path for path in Path(replicas.url).rglob("*") if path.is_file() and path.name != "lock"]

    with replicas.open() as client:
        send(client, image=photo(), keep="true")
        assert len(files()) == 3  # the picture, its record, and the document that knows its edit
        sweeps.clear()
        until(lambda: len(sweeps) > 1)
        assert len(files()) == 3
        replicas.clock.now_s += 3700
        until(lambda: not files())


def test_a_result_of_more_bytes_than_a_photo_may_have_can_be_edited_on(replicas: Replicas, photo: Photo) -> None:
    image = photo(200, 150, file_type="JPEG")
    client = replicas.open(max_image_bytes=len(image))
    kept = send(client, image=image, keep="true")
    assert len(b64(kept)) > len(image)
    assert error_of(send(client, image=b64(kept))) == (413, "image", "image_too_large")
    assert b64(send(client, previous=kept.json()["mgie"]["id"], size="400x300"))


def test_a_store_in_trouble_is_a_503_without_internals_and_not_to_be_retried(
    replicas: Replicas, photo: Photo, caplog: pytest.LogCaptureFixture
) -> None:
    client = replicas.open()
    folder = Path(replicas.url) / "tmp"
    folder.rmdir()
    folder.write_bytes(b"")  # no folder any more
    response = send(client, image=photo(), keep="true")
    assert error_of(response) == (503, None, "store_unavailable")
    assert response.headers["x-should-retry"] == "false"
    assert replicas.url not in response.text
    assert replicas.url in caplog.text
    assert b64(send(client, image=photo()))  # nothing is to be kept
