"""What is in the logs, and what is not: keys and words of users, whatever happens to their edits."""

import asyncio
import hashlib
import io
import json
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image
from pydantic import BaseModel
from ray._common.formatters import JSONFormatter

from mgie.errors import BundleError
from serving.access.keys import KeyRing
from serving.edits.in_process import InProcessBackend
from serving.errors import RequestError, SafetyCheckError
from serving.stages.diffusion import DiffusionStage
from serving.stages.mllm import MLLMStage
from serving.telemetry.logs import WITHHELD, _Forward, configure_logs, describe_error
from tests.live import api_over

Photo = Callable[..., bytes]
URL = "/v1/images/edits"
KEY, PROMPT, FILE = "mgie-canary-0123456789", "canaryprompt of a very private kind", "canaryfile.png"
CANARIES = ("canary", hashlib.sha256(KEY.encode()).hexdigest())
KEYS = f'[[keys]]\nname = "alice"\nsha256 = "{hashlib.sha256(KEY.encode()).hexdigest()}"\n'


class Log:
    """All that this process logs, as a replica would write it."""

    def __init__(self, *, shows_words: bool = False) -> None:
        self._stream = io.StringIO()
        self._target = logging.Logger("replica", logging.INFO)  # noqa: LOG001  of this test alone
        self._target.propagate = False
        handler = logging.StreamHandler(self._stream)
        handler.setFormatter(JSONFormatter())
        self._target.addHandler(handler)
        configure_logs(self._target, shows_words=shows_words)

    @property
    def text(self) -> str:
        return self._stream.getvalue()

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.text.splitlines()]


@pytest.fixture
def make_log() -> Iterator[Callable[..., Log]]:
    packages, hook = [logging.getLogger(name) for name in ("mgie", "serving")], threading.excepthook
    levels = [package.level for package in packages]
    yield Log
    root = logging.getLogger()
    root.handlers = [handler for handler in root.handlers if not isinstance(handler, _Forward)]
    threading.excepthook = hook
    for package, level in zip(packages, levels, strict=True):
        package.setLevel(level)


@pytest.fixture
def log(make_log: Callable[..., Log]) -> Log:
    return make_log()


def rough_check(picture: Image.Image, instruction: str, *, where: str) -> str | None:
    """An operator's function that fails as careless code does: with the words in its exceptions."""
    if "quote" in instruction:
        raise ValueError(f"cannot judge {instruction!r}")
    return f"no {instruction}" if "refuse" in instruction else None


@pytest.fixture
def client(mllm: MLLMStage, diffusion: DiffusionStage, tmp_path: Path) -> Iterator[TestClient]:
    api = api_over(
        InProcessBackend(mllm, diffusion),
        tmp_path,
        check=rough_check,
        keys=KeyRing(text=KEYS),
    )
    with TestClient(api, raise_server_exceptions=False) as client:
        yield client


def test_neither_key_nor_words_nor_file_names_leave_the_request(
    log: Log, client: TestClient, photo: Photo, tmp_path: Path
) -> None:
    headers = {"authorization": f"Bearer {KEY}"}

    def edit(image: bytes = photo(), **fields: Any) -> Any:
        form = {name: (None, str(value)) for name, value in ({"prompt": PROMPT, "steps": 1} | fields).items()}
        return client.post(URL, files={"image": (FILE, image)} | form, headers=headers)

    bodies = {
        200: [edit(expressive="canary", response_format="url"), edit(user="canary", keep="true")],
        400: [
            edit(prompt=PROMPT * 200), edit(prompt=" "), edit(expressive=PROMPT * 200), edit(steps=0),
            edit(user=PROMPT * 20), edit(prompt="refuse canary"),
            client.post(URL, json={"prompt": [PROMPT], "image": "data:image/png;base64,AAAA"}, headers=headers),
            client.post(URL, json=PROMPT, headers=headers),
            client.post(URL, content=f'{{"prompt": "{PROMPT}', headers=headers | {"content-type": "application/json"}),
        ],
        415: [edit(b"canary"), client.post(URL, data={"prompt": PROMPT}, headers=headers)],
        401: [client.get("/v1/models", headers={"authorization": f"Bearer {KEY}2"}), client.get(f"/{KEY}?k={KEY}")],
        404: [client.get(f"/canary/{KEY}?prompt={PROMPT}", headers=headers)],
        500: [edit(prompt="quote canary")],
    }  # fmt: skip
    for status, answers in bodies.items():
        for answer in answers:
            assert answer.status_code == status, answer.text
            if status not in (200, 400):
                assert "canary" not in answer.text
    for answer in bodies[400][:5] + bodies[400][6:]:  # the check's own reason is for its user to see
        assert "canary" not in answer.text
    stream = edit(stream="true", prompt="quote canary")
    assert "canary" not in stream.text
    assert client.get("/stats", headers=headers).status_code == 200
    assert len(log.lines) > 15
    for canary in CANARIES:
        assert canary not in log.text
    names = [str(path) for path in tmp_path.rglob("*")]
    assert len(names) > 3
    assert not any("canary" in name for name in names)
    errors = [line for line in log.lines if line["levelname"] == "ERROR"]
    assert len(errors) == 2  # the operator does see what went wrong, and where
    assert all("ValueError: " + WITHHELD in line["exc_text"] and "rough_check" in line["exc_text"] for line in errors)


def test_one_line_tells_of_each_request(log: Log, client: TestClient, photo: Photo) -> None:
    headers = {"authorization": f"Bearer {KEY}", "x-request-id": "turn-7"}
    client.post(URL, files={"image": (FILE, photo())}, data={"prompt": "p", "steps": "1"}, headers=headers)
    client.get("/v1/images/files/someid")
    client.get("/v1/models")
    client.get("/nothing", headers=headers)
    lines = [line for line in log.lines if "duration_s" in line]
    told = [(line["method"], line["path"], line["status"], line["key"]) for line in lines]
    assert told == [
        ("POST", URL, 200, "alice"),
        ("GET", "/v1/images/files/{name}", 404, "-"),
        ("GET", "-", 401, "-"),
        ("GET", "-", 404, "alice"),
    ]
    assert lines[0]["request_id"] == "turn-7"
    assert 0 < lines[0]["duration_s"] < 60
    assert "method=POST path=/v1/images/edits status=200" in lines[0]["message"]
    assert "someid" not in log.text


def test_words_are_logged_where_the_operator_wants_them(
    make_log: Callable[..., Log], mllm: MLLMStage, diffusion: DiffusionStage, photo: Photo
) -> None:
    log = make_log(shows_words=True)
    api = api_over(InProcessBackend(mllm, diffusion), check=rough_check, log_prompts=True)
    client = TestClient(api, raise_server_exceptions=False)
    for prompt, status in (("make it night", 200), ("quote canary", 500)):
        answer = client.post(URL, files={"image": photo()}, data={"prompt": prompt, "expressive": "x", "steps": "1"})
        assert answer.status_code == status
    lines = [line for line in log.lines if "duration_s" in line]
    assert [(line["prompt"], line["expressive"]) for line in lines] == [("make it night", "x"), ("quote canary", "x")]
    assert "cannot judge 'quote canary'" in log.text


class Strict(BaseModel):
    number: int


def raised(make: Callable[[], object]) -> Exception:
    try:
        make()
    except Exception as error:  # noqa: BLE001  that is what is looked at
        return error
    raise AssertionError("nothing was raised")


def test_only_errors_that_cannot_quote_a_user_keep_their_words() -> None:
    def chained() -> None:
        try:
            int("canary")
        except ValueError as error:
            raise BundleError("a bundle of ours") from error

    def grouped() -> None:
        raise ExceptionGroup("canary", [ValueError("canary"), BundleError("kept")])

    class RayTaskError(Exception):
        """As Ray makes it: of two classes, its words those of another process."""

    class DualError(RayTaskError, BundleError):
        pass

    withheld: list[Callable[[], object]] = [
        lambda: int(CANARIES[0]),
        lambda: {}[CANARIES[0]],
        lambda: Strict.model_validate({"number": CANARIES[0]}),
    ]
    for make in withheld:
        error = raised(make)
        assert "canary" in str(error)
        assert "canary" not in describe_error(error)
        assert describe_error(error).endswith(f"{type(error).__qualname__}: {WITHHELD}")
    for error in (RequestError("canary"), SafetyCheckError("canary"), DualError("canary"), RuntimeError("canary")):
        assert describe_error(error) == f"{type(error).__qualname__}: {WITHHELD}"
    assert describe_error(BundleError("a folder is missing")) == "BundleError: a folder is missing"
    assert describe_error(OSError(28, "No space left on device")) == "OSError: [Errno 28] No space left on device"
    text = describe_error(raised(chained))
    assert text.index(f"ValueError: {WITHHELD}") < text.index("BundleError: a bundle of ours")
    assert describe_error(raised(grouped)).count(WITHHELD) == 2


def test_exceptions_in_messages_threads_and_lost_tasks_are_covered(log: Log) -> None:
    logger = logging.getLogger("serving.test")
    logger.warning("it says: %s", ValueError(CANARIES[0]))
    logger.warning(ValueError("canary"))
    logging.getLogger("some.library").error("failed", exc_info=ValueError(CANARIES[0]))

    def fail() -> None:
        raise ValueError(CANARIES[0])

    thread = threading.Thread(target=fail, name="worker-1")
    thread.start()
    thread.join()

    async def lose_a_task() -> None:
        async def lost() -> None:
            raise ValueError(CANARIES[0])

        task = asyncio.create_task(lost())
        await asyncio.wait([task])
        del task

    asyncio.run(lose_a_task())
    messages = [line["message"] for line in log.lines]
    assert messages == [
        f"it says: ValueError: {WITHHELD}",
        f"ValueError: {WITHHELD}",
        "failed",
        "thread worker-1 has ended",
        "Task exception was never retrieved",
    ]
    values = [line.get("exc_text", "").splitlines()[-1:] for line in log.lines]
    assert values[2:] == [[f"ValueError: {WITHHELD}"]] * 3
    assert "canary" not in log.text
