"""What the stages tell of themselves: their health, their figures, their work, their spans."""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from mgie.errors import ConfigError, PromptError
from serving.api.middleware import RecordMiddleware
from serving.api.routes import EDITS_PATH
from serving.edits.in_process import InProcessBackend
from serving.stages.diffusion import DiffusionStage
from serving.stages.health import Monitoring
from serving.stages.mllm import MLLMStage
from serving.telemetry.tracing import NO_SPANS, Spans, open_spans
from tests.live import api_over
from tests.serving.asking import ask
from tests.serving.figures import Figures

pytestmark = pytest.mark.slow

Photo = Callable[..., bytes]


@pytest.fixture
def figures() -> Figures:
    return Figures()


@pytest.fixture
def watched(random_bundle: Path, figures: Figures) -> Iterator[tuple[MLLMStage, DiffusionStage]]:
    monitoring = Monitoring(meter=figures)
    stages = (
        MLLMStage(str(random_bundle), device="cpu", monitoring=monitoring),
        DiffusionStage(str(random_bundle), device="cpu", monitoring=monitoring),
    )
    yield stages
    for stage in stages:
        stage.close()


class Stuck:
    """Stands in front of a model, and stops it while it is not open."""

    def __init__(self, model: Callable[..., Any]) -> None:
        self._model, self._open = model, threading.Event()
        self.num_calls = 0

    def __call__(self, *args: Any, **given: Any) -> Any:
        self.num_calls += 1
        assert self._open.wait()
        return self._model(*args, **given)

    def open(self) -> None:
        self._open.set()


@pytest.mark.parametrize("kind", [MLLMStage, DiffusionStage])
def test_a_model_that_hangs_is_unhealthy_until_it_works_again(
    random_bundle: Path, kind: type[MLLMStage | DiffusionStage]
) -> None:
    stage: Any = kind(str(random_bundle), device="cpu", monitoring=Monitoring(probe_period_s=1e-6, probe_timeout_s=0.5))
    [model] = stage._pool.models().values()
    owner, name = (model, "derive") if kind is MLLMStage else (model.renderer, "denoiser")
    stuck = Stuck(getattr(owner, name))
    setattr(owner, name, stuck)

    async def main() -> None:
        with pytest.raises(RuntimeError, match=r"not done within 0\.5 s"):
            await stage.check_health()
        with pytest.raises(RuntimeError, match="done nothing since"):
            await stage.check_health()
        stuck.open()
        while True:  # what hung goes on by itself
            with contextlib.suppress(RuntimeError):
                return await stage.check_health()
            await asyncio.sleep(0.01)

    asyncio.run(main())
    assert stuck.num_calls >= 1
    stage.close()


def test_the_first_check_warms_both_stages_up_and_counts_as_no_edit(
    watched: tuple[MLLMStage, DiffusionStage], figures: Figures
) -> None:
    mllm, diffusion = watched

    async def main() -> tuple[Any, Any]:
        for stage in (mllm, diffusion, mllm, diffusion):
            await stage.check_health()
        return (await mllm.stats()).work, (await diffusion.stats()).work

    derived, rendered = asyncio.run(main())
    assert (derived.num_batches, rendered.num_steps) == (1, 1)  # the second checks needed no probe
    assert (rendered.num_done, rendered.work_done) == (0, 0)
    assert figures.of("derive_seconds") == []


def test_the_stages_tell_what_an_edit_took(
    watched: tuple[MLLMStage, DiffusionStage], figures: Figures, photo: Photo
) -> None:
    mllm, diffusion = watched

    async def main() -> list[dict[str, float]]:
        for _ in range(2):
            derived = await mllm.derive(photo(), ask("p"))
        await diffusion.render(photo(), derived, ask(n=2, overrides={"steps": 5}))
        return [await stage.record_autoscaling_stats() for stage in watched]

    tokens, pixel_steps = asyncio.run(main())
    for stage in watched:
        stage.close()  # the sampler looks a last time
    assert len(figures.of("derive_seconds")) == 1  # the second came from the cache
    assert len(figures.of("queue_seconds")) == 2
    assert len(figures.of("step_seconds")) == 5
    assert figures.of("step_rows") == [6.0] * 5
    assert sum(figures.of("steps")) == 5
    assert [tags["result"] for tags in figures.tags("cache_requests")].count("hit") == 1
    assert set(figures.of("loaded_bundles")) == {1}
    assert all(work["left"] == 0 and work["taken"] > 0 and work["rate"] > 0 for work in (tokens, pixel_steps))
    assert pixel_steps["taken"] % (5 * 2 * 3) == 0
    assert max(figures.of("work_rate")) == max(tokens["rate"], pixel_steps["rate"])


def test_work_that_was_called_off_is_left_no_longer(watched: tuple[MLLMStage, DiffusionStage], photo: Photo) -> None:
    mllm, diffusion = watched

    async def main() -> None:
        derived = await mllm.derive(photo(), ask("p"))
        long = ask(overrides={"steps": 1000})
        tasks = [
            asyncio.create_task(mllm.derive(photo(seed=1), ask("make it much darker"))),
            asyncio.create_task(diffusion.render(photo(), derived, long)),
        ]
        for stage in watched:
            while not (await stage.record_autoscaling_stats())["left"]:  # noqa: ASYNC110  no stage tells of it
                await asyncio.sleep(0.001)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        for stage in watched:
            assert (await stage.record_autoscaling_stats())["left"] == 0

    asyncio.run(main())


@pytest.fixture
def counted(mllm: MLLMStage, diffusion: DiffusionStage, figures: Figures) -> TestClient:
    api = api_over(InProcessBackend(mllm, diffusion), meter=figures)
    return TestClient(api, raise_server_exceptions=False)


def test_answers_are_counted_by_what_the_client_was_told(counted: TestClient, figures: Figures, photo: Photo) -> None:
    good = {"prompt": "p", "steps": "1"}
    for fields, image in (
        (good, photo()),
        (good | {"stream": "true"}, photo()),
        (good | {"steps": "0"}, photo()),
        (good, b"no image"),
        (good | {"stream": "true", "timeout_s": "0.001"}, photo()),
    ):
        counted.post(EDITS_PATH, files={"image": ("a", image)}, data=fields)
    counted.get("/healthz")
    counted.get("/v1/models")
    assert [(tags["status"], tags["code"]) for tags in figures.tags("edits")] == [
        ("200", "ok"),
        ("200", "ok"),
        ("400", "invalid_value"),
        ("415", "invalid_image"),
        ("504", "deadline_exceeded"),
    ]
    assert [tags["status"] for tags in figures.tags("edit_seconds")] == ["200", "200", "400", "415", "504"]
    assert all(value > 0 for value in figures.of("edit_seconds"))


def test_an_error_inside_a_stream_is_counted_as_one(figures: Figures) -> None:
    assert told(figures, [(200, [b": step 1/2\n\n", b'data: {"error": {"code": "cancelled"}}\n\n'])]) == [
        ("200", "cancelled")
    ]


def test_a_client_that_goes_away_is_counted_as_gone(figures: Figures) -> None:
    assert told(figures, [(200, [b": step 1/2\n\n"]), (None, [])]) == [("499", "client_gone")] * 2


def told(figures: Figures, answers: list[tuple[int | None, list[bytes]]]) -> list[tuple[str, str]]:
    """What is counted of answers: a status and the parts of a body, of which the last is sent only of errors."""

    async def main() -> None:
        for status, parts in answers:

            async def app(scope: Any, receive: Any, send: Any, status: Any = status, parts: Any = parts) -> None:
                if status is None:
                    return
                await send({"type": "http.response.start", "status": status, "headers": []})
                for part in parts:
                    await send({"type": "http.response.body", "body": part, "more_body": True})

            async def nothing(*_: Any) -> None:
                pass

            scope = {"type": "http", "path": EDITS_PATH, "method": "POST"}
            await RecordMiddleware(app, meter=figures, edits_path=EDITS_PATH)(scope, nothing, nothing)

    asyncio.run(main())
    return [(tags["status"], tags["code"]) for tags in figures.tags("edits")]


def test_a_trace_goes_from_the_client_through_the_ingress_to_both_stages(
    watched: tuple[MLLMStage, DiffusionStage], photo: Photo
) -> None:
    exporter = InMemorySpanExporter()
    spans = Spans(exporter, service="test")
    for stage in watched:
        stage._spans = spans
    api = api_over(InProcessBackend(*watched), spans=spans)
    client = TestClient(api, raise_server_exceptions=False)
    trace_id, parent_id = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    secret = "the secret words"
    for fields in ({"steps": "2"}, {"steps": "2", "stream": "true"}, {"steps": "2", "mask": "x"}):
        client.post(
            EDITS_PATH,
            files={"image": ("a", photo())},
            data={"prompt": secret} | fields,
            headers={"traceparent": f"00-{trace_id}-{parent_id}-01"},
        )
    with pytest.raises(PromptError):
        asyncio.run(watched[0].derive(photo(), ask(" ", trace={"traceparent": f"00-{trace_id}-{parent_id}-01"})))
    spans.flush()
    done = exporter.get_finished_spans()
    assert sorted(span.name for span in done) == ["derive"] * 3 + ["edit"] * 2 + ["render"] * 2
    assert {format(span.context.trace_id, "032x") for span in done} == {trace_id}
    edits = {span.context.span_id for span in done if span.name == "edit"}
    assert {format(span.parent.span_id, "016x") for span in done if span.name == "edit"} == {parent_id}
    assert {span.parent.span_id for span in done if span.name == "render"} == edits
    assert {span.attributes["mgie.num_steps"] for span in done if span.name == "render"} == {2}
    assert all(span.attributes["mgie.denoise_s"] > 0 for span in done if span.name == "render")
    failed = [span.status.description for span in done if not span.status.is_ok]
    assert failed == ["PromptError"]
    assert secret not in "".join(span.to_json() for span in done)


def test_without_tracing_a_trace_is_passed_on_as_it_came() -> None:
    with NO_SPANS.span("edit", {"traceparent": "x"}) as span:
        span.record(num=1)
        assert span.trace == {"traceparent": "x"}


def test_a_target_of_spans_that_is_none_is_refused() -> None:
    assert open_spans(None, service="") is NO_SPANS
    with pytest.raises(ConfigError, match="tracing is 'jaeger:4317'; it must be 'console' or an http"):
        open_spans("jaeger:4317", service="")
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")  # of the extra `tracing`
    for target in ("console", "http://127.0.0.1:1/v1/traces"):
        assert open_spans(target, service="test") is not NO_SPANS
