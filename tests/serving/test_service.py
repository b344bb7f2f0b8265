"""The service on the private cluster of the tests, used through HTTP alone."""

import asyncio
import base64
import http.client
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2
import numpy as np
import openai
import pytest

from mgie.images.files import read_image
from serving.args import ServingArgs
from tests.ray_cluster import HEADERS, KEY
from tests.serving.chaos import kill, processes
from tests.serving.sending import GUARD_S, Edited, edit, of_stage, stats
from tests.waiting import until

if TYPE_CHECKING:
    from tests.ray_cluster import ServiceHost

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(GUARD_S)]

Photo = Callable[..., bytes]
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


def demo_photos(folder: Path) -> list[tuple[bytes, str]]:
    instructions = json.loads((folder / "demo_inputs" / "instructions.json").read_text())
    assert len(instructions) == 10
    return [((folder / "demo_inputs" / name).read_bytes(), text) for name, text in instructions.items()]


def test_ten_photos_keep_their_size_and_the_same_seed_gives_the_same_bytes(service: str, sample_photos: Path) -> None:
    for number, (image, instruction) in enumerate(demo_photos(sample_photos)):
        first = edit(service, image, instruction, seed=1, steps=2)
        assert read_image(first.data).size == read_image(image).size
        if number < 2:
            again, other = (edit(service, image, instruction, seed=seed, steps=2) for seed in (1, 2))
            assert first.data == again.data
            assert first.expressive == again.expressive == other.expressive
            assert (first.pixels != other.pixels).any()


@pytest.mark.parametrize("num_edits", [10, pytest.param(64, marks=pytest.mark.endure)])
def test_concurrent_edits_of_mixed_sizes_equal_those_sent_alone(
    service: str, photo: Photo, num_edits: int, record_property: Callable[[str, object], None]
) -> None:
    # Of a seed that no other test has: what was derived before would come from the cache.
    calls = [
        (photo(*SHAPES[i % 4], seed=1000 * num_edits + i), f"make it {'very ' * (i % 5)}dark", i)
        for i in range(num_edits)
    ]

    def send(call: tuple[bytes, str, int], **extra: Any) -> Edited:
        image, prompt, seed = call
        return edit(service, image, prompt, seed=seed, steps=4 + seed % 3, **extra)

    with ThreadPoolExecutor(len(calls)) as pool:
        together = list(pool.map(send, calls))
    alone = [send(call, deterministic=True) for call in calls]  # derived and rendered again, in batches of one

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
    assert worst <= 2
    assert min(mean_sizes.values()) > 1  # they did share batches


def test_bad_input_gets_an_error_that_names_it_and_harms_nothing(
    service: str, photo: Photo, png_header: Callable[[int, int], bytes]
) -> None:
    before = {stage: of_stage(service, stage)["pid"] for stage in ("mllm", "diffusion")}
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
        (good, {"timeout_s": "1801"}, 400, "timeout_s"),
        (good, {"size": "1x1x1"}, 400, "size"),
        (good, {"seed": "-3"}, 400, "seed"),
        (good, {"steps": "100000"}, 400, "steps"),
        (good, {"model": "other"}, 404, "model"),
        (good, {"colour": "red"}, 400, "colour"),
    ]
    for image, fields, status, param in table:
        response = httpx2.post(
            f"{service}/v1/images/edits",
            files={"image": ("a", image)},
            data={"prompt": "p"} | fields,
            headers=HEADERS,
            timeout=GUARD_S,
        )
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (status, param), (fields, error)
        assert set(error) == {"message", "type", "param", "code"}
        assert len(response.headers.get_list("x-request-id")) == 1
    tokens = edit(service, good, "[IMG0][IMG1] <im_start></s> make it red", seed=1, steps=1)
    assert read_image(tokens.data).size == (96, 64)
    after = {stage: of_stage(service, stage)["pid"] for stage in ("mllm", "diffusion")}
    assert before == after  # no replica was replaced


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(
    "headers", [{}, {"x-request-disconnect-disabled": "?1", "x-request-timeout-seconds": "0"}], ids=["plain", "hostile"]
)
def test_an_edit_whose_client_went_away_leaves_the_engine_within_a_step(
    service: str, photo: Photo, headers: dict[str, str], is_stream: bool
) -> None:
    before = of_stage(service, "diffusion")["work"]
    sent = {"prompt": "p", "expressive": "x", "steps": "1000", "n": "10", "stream": str(is_stream).lower()}
    request = httpx2.Request(
        "POST", f"{service}/v1/images/edits", data=sent, files={"image": photo()}, headers=HEADERS | headers
    )
    connection = http.client.HTTPConnection(request.url.host, request.url.port or 80)
    connection.request("POST", request.url.path, body=request.read(), headers=dict(request.headers))
    if is_stream:
        assert any(line.startswith(b": step") for line in connection.getresponse())
    else:
        until(lambda: of_stage(service, "diffusion")["work"]["num_steps"] > before["num_steps"])
    connection.close()
    after = wait_until_idle(service)
    assert after["num_cancelled"] == before["num_cancelled"] + 1
    assert before["num_steps"] < after["num_steps"] < before["num_steps"] + 1000
    assert after["max_steps_after_end"] <= 1
    assert (after["num_in_flight"], after["num_denoising"], after["num_waiting"]) == (0, 0, 0)
    assert edit(service, photo(), "p", steps=1).details["diffusion"]["mean_batch_size"] == 1


def test_a_stream_ends_with_the_results_of_a_plain_edit(service: str, photo: Photo) -> None:
    client = openai.OpenAI(base_url=f"{service}/v1", api_key=KEY, max_retries=0, timeout=GUARD_S)
    stream = client.images.edit(
        image=("photo", photo()), prompt="p", stream=True, partial_images=1, extra_body={"seed": 5, "steps": 20}
    )
    events = list(stream)
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]
    assert base64.b64decode(events[-1].b64_json) == edit(service, photo(), "p", seed=5, steps=20).data


def test_url_json_and_previous_work_through_any_replica(service: str, photo: Photo) -> None:
    client = openai.OpenAI(base_url=f"{service}/v1", api_key=KEY, max_retries=0, timeout=GUARD_S)
    extra = {"seed": 5, "steps": 2, "deterministic": True}
    for turn in range(2):  # there are two replicas of the ingress
        answer = client.images.edit(
            image=("photo", photo(seed=turn)), prompt="p", n=2, response_format="url", extra_body=extra
        )
        assert answer.data is not None
        first, second = [
            httpx2.get(str(result.url), timeout=GUARD_S).raise_for_status().content for result in answer.data
        ]
        assert first == edit(service, photo(seed=turn), "p", **extra).data
        picture = f"data:image/png;base64,{base64.b64encode(second).decode()}"
        edit_id = answer.model_dump()["mgie"]["id"]
        went_on, sent_again = [
            httpx2.post(
                f"{service}/v1/images/edits", json=extra | {"prompt": "q"} | source, headers=HEADERS, timeout=GUARD_S
            ).json()["data"]
            for source in ({"previous": f"{edit_id}:1"}, {"images": [{"image_url": picture}]})
        ]
        assert went_on == sent_again
    missing = httpx2.post(
        f"{service}/v1/images/edits", json={"prompt": "q", "previous": "unknown"}, headers=HEADERS, timeout=GUARD_S
    )
    assert (missing.status_code, missing.json()["error"]["param"]) == (404, "previous")


def delete(address: str, edit_id: str) -> list[int]:
    """Calls an edit off; the statuses of the answers, of which the last is no 503."""
    statuses: list[int] = []
    while not statuses or statuses[-1] == 503:
        answer = httpx2.delete(f"{address}/v1/images/edits/{edit_id}", headers=HEADERS, timeout=GUARD_S)
        if answer.status_code == 503:
            assert answer.json()["error"]["code"] in {"board_unavailable", "stage_unavailable"}
        statuses.append(answer.status_code)
    return statuses


def test_delete_ends_an_edit_whichever_replica_is_asked(service: str, photo: Photo) -> None:
    before = of_stage(service, "diffusion")["work"]
    names = [f"edit-{i}" for i in range(5)]  # of two replicas: hardly will each delete reach the one that edits

    def send(name: str, running: threading.Event) -> list[str]:
        sent = {"prompt": "p", "expressive": "x", "steps": "1000", "stream": "true"}
        headers = HEADERS | {"x-request-id": name}
        with httpx2.stream(
            "POST", f"{service}/v1/images/edits", data=sent, files={"image": photo()}, headers=headers, timeout=GUARD_S
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
            assert event.wait(GUARD_S)
            *unsure, status = delete(service, name)
            assert status == 204 or (unsure and status == 404)  # 503: it may have been called off all the same
        for name, sent in zip(names, (edit.result() for edit in edits), strict=True):
            assert sent[0] == f": id {name}"
            assert json.loads(sent[-1].removeprefix("data: "))["error"]["code"] == "cancelled"
            assert delete(service, name)[-1] == 404
    after = wait_until_idle(service)
    assert after["num_cancelled"] == before["num_cancelled"] + len(names)
    assert after["max_steps_after_end"] <= 1


def test_an_edit_past_its_deadline_leaves_the_engine(service: str, photo: Photo) -> None:
    before = of_stage(service, "diffusion")["work"]
    sent = {"prompt": "p", "expressive": "x", "steps": "1000", "n": "10"}  # too much for a second of any machine
    for timeout_s in (1, 2, 4, 8, 16, 32, 64, 128):  # until it is enough for a first step on this one
        answer = httpx2.post(
            f"{service}/v1/images/edits",
            data=sent | {"stream": "true", "timeout_s": str(timeout_s)},
            files={"image": photo()},
            headers=HEADERS,
            timeout=GUARD_S,
        )
        assert "deadline_exceeded" in answer.text
        if "\n: step" in answer.text:
            break
    else:
        raise AssertionError("no step was done in any time")
    requests: list[object] = []
    # With its usual two retries, of which it makes none here.
    http_client = openai.DefaultHttpxClient(event_hooks={"request": [requests.append]})
    client = openai.OpenAI(base_url=f"{service}/v1", api_key=KEY, timeout=GUARD_S, http_client=http_client)
    with client, pytest.raises(openai.APIStatusError) as caught:
        client.images.edit(
            image=("photo", photo()), prompt="p", n=10, extra_body={"steps": 1000, "timeout_s": timeout_s}
        )
    assert (caught.value.status_code, caught.value.code) == (504, "deadline_exceeded")
    assert len(requests) == 1
    after = wait_until_idle(service)
    assert after["num_cancelled"] + after["num_overdue"] > before["num_cancelled"] + before["num_overdue"]
    assert (after["num_done"], after["num_waiting"]) == (before["num_done"], 0)
    assert after["max_steps_after_end"] <= 1


def test_a_board_of_cancels_that_dies_harms_no_edit_and_is_replaced(service: str, photo: Photo) -> None:
    until(lambda: len(processes("board")) == 1)
    (board,) = processes("board")
    with ThreadPoolExecutor(1) as pool:
        edited = pool.submit(edit, service, photo(), "p", steps=60)
        asyncio.run(kill("board"))
        assert read_image(edited.result().data).size == (96, 64)
    assert delete(service, "no")[-1] == 404
    assert board.pid not in [process.pid for process in processes("board")]


def test_a_replica_killed_under_an_edit_is_replaced_and_the_same_seed_gives_the_same_bytes(
    service: str, photo: Photo, record_property: Callable[[str, object], None]
) -> None:
    image = photo(150, 100, seed=9)
    before = edit(service, image, "make it night", seed=11, steps=5)
    for stage, prompt, steps, num_edits in (("diffusion", "p", 200, 1), ("mllm", LONG, 1, 8)):
        for attempt in range(5):  # until a kill hits a running call
            # Others each time: equal edits would be derived once.
            photos = [photo(seed=2000 + attempt * num_edits + i) for i in range(num_edits)]
            with ThreadPoolExecutor(num_edits) as pool:
                answers = [pool.submit(edit, service, one, prompt, seed=3, steps=steps) for one in photos]
                pid = pid_at_work(service, stage, answers)
                if pid is not None:
                    asyncio.run(kill(stage))
                edited = [answer.result() for answer in answers]
            num_retries = max(answer.details[stage]["retries"] for answer in edited)
            if num_retries:
                break
        record_property(f"attempts_{stage}", attempt + 1)
        assert num_retries >= 1
        assert of_stage(service, stage)["pid"] != pid
        if stage == "diffusion":
            assert edited[0].data == edit(service, photos[0], prompt, seed=3, steps=steps).data
    after = edit(service, image, "make it night", seed=11, steps=5)
    for stage in ("mllm", "diffusion"):
        assert after.details[stage]["replica"] != before.details[stage]["replica"]
    assert after.expressive == before.expressive
    assert after.data == before.data


def wait_until_idle(address: str) -> dict[str, Any]:
    """Figures of the diffusion stage as soon as it holds no edit."""
    until(lambda: not of_stage(address, "diffusion")["work"]["num_in_flight"])
    work: dict[str, Any] = of_stage(address, "diffusion")["work"]
    return work


def pid_at_work(address: str, stage: str, answers: "Iterable[Future[Edited]]") -> int | None:
    """Process id of the stage's replica as soon as its model runs; None: all answers came before it was seen to."""
    while not all(answer.done() for answer in answers):
        figures = of_stage(address, stage)
        if figures["work"]["num_running" if stage == "mllm" else "num_denoising"]:
            return int(figures["pid"])
    return None


@pytest.mark.endure
def test_many_step_edits_scale_the_diffusion_stage_alone(
    service_host: "ServiceHost", photo: Photo, record_property: Callable[[str, object], None]
) -> None:
    address, image = service_host.serve(AUTOSCALED), photo()

    def load() -> None:
        # The expressive instruction is given, so the MLLM stage has one forward pass to do.
        edit(address, image, "p", expressive="a dark sky", steps=60)

    timeline = scale_up_and_down(address, load, "DiffusionStage", num_clients=12)
    record_property("timeline_many_steps", str(timeline))
    assert {count["MLLMStage"] for _, count in timeline} == {1}


@pytest.mark.endure
def test_long_instructions_scale_the_mllm_stage_alone(
    service_host: "ServiceHost", photo: Photo, record_property: Callable[[str, object], None]
) -> None:
    address, image, numbers = service_host.serve(AUTOSCALED), photo(64, 64), itertools.count()

    def load() -> None:
        edit(address, image, f"{next(numbers)} {LONG}", steps=1)  # equal edits would be derived once

    timeline = scale_up_and_down(address, load, "MLLMStage", num_clients=12)
    record_property("timeline_long_instructions", str(timeline))
    assert {count["DiffusionStage"] for _, count in timeline} == {1}


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
        while True:
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
