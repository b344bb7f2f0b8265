"""Webhooks: what may be called, what is sent, and that it arrives whatever happens on the way."""

import base64
import hashlib
import hmac
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from mgie.errors import ConfigError
from serving.errors import RequestError
from serving.jobs import webhooks
from serving.jobs.record import Webhook
from serving.jobs.webhooks import LONGEST_PAUSE_S, check_url, signed_headers, webhook_settings
from tests.serving.figures import Figures
from tests.serving.jobs.conftest import Replica, Replicas, looked_at_the_line
from tests.waiting import POLL_S, until

pytestmark = pytest.mark.slow

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
GIVE_UP_S = 3000.0


class Receiver:
    """A server that checks and keeps what it gets, and answers as it is told to: 200 when nothing is left."""

    def __init__(self) -> None:
        self.answers: list[int] = []
        self.got: list[tuple[dict[str, str], bytes]] = []
        self.paths: list[str] = []
        self.may_answer = threading.Event()
        self.may_answer.set()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                receiver.paths.append(self.path)
                receiver.got.append(({name.lower(): value for name, value in self.headers.items()}, body))
                status = receiver.answers.pop(0) if receiver.answers else 200
                receiver.may_answer.wait()
                self.send_response(status)
                if status == 302:
                    self.send_header("location", f"http://{receiver.host}/elsewhere")
                self.send_header("content-length", "0")
                self.end_headers()

            def do_GET(self) -> None:  # what a redirect that is followed would end in
                receiver.paths.append(self.path)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.host = f"127.0.0.1:{self._server.server_port}"
        self.url = f"http://{self.host}/hook?token=1"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def wait(self, number: int) -> None:
        until(lambda: len(self.got) >= number)

    def close(self) -> None:
        self.may_answer.set()
        self._server.shutdown()
        self._server.server_close()


def is_signed(headers: dict[str, str], body: bytes) -> bool:
    """As the specification tells a receiver to check."""
    content = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    expected = hmac.new(base64.b64decode(SECRET.removeprefix("whsec_")), content, hashlib.sha256).digest()
    return headers["webhook-signature"] == f"v1,{base64.b64encode(expected).decode()}"


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MGIE_WEBHOOK_SECRET", SECRET)


def allowing(*hosts: str) -> webhooks.WebhookSettings:
    settings = webhook_settings(hosts, secret_file=None, give_up_s=GIVE_UP_S)
    assert settings is not None
    return settings


def pass_pause(replicas: Replicas, job_id: str) -> None:
    """Moves the clock to the next try, as soon as it is noted that the last one has failed."""

    def pause_s() -> float:
        webhook = replicas.jobs().get(job_id).record.webhook
        assert webhook is not None
        return webhook.next_s - replicas.clock.now_s

    until(lambda: pause_s() < webhooks.SEND_TIMEOUT_S)  # for its answer it is waited longer
    replicas.clock.now_s += pause_s()


def webhook_of(replica: Replica, job_id: str, status: str) -> dict[str, Any]:
    while (webhook := replica.job(job_id)["webhook"])["status"] != status:
        assert webhook["status"] == "pending"
        time.sleep(POLL_S)
    return dict(webhook)


# ---- pure


def test_the_signature_is_that_of_the_specifications_example() -> None:
    headers = signed_headers(
        "msg_p5jXN8AQM9LWM0D4loKWxJek",
        b'{"test": 2432232314}',
        secret=base64.b64decode(SECRET.removeprefix("whsec_")),
        now_s=1614265330.9,
    )
    assert headers["webhook-timestamp"] == "1614265330"
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


@pytest.mark.parametrize(
    ("url", "is_allowed"),
    [
        ("https://shop.example/hook", True),
        ("http://shop.example/hook?a=b", True),
        ("https://shop.example:443/", True),
        ("http://SHOP.example:80/", True),
        ("https://shop.example:8443/", False),
        ("http://shop.example:443/", False),
        ("https://other.example:8443/", True),
        ("https://other.example/", False),
        ("http://[::1]:9000/", True),
        ("https://shop.example.evil.example/", False),
        ("https://evil.example/shop.example", False),
        ("https://shop.example@evil.example/", False),
        ("https://me:pw@shop.example/", False),
        ("https://shop.example#x", False),
        ("https://evil.example\\@shop.example/", False),
        ("https://shop.example\n/", False),
        ("https://shop.example:port/", False),
        ("ftp://shop.example/", False),
        ("//shop.example/", False),
        ("shop.example", False),
        ("http://127.0.0.1/", False),
        ("http://169.254.169.254/latest/meta-data", False),
        ("https://sh\u00f6p.example/", False),
    ],
)
def test_only_hosts_that_were_allowed_may_be_called(url: str, is_allowed: bool) -> None:
    settings = allowing("shop.example", "other.example:8443", "[::1]:9000")
    if is_allowed:
        check_url(url, settings)
    else:
        with pytest.raises(RequestError) as caught:
            check_url(url, settings)
        assert caught.value.param == "webhook_url"
    with pytest.raises(RequestError, match="calls no webhooks"):
        check_url(url, None)


@pytest.mark.parametrize("host", ["http://a.example", "a.example/path", "a b", "u@a.example", "", "a.example:", "a:b"])
def test_what_is_no_host_is_refused_at_the_start(host: str) -> None:
    with pytest.raises(ConfigError, match="webhook_hosts has"):
        allowing(host)


def test_a_secret_comes_from_the_file_or_the_environment_and_is_never_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "secret"
    file.write_text(SECRET + "\n")
    monkeypatch.delenv("MGIE_WEBHOOK_SECRET")
    settings = webhook_settings(["a.example"], secret_file=str(file), give_up_s=1.0)
    assert settings is not None
    assert settings.secret == base64.b64decode(SECRET.removeprefix("whsec_"))
    assert webhook_settings([], secret_file=None, give_up_s=1.0) is None
    for content, words in (
        ("", "holds none"),
        ("whsec_canary!", "whsec_ and base64"),
        ("whsec_Y2FuYXJ5", "has 6 bytes"),
    ):
        file.write_text(content)
        with pytest.raises(ConfigError, match=words) as caught:
            webhook_settings(["a.example"], secret_file=str(file), give_up_s=1.0)
        assert "canary" not in str(caught.value)
        assert "Y2FuYXJ5" not in str(caught.value)
    with pytest.raises(ConfigError, match="variable MGIE_WEBHOOK_SECRET holds none"):
        allowing("a.example")
    with pytest.raises(ConfigError, match="cannot be read"):
        webhook_settings(["a.example"], secret_file=str(tmp_path / "none"), give_up_s=1.0)


def test_pauses_grow_to_a_bound_and_end_when_it_is_given_up() -> None:
    webhook, now_s, pauses = Webhook(url="http://a.example"), 0.0, []
    while webhook.status == "pending":
        webhook = webhooks.ended(webhooks.begun(webhook, now_s=now_s), 500, now_s=now_s, give_up_at_s=GIVE_UP_S)
        pauses.append(webhook.next_s - now_s)
        now_s = webhook.next_s
    for tries, pause_s in enumerate(pauses[:-1]):
        assert 0.75 <= pause_s / min(LONGEST_PAUSE_S, 2**tries) <= 1.25
    assert webhook.status == "given_up"
    assert now_s - GIVE_UP_S <= 1.25 * LONGEST_PAUSE_S + webhooks.SEND_TIMEOUT_S


# ---- delivery


@pytest.mark.parametrize("response_format", ["b64_json", "url"])
def test_the_end_of_a_job_is_told_signed_and_without_pictures(
    replicas: Replicas, receiver: Receiver, small: bytes, response_format: str
) -> None:
    here = replicas.open(webhooks=allowing(receiver.host))
    job_id = here.accept(small, webhook_url=receiver.url, response_format=response_format)
    receiver.wait(1)
    assert webhook_of(here, job_id, "delivered") == {"status": "delivered", "tries": 1}
    ((headers, body),) = receiver.got
    assert receiver.paths == ["/hook?token=1"]
    assert is_signed(headers, body)
    assert headers["webhook-id"] == f"msg_{job_id}"
    told, seen = json.loads(body), here.job(job_id)
    (item,) = told["result"]["data"]
    assert set(item) == {"revised_prompt"} | ({"url"} if response_format == "url" else set())
    del seen["webhook"]
    for view in (told, seen):
        del view["result"]["data"]
    assert told == seen
    until(lambda: not replicas.jobs().line())


def test_failures_and_cancels_are_told_too(replicas: Replicas, receiver: Receiver, small: bytes) -> None:
    here = replicas.open(webhooks=allowing(receiver.host))
    job_id = here.accept(small, webhook_url=receiver.url, timeout_s="60", steps="1000")
    here.request("DELETE", f"/v1/edits/{job_id}")
    receiver.wait(1)
    told = json.loads(receiver.got[0][1])
    assert (told["id"], told["status"], told["result"]) == (job_id, "cancelled", None)


def test_a_webhook_is_tried_again_with_the_same_id_until_it_is_taken_and_redirects_are_not_followed(
    replicas: Replicas, receiver: Receiver, small: bytes
) -> None:
    receiver.answers += [500, 302, 404]
    here = replicas.open(webhooks=allowing(receiver.host))
    job_id = here.accept(small, webhook_url=receiver.url)
    for number in range(1, 5):
        receiver.wait(number)
        if number < 4:
            pass_pause(replicas, job_id)
    assert webhook_of(here, job_id, "delivered")["tries"] == 4
    assert set(receiver.paths) == {"/hook?token=1"}
    assert len({headers["webhook-id"] for headers, _ in receiver.got}) == 1
    assert len({body for _, body in receiver.got}) == 1
    assert all(is_signed(headers, body) for headers, body in receiver.got)
    times = [int(headers["webhook-timestamp"]) for headers, _ in receiver.got]
    assert times == sorted(times)
    assert len(set(times)) > 1


def test_a_receiver_that_is_gone_for_good_is_believed(replicas: Replicas, receiver: Receiver, small: bytes) -> None:
    receiver.answers.append(410)
    here = replicas.open(webhooks=allowing(receiver.host))
    job_id = here.accept(small, webhook_url=receiver.url)
    assert webhook_of(here, job_id, "given_up")["tries"] == 1
    replicas.clock.now_s += 60
    until(lambda: not replicas.jobs().line())  # nobody will look at it again
    assert len(receiver.got) == 1


def test_a_receiver_that_never_answers_is_given_up_in_the_end(
    replicas: Replicas, receiver: Receiver, small: bytes
) -> None:
    receiver.answers += [500] * 100
    here = replicas.open(webhooks=allowing(receiver.host))
    job_id = here.accept(small, webhook_url=receiver.url)
    here.wait(job_id, "done")
    while (webhook := replicas.jobs().get(job_id).record.webhook) is not None and webhook.status == "pending":
        replicas.clock.now_s = max(replicas.clock.now_s, webhook.next_s)
        time.sleep(POLL_S)
    assert here.job(job_id)["webhook"]["status"] == "given_up"
    assert 4 <= len(receiver.got) <= 40
    until(lambda: not replicas.jobs().line())


def test_a_replica_that_dies_while_it_calls_is_made_good_by_another_with_the_same_id(
    replicas: Replicas, receiver: Receiver, small: bytes
) -> None:
    receiver.may_answer.clear()
    here = replicas.open(webhooks=allowing(receiver.host))
    job_id = here.accept(small, webhook_url=receiver.url)
    receiver.wait(1)
    here.freeze()
    receiver.may_answer.set()
    there = replicas.open(webhooks=allowing(receiver.host))
    looked_at_the_line()
    assert len(receiver.got) == 1  # the other one may still be at it
    replicas.clock.now_s += webhooks.SEND_TIMEOUT_S + 2 * webhooks.FIRST_PAUSE_S
    assert webhook_of(there, job_id, "delivered")["tries"] == 2
    assert len({headers["webhook-id"] for headers, _ in receiver.got}) == 1


def test_a_death_between_the_end_and_the_call_loses_no_webhook(
    replicas: Replicas, receiver: Receiver, small: bytes
) -> None:
    here = replicas.open(is_at_work=False, webhooks=allowing(receiver.host))
    job_id = here.accept(small, webhook_url=receiver.url)
    here.freeze()
    jobs = replicas.jobs()
    assert jobs.update(jobs.get(job_id), lambda record: record.ended("cancelled", now_s=replicas.clock.now_s))
    replicas.open(webhooks=allowing(receiver.host))
    receiver.wait(1)
    assert json.loads(receiver.got[0][1])["id"] == job_id


def test_several_replicas_call_a_webhook_once(replicas: Replicas, receiver: Receiver, small: bytes) -> None:
    opened = [replicas.open(webhooks=allowing(receiver.host)) for _ in range(3)]
    ids = [opened[i % 3].accept(small, seed=str(i), webhook_url=receiver.url) for i in range(6)]
    for job_id in ids:
        webhook_of(opened[0], job_id, "delivered")
    assert sorted(json.loads(body)["id"] for _, body in receiver.got) == sorted(ids)


def test_calls_of_webhooks_are_counted_by_what_became_of_them(
    replicas: Replicas, small: bytes, receiver: Receiver
) -> None:
    figures = Figures()
    here = replicas.open(meter=figures, webhooks=allowing(receiver.host))
    webhook_of(here, here.accept(small, webhook_url=receiver.url), "delivered")
    until(lambda: figures.tags("webhooks"))  # a moment after it can be read
    here.close()
    accepting = replicas.open(is_at_work=False, webhooks=allowing(receiver.host))
    job_id = accepting.accept(small, webhook_url=receiver.url)
    there = replicas.open(meter=figures)  # a service that no longer calls any
    webhook_of(there, job_id, "given_up")
    until(lambda: len(figures.tags("webhooks")) > 1)
    there.close()
    assert len(receiver.got) == 1
    assert figures.tags("webhooks") == [{"status": "delivered"}, {"status": "given_up"}]
