"""The operator's safety check: what it refuses does not pass, and neither does what it fails on."""

import base64
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from mgie.errors import ConfigError
from mgie.images.files import read_image
from serving.edits.in_process import InProcessBackend
from serving.edits.safety import SafetyCheck, load_check
from serving.stages.diffusion import DiffusionStage
from serving.stages.mllm import MLLMStage
from tests.live import api_over

pytestmark = pytest.mark.slow

Photo = Callable[..., bytes]
Asked = tuple[tuple[int, int], str, str]


class Recorder:
    """A check that notes what it is asked, and answers as told."""

    def __init__(self) -> None:
        self.asked: list[Asked] = []
        self.answer: Callable[[str, str], object] = lambda instruction, where: None

    def __call__(self, picture: Image.Image, instruction: str, *, where: str) -> Any:
        self.asked.append((picture.size, instruction, where))
        return self.answer(instruction, where)


@pytest.fixture
def check() -> Recorder:
    return Recorder()


@pytest.fixture
def checked(mllm: MLLMStage, diffusion: DiffusionStage, check: Recorder) -> TestClient:
    return TestClient(api_over(InProcessBackend(mllm, diffusion), check=check), raise_server_exceptions=False)


def send(client: TestClient, image: bytes, **fields: Any) -> Any:
    data = {"prompt": "make it night", "steps": 20} | fields
    return client.post("/v1/images/edits", files={"image": image}, data=data)


def test_input_and_every_result_are_checked_and_pass(checked: TestClient, check: Recorder, photo: Photo) -> None:
    response = send(checked, photo(), n=2)
    assert len(response.json()["data"]) == 2
    assert read_image(base64.b64decode(response.json()["data"][0]["b64_json"])).size == (96, 64)
    ask = ((96, 64), "make it night")
    assert check.asked == [(*ask, "input"), (*ask, "output"), (*ask, "output")]
    assert checked.get("/readyz").status_code == 200
    assert checked.get("/stats").status_code == 200


def test_words_given_to_the_model_are_checked_too(checked: TestClient, check: Recorder, photo: Photo) -> None:
    check.answer = lambda instruction, where: "no" if instruction == "bad words" else None
    assert send(checked, photo(), expressive="good words").status_code == 200
    assert send(checked, photo(), expressive="bad words").status_code == 400


@pytest.mark.parametrize("stream", ["false", "true"])
def test_what_is_refused_at_the_door_is_never_derived(
    checked: TestClient, check: Recorder, photo: Photo, stream: str
) -> None:
    check.answer = lambda instruction, where: f"not {instruction}"
    before = checked.get("/stats").json()["mllm"]["work"]["num_items"]
    response = send(checked, photo(), stream=stream)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["code"], error["type"]) == ("content_policy_violation", "invalid_request_error")
    assert "not make it night" in error["message"]
    assert checked.get("/stats").json()["mllm"]["work"]["num_items"] == before


def test_a_result_that_is_refused_is_not_sent(checked: TestClient, check: Recorder, photo: Photo) -> None:
    check.answer = lambda instruction, where: "" if where == "output" else None  # an empty reason is one
    assert send(checked, photo()).json()["error"]["code"] == "content_policy_violation"
    streamed = send(checked, photo(), stream="true", partial_images=3).text
    assert "b64_json" not in streamed
    assert "content_policy_violation" in streamed
    assert check.asked[-1][2] == "output"


@pytest.fixture(params=["raises", "returns"])
def broken(request: pytest.FixtureRequest) -> Callable[[str, str], object]:
    def fails(instruction: str, where: str) -> object:
        if where == "output":
            if request.param == "raises":
                raise ValueError("secret")
            return False
        return None

    return fails


def test_a_check_that_fails_is_a_500_and_never_a_pass(
    checked: TestClient, check: Recorder, photo: Photo, broken: Callable[[str, str], object]
) -> None:
    check.answer = broken
    response = send(checked, photo())
    assert response.status_code == 500
    assert "secret" not in response.text
    assert "b64_json" not in send(checked, photo(), stream="true", partial_images=1).text


def test_a_check_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch, check: SafetyCheck) -> None:
    module = ModuleType("operators_checks")
    module.check, module.text = check, "text"  # type: ignore[attr-defined]
    monkeypatch.setitem(__import__("sys").modules, "operators_checks", module)
    assert load_check("operators_checks:check") is check
    for name in ("operators_checks", "operators_checks:", "no_such_module:check", "operators_checks:other", "a b:c"):
        with pytest.raises(ConfigError, match="must be module:function"):
            load_check(name)
    with pytest.raises(ConfigError, match="cannot be called"):
        load_check("operators_checks:text")
