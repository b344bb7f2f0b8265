"""The engine around the real denoiser, which a gate lets pass step by step: nothing here depends on how fast it runs."""

import asyncio
import copy
import gc
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mgie.bundle.bundle import Bundle
from mgie.config import EditSettings
from mgie.engine.engine import Engine
from mgie.engine.handle import Done, EditHandle, Failed, Started, StepDone, Stepped
from mgie.errors import ClosedError, ConfigError, DeadlineError, EngineFullError, ImageError, RenderError
from mgie.inference.conditioner import EditCondition
from mgie.inference.renderer import Renderer, RenderRequest
from mgie.model.guidance import Denoiser
from mgie.model.sampler import SampleState

pytestmark = pytest.mark.slow

WAIT_S = 300  # until a test gives up; nothing takes that long
POISON = 1e4  # a condition with this value makes the denoiser below raise


class Gate:
    """The real denoiser, which waits for a permit before each step and can be made to fail."""

    def __init__(self, denoiser: Denoiser, *, is_open: bool = False) -> None:
        self._denoiser, self._permits, self._entered = denoiser, threading.Semaphore(0), threading.Semaphore(0)
        self.is_open, self.max_rows = is_open, 10**6
        self.calls: list[tuple[int, int, int]] = []  # rows, height, width

    def __call__(self, latents: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        self.calls.append((len(latents), *latents.shape[2:]))
        self._entered.release()
        if not self.is_open:
            assert self._permits.acquire(timeout=WAIT_S)
        if len(latents) > self.max_rows:
            raise torch.OutOfMemoryError("no room")
        if (condition == POISON).any():
            raise ValueError("poisoned")
        return self._denoiser(latents, timesteps, condition)

    def await_call(self) -> None:
        """Until the next call has begun; each call counts once."""
        assert self._entered.acquire(timeout=WAIT_S)

    def let(self, num: int = 1) -> None:
        self._permits.release(num)

    def open(self) -> None:
        self.is_open = True
        self._permits.release(10**6)


class Hold:
    """Wraps a method of the renderer so that its calls wait until they are let go."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self._method, self.entered, self._let = method, threading.Event(), threading.Event()
        self.num_calls = 0

    def __call__(self, *args: Any) -> Any:
        self.num_calls += 1
        self.entered.set()
        assert self._let.wait(WAIT_S)
        return self._method(*args)

    def let(self) -> None:
        self._let.set()


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def base(random_bundle: Bundle) -> Renderer:
    renderer = random_bundle.load_renderer(device="cpu")
    renderer.work_area_px = 64 * 64
    return renderer


@pytest.fixture
def renderer(base: Renderer) -> Renderer:
    """Its denoiser is a closed gate."""
    own = copy.copy(base)
    own.denoiser = Gate(base.denoiser)
    return own


@pytest.fixture
def start(renderer: Renderer) -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []

    def make(**given: Any) -> Engine:
        engines.append(Engine(renderer, **given))
        return engines[-1]

    yield make
    renderer.denoiser.open()
    for engine in engines:
        engine.close()


def request(
    seed: int = 0, wh: tuple[int, int] = (64, 64), mask: Image.Image | None = None, **settings: object
) -> RenderRequest:
    generator = torch.Generator().manual_seed(100 + seed)
    pixels = torch.randint(0, 256, (wh[1], wh[0], 3), generator=generator, dtype=torch.uint8)
    edit_condition = EditCondition(
        expressive="",
        condition=torch.randn(32, 64, generator=generator),
        null_condition=torch.randn(32, 64, generator=generator),
        used_fallback=False,
        prompt_tokens=1,
        image_tokens=1,
        output_tokens=1,
        bundle="b",
    )
    used = EditSettings(steps=3).override(**settings)
    return RenderRequest(
        image=Image.fromarray(pixels.numpy()), edit_condition=edit_condition, settings=used, seed=seed, mask=mask
    )


def with_condition(good: RenderRequest, condition: Tensor) -> RenderRequest:
    bad = copy.copy(good)
    object.__setattr__(bad, "guidance", copy.copy(good.edit_condition))
    object.__setattr__(bad.edit_condition, "condition", condition)
    object.__setattr__(bad.edit_condition, "null_condition", torch.zeros_like(condition))
    return bad


def alone(base: Renderer, one: RenderRequest) -> Image.Image:
    [(_, image)] = base.render([one])
    return image


def difference(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max())


def images(handle: EditHandle) -> list[Image.Image]:
    return handle.result.result(WAIT_S)


def await_phase(handles: list[EditHandle], phase: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while any(handle.progress.phase != phase for handle in handles):  # not every change is told to those who wait
        assert time.monotonic() < deadline
        time.sleep(0.002)


def assert_empty(engine: Engine) -> None:
    stats = engine.stats()
    assert (stats.num_waiting, stats.num_in_flight, stats.pixels_in_flight, stats.num_denoising) == (0, 0, 0, 0)
    assert stats.max_steps_after_end <= 1


# ---- joining and leaving


def test_a_late_edit_joins_at_the_next_step_and_each_leaves_after_its_own_last(
    renderer: Renderer, base: Renderer, start: Callable[..., Engine]
) -> None:
    engine, gate = start(), renderer.denoiser
    first = engine.submit(request(0, steps=5))
    gate.await_call()
    gate.let()
    gate.await_call()  # its second step is running
    late = engine.submit(request(1, steps=2))
    await_phase([late], "denoising")
    assert late.progress.step == 0
    gate.let()
    gate.await_call()
    assert [rows for rows, *_ in gate.calls] == [3, 3, 6]
    gate.open()
    assert difference(images(late)[0], alone(base, request(1, steps=2))) <= 2
    assert difference(images(first)[0], alone(base, request(0, steps=5))) <= 2
    assert [rows for rows, *_ in gate.calls] == [3, 3, 6, 6, 3]
    assert (late.run.join_steps, late.run.mean_batch_size) == (0, 2.0)
    assert first.run.mean_batch_size == pytest.approx(7 / 5)
    assert_empty(engine)


def test_edits_of_all_kinds_together_get_what_they_get_alone(
    renderer: Renderer, base: Renderer, start: Callable[..., Engine]
) -> None:
    requests = [
        request(0),
        request(1, steps=5, sampler="ddim"),
        request(2, (128, 128), steps=2, sampler="dpmpp_2m", guidance_scale=3.0),
        request(3, steps=4, guidance_scale=1.0, image_guidance_scale=1.0),
        request(4, (96, 48)),
        request(5, (50, 100), steps=2, detail_transfer=True),
        request(6, (70, 40), square_crop=True),
    ]
    engine = start(max_batch_rows=64)
    blocker = engine.submit(request(9, (48, 96), steps=1))
    renderer.denoiser.await_call()
    handles = [engine.submit(one) for one in requests]
    await_phase(handles, "denoising")
    renderer.denoiser.open()
    for one, handle in zip(requests, handles, strict=True):
        [image] = images(handle)
        expected = alone(base, one)
        assert image.size == expected.size
        assert difference(image, expected) <= 2
    images(blocker)
    assert max(map(len, engine.recent_batches())) == 5  # the five that work at 64 x 64
    assert all(len(set(batch)) == 1 for batch in engine.recent_batches())
    assert max(rows for rows, *_ in renderer.denoiser.calls) == 13  # four with three branches, one with one


def test_a_deterministic_edit_is_bit_equal_to_one_alone_in_any_company(
    renderer: Renderer, base: Renderer, start: Callable[..., Engine]
) -> None:
    engine = start()
    others = [engine.submit(request(i)) for i in (1, 2)]
    handle = engine.submit(request(7), n=2, deterministic=True)
    await_phase([*others, handle], "denoising")
    renderer.denoiser.open()
    for i, image in enumerate(images(handle)):
        one = copy.copy(request(7))
        object.__setattr__(one, "seed", 7 + i)
        assert image.tobytes() == alone(base, one).tobytes()
    assert handle.run.mean_batch_size == 1
    assert images(others[0])


def test_several_images_share_one_encoding_and_one_batch_in_the_order_of_their_seeds(
    renderer: Renderer, base: Renderer, start: Callable[..., Engine]
) -> None:
    prepare = renderer.prepare = Hold(renderer.prepare)
    prepare.let()
    renderer.denoiser.open()
    engine = start()
    results = images(engine.submit(request(4, detail_transfer=True), n=3))
    assert prepare.num_calls == 1
    assert [len(batch) for batch in engine.recent_batches()] == [3, 3, 3]
    for i, image in enumerate(results):
        one = copy.copy(request(4, detail_transfer=True))
        object.__setattr__(one, "seed", 4 + i)
        assert difference(image, alone(base, one)) <= 2
    assert len({image.tobytes() for image in results}) == 3


def test_sizes_take_turns_and_the_largest_batch_is_kept(renderer: Renderer, start: Callable[..., Engine]) -> None:
    engine, gate = start(max_batch_rows=6), renderer.denoiser
    square = [engine.submit(request(i, steps=4)) for i in range(3)]
    wide = engine.submit(request(5, (96, 48), steps=4))
    gate.await_call()
    await_phase([*square, wide], "denoising")
    gate.open()
    for handle in (*square, wide):
        images(handle)
    shapes = [shape for _, *shape in gate.calls[1:]]
    # Three squares at two a batch: at most two of their steps between any two of the wide one.
    turns = [i for i, shape in enumerate(shapes) if shape != [8, 8]]
    assert len(turns) == 4
    assert turns[0] <= 1  # the squares came first
    assert max(b - a for a, b in pairwise(turns)) <= 3
    assert max(rows for rows, *_ in gate.calls) == 6


# ---- calling off


@pytest.mark.parametrize("phase", ["waiting", "encoding", "denoising", "decoding"])
def test_an_edit_is_called_off_in_every_phase(
    phase: str, renderer: Renderer, base: Renderer, start: Callable[..., Engine]
) -> None:
    gate = renderer.denoiser
    hold = None
    if phase in ("encoding", "decoding"):
        name = {"encoding": "prepare", "decoding": "finish"}[phase]
        hold = Hold(getattr(renderer, name))
        setattr(renderer, name, hold)
    engine = start(max_pixels_in_flight=3 * 2 * 64 * 64)
    handles = []
    if phase == "waiting":
        handles.append(engine.submit(request(1, steps=1), n=2))
        gate.await_call()
    handle = engine.submit(request(2), n=2)
    if phase == "denoising":
        gate.await_call()
    elif phase == "encoding":
        assert hold.entered.wait(WAIT_S)
    elif phase == "decoding":
        gate.open()
        await_phase([handle], "decoding")
        assert hold.entered.wait(WAIT_S)
    assert handle.progress.phase == phase
    assert handle.progress.position == (0 if phase == "waiting" else None)
    assert handle.cancel()
    with pytest.raises(CancelledError):
        images(handle)
    assert handle.progress.phase == "cancelled"
    assert list(handle.events())[-1].error.__class__ is CancelledError
    after = engine.submit(request(3), n=2)  # there is room for it only once the other has gone
    assert after.progress.phase == ("waiting" if phase == "waiting" else "encoding")
    if hold is not None:
        hold.let()
    gate.open()
    for one in (*handles, after):
        assert difference(images(one)[0], alone(base, request(1, steps=1) if one in handles else request(3))) <= 2
    assert not after.cancel()
    assert_empty(engine)
    assert engine.stats().num_cancelled == 1
    assert engine.stats().max_steps_after_end == (1 if phase == "denoising" else 0)


def test_cancelling_the_task_that_awaits_calls_the_edit_off(renderer: Renderer, start: Callable[..., Engine]) -> None:
    engine = start()

    async def main() -> EditHandle:
        handle = engine.submit(request(0))
        await asyncio.to_thread(renderer.denoiser.await_call)
        task = asyncio.ensure_future(asyncio.wrap_future(handle.result))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return handle

    assert asyncio.run(main()).progress.phase == "cancelled"
    assert_empty(engine)


def test_a_deadline_ends_edits_that_wait_or_run_and_no_others(renderer: Renderer, start: Callable[..., Engine]) -> None:
    clock = Clock()
    engine, gate = start(clock=clock, max_pixels_in_flight=3 * 3 * 64 * 64), renderer.denoiser
    runs, may_run = engine.submit(request(0), deadline=10.0), engine.submit(request(1), n=2, deadline=11.0)
    waits, may_wait = engine.submit(request(2), deadline=10.0), engine.submit(request(3))
    gate.await_call()
    await_phase([runs, may_run], "denoising")
    clock.now = 10.5
    gate.let()
    for late in (runs, waits):
        with pytest.raises(DeadlineError, match=r"not done within 10\.5 s"):
            images(late)
    gate.open()
    assert len(images(may_run)) == 2
    assert len(images(may_wait)) == 1
    assert (engine.stats().num_overdue, engine.stats().num_done, engine.stats().num_failed) == (2, 2, 0)
    assert_empty(engine)


def test_a_deadline_wakes_an_engine_that_has_no_step_to_run(renderer: Renderer, start: Callable[..., Engine]) -> None:
    hold = renderer.prepare = Hold(renderer.prepare)
    engine = start()
    with pytest.raises(DeadlineError):
        images(engine.submit(request(0), deadline=time.monotonic() + 0.05))
    hold.let()
    assert_empty(engine)


def test_two_hundred_edits_called_off_at_random_moments_leave_nothing_behind(
    renderer: Renderer, base: Renderer, start: Callable[..., Engine]
) -> None:
    gc.collect()
    before = sum(type(thing) is SampleState for thing in gc.get_objects())
    chance = random.Random(0)
    engine, gate = start(max_waiting=300, max_batch_rows=4, max_pixels_in_flight=20 * 64 * 64), renderer.denoiser
    renderer.work_area_px = 32 * 32
    quick = {"guidance_scale": 1.0, "image_guidance_scale": 1.0, "steps": 3}
    running: list[EditHandle] = []
    called_off = 0
    for i in range(200):
        running.append(engine.submit(request(i, chance.choice([(32, 32), (48, 24)]), **quick), n=chance.choice([1, 2])))
        if chance.random() < 0.4:
            gate.let()
        if len(running) > chance.randrange(12):
            called_off += running.pop(chance.randrange(len(running))).cancel()
    called_off += sum(handle.cancel() for handle in running)
    gate.open()
    small = copy.copy(base)
    small.work_area_px = 32 * 32
    assert difference(images(engine.submit(request(1, **quick)))[0], alone(small, request(1, **quick))) <= 2
    assert called_off > 100
    assert engine.stats().num_cancelled == called_off
    assert engine.stats().num_cancelled + engine.stats().num_done == 201
    assert_empty(engine)
    engine.close()  # what the VAE still held is gone, too
    running.clear()
    gc.collect()
    assert sum(type(thing) is SampleState for thing in gc.get_objects()) == before


# ---- failures


def test_only_the_guilty_edit_fails_and_no_noise_is_drawn_twice(
    renderer: Renderer, base: Renderer, start: Callable[..., Engine]
) -> None:
    good = [request(0), request(1)]
    not_a_number, poisoned = torch.full((32, 64), float("nan")), torch.full((32, 64), POISON)
    bad = {
        RenderError: with_condition(request(2), not_a_number),
        ValueError: with_condition(request(3), poisoned),
        RuntimeError: with_condition(request(4), torch.zeros(32, 63)),
    }
    engine = start(max_batch_rows=64, max_pixels_in_flight=10**6)
    handles = [engine.submit(one) for one in (*good, *bad.values())]
    await_phase(handles, "denoising")
    renderer.denoiser.open()
    for one, handle in zip(good, handles, strict=False):
        assert difference(images(handle)[0], alone(base, one)) <= 2
    for error, handle in zip(bad, handles[2:], strict=True):
        with pytest.raises(error):
            images(handle)
        assert isinstance(list(handle.events())[-1], Failed)
    assert (engine.stats().num_failed, engine.stats().num_done) == (3, 2)
    assert_empty(engine)
    assert engine.is_alive()


def test_out_of_memory_halves_the_batch_and_fails_what_is_too_large_alone(
    renderer: Renderer, base: Renderer, start: Callable[..., Engine]
) -> None:
    engine, gate = start(max_batch_rows=64, max_pixels_in_flight=10**6), renderer.denoiser
    gate.max_rows = 6
    handles = [engine.submit(request(i, steps=2)) for i in range(5)]
    gate.await_call()
    await_phase(handles, "denoising")
    gate.open()
    for i, handle in enumerate(handles):
        assert difference(images(handle)[0], alone(base, request(i, steps=2))) <= 2
    assert engine.stats().max_batch_rows <= 6
    gate.max_rows = 2
    with pytest.raises(torch.OutOfMemoryError):
        images(engine.submit(request(0)))
    assert len(images(engine.submit(request(0, guidance_scale=1.0, image_guidance_scale=1.0)))) == 1
    assert_empty(engine)


def test_a_batch_that_had_to_shrink_grows_back_a_row_at_a_time(
    renderer: Renderer, start: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mgie.engine.engine._GROW_AFTER", 2)
    engine, gate = start(max_batch_rows=9, max_pixels_in_flight=10**6), renderer.denoiser
    gate.max_rows = 6
    handles = [engine.submit(request(i, steps=20)) for i in range(3)]
    gate.await_call()
    await_phase(handles, "denoising")
    gate.open()
    images(handles[0])
    assert engine.stats().num_out_of_memory
    gate.max_rows = 9
    for handle in [engine.submit(request(i, steps=20)) for i in range(6)]:
        images(handle)
    assert engine.stats().max_batch_rows == 9
    assert_empty(engine)


def test_an_edit_larger_than_the_limit_goes_in_alone(
    base: Renderer, renderer: Renderer, start: Callable[..., Engine]
) -> None:
    engine = start(max_batch_rows=1)
    renderer.denoiser.open()
    handles = [engine.submit(request(i, steps=2), n=2) for i in range(2)]
    for i, handle in enumerate(handles):
        assert difference(images(handle)[0], alone(base, request(i, steps=2))) <= 2
    assert_empty(engine)


@pytest.mark.parametrize("method", ["prepare", "finish"])
def test_want_of_memory_in_the_vae_is_tried_once_more(
    method: str, base: Renderer, renderer: Renderer, start: Callable[..., Engine]
) -> None:
    work = getattr(renderer, method)

    def fail_once(*args: Any) -> Any:
        setattr(renderer, method, work)
        raise torch.OutOfMemoryError("no room")

    setattr(renderer, method, fail_once)
    renderer.denoiser.open()
    engine = start()
    assert difference(images(engine.submit(request(1)))[0], alone(base, request(1))) <= 2
    assert engine.stats().num_out_of_memory == 1
    assert_empty(engine)


@pytest.mark.parametrize("method", ["prepare", "finish"])
def test_what_the_vae_raises_fails_its_edit_only(method: str, renderer: Renderer, start: Callable[..., Engine]) -> None:
    work = getattr(renderer, method)

    def raise_once(*args: Any) -> Any:
        setattr(renderer, method, work)
        raise OSError("broken")

    setattr(renderer, method, raise_once)
    renderer.denoiser.open()
    engine = start()
    with pytest.raises(OSError, match="broken"):
        images(engine.submit(request(0), n=2))
    assert len(images(engine.submit(request(1)))) == 1
    assert_empty(engine)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_whose_thread_is_lost_says_so_and_keeps_nobody_waiting(
    renderer: Renderer, start: Callable[..., Engine]
) -> None:
    engine = start()
    handle = engine.submit(request(0))
    renderer.denoiser.await_call()

    def lose_the_device(*_: object) -> None:
        raise RuntimeError("CUDA error")

    engine._synchronize = lose_the_device
    renderer.denoiser.open()
    with pytest.raises(ClosedError):
        images(handle)
    engine._stepper.join(WAIT_S)
    assert not engine.is_alive()
    with pytest.raises(ClosedError):
        engine.submit(request(1))


def test_closing_fails_what_is_not_done(renderer: Renderer, start: Callable[..., Engine]) -> None:
    engine = start(max_pixels_in_flight=3 * 64 * 64)
    handles = [engine.submit(request(i)) for i in range(3)]
    renderer.denoiser.await_call()
    renderer.denoiser.let()
    engine.close()
    for handle in handles:
        with pytest.raises(ClosedError):
            images(handle)
    assert len(renderer.denoiser.calls) <= 2
    assert_empty(engine)
    assert not engine.is_alive()


# ---- room


def test_pixels_in_flight_and_the_line_are_bounded(renderer: Renderer, start: Callable[..., Engine]) -> None:
    engine, gate = start(max_pixels_in_flight=4 * 3 * 64 * 64, max_waiting=2), renderer.denoiser
    inside = [engine.submit(request(0), n=2), engine.submit(request(1)), engine.submit(request(2))]
    gate.await_call()
    line = [engine.submit(request(3)), engine.submit(request(4))]
    assert [handle.progress.position for handle in (*inside, *line)] == [None, None, None, 0, 1]
    assert engine.stats().pixels_in_flight == 4 * 3 * 64 * 64
    with pytest.raises(EngineFullError, match="2 edits are waiting; at most 2 may") as full:
        engine.submit(request(5))
    assert full.value.retry_after_s == 1  # nothing is known of its speed yet
    gate.let()
    gate.await_call()
    with pytest.raises(EngineFullError) as full:
        engine.submit(request(5))
    assert 0 < full.value.retry_after_s < WAIT_S
    line[0].cancel()
    line[0] = engine.submit(request(6))
    gate.open()
    for handle in (*inside, *line):
        images(handle)
    assert (engine.stats().num_refused, engine.stats().num_done) == (2, 5)
    assert_empty(engine)


def test_what_is_out_of_range_is_refused(renderer: Renderer, start: Callable[..., Engine]) -> None:
    engine = start()
    for bad in ({"n": 0}, {"n": 11}, {"num_previews": -1}):
        with pytest.raises(ConfigError):
            engine.submit(request(0), **bad)
    with pytest.raises(ConfigError, match="seed"):
        engine.submit(request(-1))
    with pytest.raises(ImageError, match="mask is 3x3"):
        engine.submit(request(0, mask=Image.new("L", (3, 3), 255)))
    with pytest.raises(ConfigError, match="max_batch_rows is 0"):
        start(max_batch_rows=0)


# ---- events


def test_events_tell_the_edits_story_and_previews_change_nothing(
    renderer: Renderer, base: Renderer, start: Callable[..., Engine]
) -> None:
    engine, gate = start(num_codec_threads=2), renderer.denoiser
    handle = engine.submit(request(0, (100, 50), steps=8), num_previews=3, deterministic=True)
    events = handle.events()
    assert next(events) == Started()
    previews = []
    for step in range(1, 9):  # one at a time, so that no preview comes too late
        gate.let()
        assert next(events) == Stepped(step=step, num_steps=8)
        if step in (2, 4, 6):
            previews.append(next(events))
    assert [(preview.number, preview.step) for preview in previews] == [(0, 2), (1, 4), (2, 6)]
    assert all(preview.image.size == (91, 45) for preview in previews)  # the source's shape, at the model's area
    done = next(events)
    assert list(events) == []
    assert done.images[0].tobytes() == alone(base, request(0, (100, 50), steps=8)).tobytes()


def test_a_reader_that_never_reads_costs_a_bounded_number_of_events(
    renderer: Renderer, start: Callable[..., Engine]
) -> None:
    renderer.denoiser.open()
    engine = start()
    handle = engine.submit(request(0, steps=12), num_previews=2)
    images(handle)
    engine.close()
    events = list(handle.events())
    assert sum(isinstance(event, Stepped) for event in events) == 1
    assert len(events) <= 1 + 1 + 2 + 1


def test_events_can_be_awaited(renderer: Renderer, start: Callable[..., Engine]) -> None:
    renderer.denoiser.open()
    engine = start()

    async def main() -> list[object]:
        return [event async for event in engine.submit(request(0)).stream()]

    events = asyncio.run(main())
    assert isinstance(events[-1], Done)
    assert any(isinstance(event, Stepped) for event in events)


# ---- masks


@pytest.mark.parametrize("settings", [{}, {"detail_transfer": True}, {"square_crop": True}])
def test_a_mask_holds_in_the_engine_as_in_the_renderer(
    settings: dict[str, bool], renderer: Renderer, base: Renderer, start: Callable[..., Engine]
) -> None:
    mask = Image.new("L", (90, 70))
    mask.paste(255, (30, 20, 60, 50))
    one = request(0, (90, 70), mask=mask, **settings)
    renderer.denoiser.open()
    [image] = images(start().submit(one, num_previews=2))
    assert difference(image, alone(base, one)) <= 2
    source, allowed = one.image, mask
    if settings.get("square_crop"):
        source, allowed = (picture.crop((10, 0, 80, 70)) for picture in (source, mask))
    outside = np.asarray(allowed) == 0
    assert (np.asarray(image)[outside] == np.asarray(source)[outside]).all()
    assert (np.asarray(image)[~outside] != np.asarray(source)[~outside]).any()


def test_a_trial_passes_the_line_and_the_limit_of_pixels_and_is_in_no_figures(
    renderer: Renderer, start: Callable[..., Engine]
) -> None:
    steps: list[StepDone] = []
    engine = start(max_pixels_in_flight=3 * 64 * 64, max_waiting=1, on_step=steps.append)
    first, second = (engine.submit(request(i, steps=5)) for i in range(2))
    renderer.denoiser.await_call()  # the first step of the first
    with pytest.raises(EngineFullError):
        engine.submit(request(2))
    probe = engine.submit(request(3, steps=1), is_probe=True)
    await_phase([probe], "denoising")
    renderer.denoiser.let(2)  # the step under way, and one that it shares with the trial or that is the trial's own
    assert probe.result.result(WAIT_S)
    assert (first.progress.phase, second.progress.phase) == ("denoising", "waiting")
    renderer.denoiser.open()
    assert [len(images(handle)) for handle in (first, second)] == [1, 1]
    stats = engine.stats()
    assert (stats.num_done, stats.num_refused) == (2, 1)
    assert (stats.work_done, stats.work_left) == (2 * 5 * 3 * 64 * 64, 0)
    assert sum(step.rows for step in steps) == (2 * 5 + 1) * 3
    assert all(step.seconds > 0 for step in steps)


def test_work_left_counts_the_steps_that_are_to_come(renderer: Renderer, start: Callable[..., Engine]) -> None:
    engine = start()
    handle = engine.submit(request(0, steps=4), n=2)
    seen = []
    for step in range(4):
        renderer.denoiser.await_call()
        stats = engine.stats()
        seen.append((stats.work_done, stats.work_left))
        assert stats.work_done + stats.work_left == 4 * 2 * 3 * 64 * 64
        if step < 3:
            renderer.denoiser.let()
    assert [left for _, left in seen] == [(4 - step) * 2 * 3 * 64 * 64 for step in range(4)]
    handle.cancel()
    assert engine.stats().work_left == 0


def test_the_patient_let_later_ones_pass_until_their_patience_ends(
    renderer: Renderer, start: Callable[..., Engine]
) -> None:
    clock = Clock()
    engine, gate = start(clock=clock, max_pixels_in_flight=3 * 64 * 64), renderer.denoiser
    inside = engine.submit(request(0))
    handles = []
    for arrives, queue_delay_s in ((0.0, 30.0), (0.0, 0.0), (10.0, 30.0), (29.0, 0.0), (31.0, 0.0)):
        clock.now = arrives
        handles.append(engine.submit(request(1), queue_delay_s=queue_delay_s))
    assert inside.progress.position is None
    assert [handle.progress.position for handle in handles] == [2, 0, 4, 1, 3]
    gate.open()
    assert all(len(images(handle)) == 1 for handle in (inside, *handles))
    assert_empty(engine)
