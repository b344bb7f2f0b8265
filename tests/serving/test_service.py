"""The service on a private local cluster of two CPUs, used through HTTP alone.

The tests run in the order of this file: first one replica of each stage, then (fixture `autoscaled`) a second
deployment with short autoscaling delays.
"""

import base64
import contextlib
import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
from ray import serve

from mgie.images import read_image
from serving.app import app
from serving.args import ServingArgs
from serving.demo import free_port, local_service
from tests.serving.chaos import processes

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(240)]

Photo = Callable[..., bytes]
ONE_REPLICA = ServingArgs(
    bundle="random",
    device="cpu",
    mllm_max_replicas=1,
    diffusion_max_replicas=1,
    ingress_replicas=2,
    mllm_cache_bytes=0,
    max_steps=1000,
    health_check_period_s=1,
)
AUTOSCALED = ServingArgs(
    bundle="random",
    device="cpu",
    mllm_clear_s=1,
    diffusion_clear_s=1,
    mllm_max_batch_size=4,  # so that the derivations of 12 clients do not all end at once and pile up behind
    upscale_delay_s=4,  # longer than the first derivations of 12 clients take on a busy machine
    downscale_delay_s=2,
    look_back_period_s=2,
    metrics_interval_s=0.5,
)
# Worked at in 128x128, 160x112 and the like: four shapes of photo, four sizes of latents.
SHAPES = ((96, 96), (120, 80), (80, 120), (160, 64))
LONG = "make the sky over the lake a little darker, " * 80  # 3520 characters


@dataclass(frozen=True)
class Edited:
    """One answer."""

    data: bytes
    expressive: str
    details: dict[str, Any]

    @property
    def pixels(self) -> np.ndarray:
        return np.asarray(read_image(self.data)).astype(int)


def edit(address: str, image: bytes, prompt: str, **extra: Any) -> Edited:
    """Sends one edit with the official client, without its retries."""
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="unused", max_retries=0, timeout=120)
    answer = client.images.edit(image=("photo", image), prompt=prompt, extra_body=extra).model_dump()
    (result,) = answer["data"]
    return Edited(base64.b64decode(result["b64_json"]), result["revised_prompt"], answer["mgie"])


def stats(address: str) -> dict[str, Any]:
    body: dict[str, Any] = httpx2.get(f"{address}/stats", timeout=30).raise_for_status().json()
    return body


def demo_photos(folder: Path) -> list[tuple[bytes, str]]:
    instructions = json.loads((folder / "demo_inputs" / "instructions.json").read_text())
    assert len(instructions) == 10
    return [((folder / "demo_inputs" / name).read_bytes(), text) for name, text in instructions.items()]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with local_service(ONE_REPLICA, port=free_port(prefer_usual=False), num_cpus=2) as address:
        assert httpx2.get(f"{address}/readyz", timeout=30).json() == {"status": "ready"}
        yield address


def test_ten_photos_keep_their_size_and_the_same_seed_gives_the_same_bytes(address: str, sample_photos: Path) -> None:
    for image, instruction in demo_photos(sample_photos):
        first, again, other = (edit(address, image, instruction, seed=seed, steps=3) for seed in (1, 1, 2))
        assert read_image(first.data).size == read_image(image).size
        assert first.data == again.data
        assert first.expressive == again.expressive == other.expressive
        assert (first.pixels != other.pixels).any()


def test_64_concurrent_edits_of_mixed_sizes_equal_those_sent_alone(
    address: str, photo: Photo, record_property: Callable[[str, object], None]
) -> None:
    calls = [(photo(*SHAPES[i % 4], seed=i), f"make it {'very ' * (i % 5)}dark", i) for i in range(64)]

    def send(call: tuple[bytes, str, int]) -> Edited:
        image, prompt, seed = call
        return edit(address, image, prompt, seed=seed, steps=4 + seed % 3)

    started = time.monotonic()
    with ThreadPoolExecutor(len(calls)) as pool:
        together = list(pool.map(send, calls))
    together_s = time.monotonic() - started
    started = time.monotonic()
    alone = [send(call) for call in calls]
    alone_s = time.monotonic() - started

    places = [e.details["mllm"] for e in together]
    batches = {(place["replica"], place["batch"]): place["size"] for place in places}
    assert sum(batches.values()) == len(calls)  # every batch is known whole: nobody else was served
    mean_sizes = {
        "mllm": len(calls) / len(batches),
        "diffusion": np.mean([e.details["diffusion"]["mean_batch_size"] for e in together]),
    }
    record_property("mean_batch_sizes", str(mean_sizes))
    assert all(e.details["mllm"]["size"] == e.details["diffusion"]["mean_batch_size"] == 1 for e in alone)
    worst = 0
    for one, other in zip(together, alone, strict=True):
        assert one.expressive == other.expressive
        worst = max(worst, int(np.abs(one.pixels - other.pixels).max()))
    record_property("worst_difference", worst)
    record_property("seconds_together", together_s)
    record_property("seconds_alone", alone_s)
    assert worst <= 2
    assert min(mean_sizes.values()) > 2


def test_bad_input_gets_an_error_that_names_it_and_harms_nothing(
    address: str, photo: Photo, png_header: Callable[[int, int], bytes]
) -> None:
    before = {stage: stats(address)[stage]["pid"] for stage in ("mllm", "diffusion")}
    good = photo()
    table: list[tuple[bytes, dict[str, str], int, str | None]] = [
        (b"", {}, 415, "image"),
        (photo(file_type="JPEG")[:300], {}, 415, "image"),
        (png_header(60_000, 60_000), {}, 413, "image"),
        (b"%PDF-1.7 ...", {}, 415, "image"),
        (bytes(22 * 2**20), {}, 413, None),
        (good, {"prompt": "p" * 20_000}, 400, "prompt"),
        (good, {"prompt": " "}, 400, "prompt"),
        (good, {"n": "0"}, 400, "n"),
        (good, {"n": "11"}, 400, "n"),
        (good, {"timeout_s": "301"}, 400, "timeout_s"),
        (good, {"size": "1x1x1"}, 400, "size"),
        (good, {"seed": "-3"}, 400, "seed"),
        (good, {"steps": "100000"}, 400, "steps"),
        (good, {"model": "other"}, 404, "model"),
        (good, {"colour": "red"}, 400, "colour"),
    ]
    for image, fields, status, param in table:
        response = httpx2.post(
            f"{address}/v1/images/edits", files={"image": ("a", image)}, data={"prompt": "p"} | fields, timeout=60
        )
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (status, param), (fields, error)
        assert set(error) == {"message", "type", "param", "code"}
        assert len(response.headers.get_list("x-request-id")) == 1
    tokens = edit(address, good, "[IMG0][IMG1] <im_start></s> make it red", seed=1, steps=1)
    assert read_image(tokens.data).size == (96, 64)
    after = {stage: stats(address)[stage]["pid"] for stage in ("mllm", "diffusion")}
    assert before == after  # no replica was replaced


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(
    "headers", [{}, {"x-request-disconnect-disabled": "?1", "x-request-timeout-seconds": "0"}], ids=["plain", "hostile"]
)
def test_an_edit_whose_client_went_away_leaves_the_engine_within_a_step(
    address: str, photo: Photo, headers: dict[str, str], is_stream: bool
) -> None:
    before = stats(address)["diffusion"]["work"]
    sent = {"prompt": "p", "expressive": "x", "steps": "1000", "n": "4", "stream": str(is_stream).lower()}
    with httpx2.Client(timeout=60 if is_stream else 6, headers=headers) as client:
        request = client.build_request("POST", f"{address}/v1/images/edits", data=sent, files={"image": photo()})
        if is_stream:
            response = client.send(request, stream=True)
            assert any(line.startswith(": step") for line in response.iter_lines())
            response.close()
        else:
            with pytest.raises(httpx2.ReadTimeout):  # closes the connection
                client.send(request)
    after = wait_until_idle(address)
    assert after["num_cancelled"] == before["num_cancelled"] + 1
    assert before["num_steps"] < after["num_steps"] < before["num_steps"] + 1000
    assert after["max_steps_after_end"] <= 1
    assert (after["num_in_flight"], after["num_denoising"], after["num_waiting"]) == (0, 0, 0)
    assert edit(address, photo(), "p", steps=1).details["diffusion"]["mean_batch_size"] == 1


def test_a_stream_ends_with_the_results_of_a_plain_edit(address: str, photo: Photo) -> None:
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="unused", max_retries=0, timeout=120)
    stream = client.images.edit(
        image=("photo", photo()), prompt="p", stream=True, partial_images=1, extra_body={"seed": 5, "steps": 20}
    )
    events = list(stream)
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]
    assert base64.b64decode(events[-1].b64_json) == edit(address, photo(), "p", seed=5, steps=20).data


def test_url_json_and_previous_work_through_any_replica(address: str, photo: Photo) -> None:
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="unused", max_retries=0, timeout=120)
    extra = {"seed": 5, "steps": 2, "deterministic": True}
    for turn in range(4):  # there are two replicas of the ingress
        answer = client.images.edit(
            image=("photo", photo(seed=turn)), prompt="p", n=2, response_format="url", extra_body=extra
        )
        assert answer.data is not None
        first, second = [httpx2.get(str(result.url), timeout=30).raise_for_status().content for result in answer.data]
        assert first == edit(address, photo(seed=turn), "p", **extra).data
        picture = f"data:image/png;base64,{base64.b64encode(second).decode()}"
        edit_id = answer.model_dump()["mgie"]["id"]
        went_on, sent_again = [
            httpx2.post(f"{address}/v1/images/edits", json=extra | {"prompt": "q"} | source, timeout=60).json()["data"]
            for source in ({"previous": f"{edit_id}:1"}, {"images": [{"image_url": picture}]})
        ]
        assert went_on == sent_again
    missing = httpx2.post(f"{address}/v1/images/edits", json={"prompt": "q", "previous": "unknown"}, timeout=60)
    assert (missing.status_code, missing.json()["error"]["param"]) == (404, "previous")


def test_delete_ends_an_edit_whichever_replica_is_asked(address: str, photo: Photo) -> None:
    before = stats(address)["diffusion"]["work"]
    names = [f"edit-{i}" for i in range(8)]  # of two replicas: hardly will each delete reach the one that edits

    def send(name: str, running: threading.Event) -> list[str]:
        sent = {"prompt": "p", "expressive": "x", "steps": "1000", "stream": "true"}
        headers = {"x-request-id": name}
        with httpx2.stream(
            "POST", f"{address}/v1/images/edits", data=sent, files={"image": photo()}, headers=headers, timeout=120
        ) as response:
            lines = []
            for line in response.iter_lines():
                lines.append(line)
                if line.startswith(": step"):
                    running.set()
        return [line for line in lines if line]

    with ThreadPoolExecutor(len(names)) as pool:
        running = [threading.Event() for _ in names]
        edits = [pool.submit(send, name, event) for name, event in zip(names, running, strict=True)]
        for name, event in zip(names, running, strict=True):
            assert event.wait(120)
            assert httpx2.delete(f"{address}/v1/images/edits/{name}", timeout=30).status_code == 204
        for name, sent in zip(names, (edit.result() for edit in edits), strict=True):
            assert sent[0] == f": id {name}"
            assert json.loads(sent[-1].removeprefix("data: "))["error"]["code"] == "cancelled"
            assert httpx2.delete(f"{address}/v1/images/edits/{name}", timeout=30).status_code == 404
    after = wait_until_idle(address)
    assert after["num_cancelled"] == before["num_cancelled"] + len(names)
    assert after["max_steps_after_end"] <= 1


def test_a_board_of_cancels_that_dies_harms_no_edit_and_is_replaced(address: str, photo: Photo) -> None:
    boards = processes("board")
    assert len(boards) == 1
    with ThreadPoolExecutor(1) as pool:
        edited = pool.submit(edit, address, photo(), "p", steps=60)
        boards[0].kill()
        assert read_image(edited.result().data).size == (96, 64)
    deadline = time.monotonic() + 120
    while (answer := httpx2.delete(f"{address}/v1/images/edits/no", timeout=30)).status_code == 503:
        assert answer.json()["error"]["code"] in {"board_unavailable", "stage_unavailable"}
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert answer.status_code == 404


def test_a_replica_killed_under_an_edit_is_replaced_and_the_edit_answered(
    address: str, photo: Photo, record_property: Callable[[str, object], None]
) -> None:
    undisturbed = {
        stage: edit(address, photo(), "p", seed=3, steps=200 if stage == "diffusion" else 1)
        for stage in ("mllm", "diffusion")
    }
    for stage in ("diffusion", "mllm"):
        prompt, steps, num_edits = ("p", 200, 1) if stage == "diffusion" else (LONG, 1, 8)
        with ThreadPoolExecutor(num_edits) as pool:
            photos = [photo(seed=i) for i in range(num_edits)]  # equal edits would be derived once
            answers = [pool.submit(edit, address, image, prompt, seed=3, steps=steps) for image in photos]
            pid = wait_until_running(address, stage)
            os.kill(pid, signal.SIGKILL)
            killed = time.monotonic()
            assert is_gone(pid)
            edited = [answer.result() for answer in answers]
        record_property(f"seconds_from_kill_to_answer_{stage}", time.monotonic() - killed)
        assert max(answer.details[stage]["retries"] for answer in edited) >= 1  # the kill hit a running call
        assert stats(address)[stage]["pid"] != pid
        if stage == "diffusion":
            assert edited[0].data == undisturbed[stage].data


def wait_until_idle(address: str) -> dict[str, Any]:
    """Figures of the diffusion stage as soon as it holds no edit, or after ten seconds."""
    deadline = time.monotonic() + 10
    while (work := stats(address)["diffusion"]["work"])["num_in_flight"] and time.monotonic() < deadline:
        time.sleep(0.05)
    figures: dict[str, Any] = work
    return figures


def wait_until_running(address: str, stage: str) -> int:
    """Process id of the stage's replica as soon as its model runs."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        figures = stats(address)[stage]
        if figures["work"]["num_running" if stage == "mllm" else "num_denoising"]:
            return int(figures["pid"])
    raise AssertionError(f"{stage} never ran")


def is_gone(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError):
            if "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text():
                return True
            time.sleep(0.05)
            continue
        return True
    return False


@dataclass(frozen=True)
class Redeployed:
    """The second deployment, and what the first one answered just before it ended."""

    address: str
    before: Edited
    image: bytes


@pytest.fixture(scope="module")
def autoscaled(address: str, photo: Photo) -> Redeployed:
    image = photo(150, 100, seed=9)
    before = edit(address, image, "make it night", seed=11, steps=5)
    serve.delete("mgie")
    serve.run(app(AUTOSCALED), name="mgie")
    return Redeployed(address, before, image)


def test_the_same_seed_gives_the_same_bytes_after_a_restart(autoscaled: Redeployed) -> None:
    after = edit(autoscaled.address, autoscaled.image, "make it night", seed=11, steps=5)
    for stage in ("mllm", "diffusion"):
        assert after.details[stage]["replica"] != autoscaled.before.details[stage]["replica"]
    assert after.expressive == autoscaled.before.expressive
    assert after.data == autoscaled.before.data


def test_many_step_edits_scale_the_diffusion_stage_alone(
    autoscaled: Redeployed, photo: Photo, record_property: Callable[[str, object], None]
) -> None:
    image = photo()

    def load() -> None:
        # The expressive instruction is given, so the MLLM stage has one forward pass to do.
        edit(autoscaled.address, image, "p", expressive="a dark sky", steps=60)

    timeline = scale_up_and_down(autoscaled.address, load, "DiffusionStage", num_clients=12)
    record_property("timeline_many_steps", str(timeline))
    assert {count["MLLMStage"] for _, count in timeline} == {1}


def test_long_instructions_scale_the_mllm_stage_alone(
    autoscaled: Redeployed, photo: Photo, record_property: Callable[[str, object], None]
) -> None:
    image, numbers = photo(64, 64), itertools.count()

    def load() -> None:
        edit(autoscaled.address, image, f"{next(numbers)} {LONG}", steps=1)  # equal edits would be derived once

    timeline = scale_up_and_down(autoscaled.address, load, "MLLMStage", num_clients=12)
    record_property("timeline_long_instructions", str(timeline))
    assert {count["DiffusionStage"] for _, count in timeline} == {1}


def test_an_edit_past_its_deadline_leaves_the_engine(address: str, photo: Photo) -> None:
    serve.delete("mgie")
    serve.run(app(ONE_REPLICA.model_copy(update={"timeout_s": 2.0})), name="mgie")
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="unused", timeout=60)  # with its usual two retries

    def send(image: bytes) -> openai.APIStatusError:
        with pytest.raises(openai.APIStatusError) as caught:
            client.images.edit(image=("photo", image), prompt="p", extra_body={"steps": 1000})
        return caught.value

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(send, photo(96, 96))
        wait_until_running(address, "diffusion")
        waiting = send(photo(64, 160))
        answers = [running.result(), waiting]
    assert [(answer.status_code, answer.code) for answer in answers] == [(504, "deadline_exceeded")] * 2
    work = stats(address)["diffusion"]["work"]
    # Two edits, although the client would have retried both twice.
    assert work["num_cancelled"] + work["num_overdue"] == 2
    assert (work["num_done"], work["num_in_flight"], work["num_waiting"]) == (0, 0, 0)


def test_two_bundles_are_served_each_by_the_replicas_that_have_it_in_memory(
    address: str, photo: Photo, random_bundle: Path, renamed_bundle: Path
) -> None:
    serve.delete("mgie")
    args = ONE_REPLICA.model_copy(
        update={"bundle": str(random_bundle), "bundles": (str(renamed_bundle),), "max_loaded": 1}
        | {f"{stage}_{bound}_replicas": 2 for stage in ("mllm", "diffusion") for bound in ("min", "max")}
    )
    serve.run(app(args), name="mgie")
    models = httpx2.get(f"{address}/v1/models", timeout=30).json()["data"]
    names = [model["id"] for model in models]
    assert names[1] == "renamed"

    def send(number: int) -> Edited:
        return edit(address, photo(seed=number), "p", model=names[number % 2], seed=1, steps=2)

    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(send, range(18)))
    for number, edited in enumerate(together):
        assert edited.details["model"] == names[number % 2]
        assert edited.details["bundle"] == models[number % 2]["mgie"]["bundle"]
    for number in range(4):  # each replica now gets a bundle of its own
        send(number)
        time.sleep(1)
    alone = [send(number) for number in range(12)]
    for stage in ("mllm", "diffusion"):
        first, second = ({one.details[stage]["replica"] for one in alone[number::2]} for number in (0, 1))
        assert len(first) == len(second) == 1
        assert first != second
    for one, other in zip(together, alone, strict=False):
        assert np.abs(one.pixels - other.pixels).max() <= 2


def scale_up_and_down(
    address: str, load: Callable[[], None], stage: str, *, num_clients: int
) -> list[tuple[float, dict[str, int]]]:
    """Keeps `num_clients` edits open until `stage` has two running replicas, then none until it has one.

    Returns:
        Seconds and replicas (running or starting) by deployment, one entry per change.
    """
    stop = threading.Event()
    timeline: list[tuple[float, dict[str, int]]] = []
    started = time.monotonic()

    def client(number: int) -> int:
        time.sleep(0.3 * number)  # a burst at once would be load of both stages
        num_edits = 0
        while not stop.is_set():
            load()
            num_edits += 1
        return num_edits

    def observe_until(num_running: int) -> None:
        while time.monotonic() - started < 150:
            replicas = stats(address)["replicas"]
            count = {
                name: states.get("RUNNING", 0) + states.get("STARTING", 0)
                for name, states in replicas.items()
                if name != "Ingress"
            }
            if not timeline or timeline[-1][1] != count:
                timeline.append((round(time.monotonic() - started, 1), count))
            if replicas[stage].get("RUNNING", 0) == num_running and count[stage] == num_running:
                return
            time.sleep(0.25)
        raise AssertionError(f"{stage} never had {num_running} running replicas: {timeline}")

    observe_until(1)
    with ThreadPoolExecutor(num_clients) as pool:
        clients = [pool.submit(client, number) for number in range(num_clients)]
        try:
            observe_until(2)
        finally:
            stop.set()
        assert sum(answer.result() for answer in clients) > 0
    observe_until(1)
    counts = [count[stage] for _, count in timeline]
    assert counts[0] == counts[-1] == 1
    assert max(counts) == 2
    return timeline
