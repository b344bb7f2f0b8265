"""The second stage of an edit: a condition becomes pixels, in the engine of its bundle."""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Unpack

import torch
from PIL import Image

from mgie.bundle.bundle import Bundle
from mgie.engine.engine import Engine
from mgie.engine.handle import EditHandle, EngineStats, Previewed, StepDone, Stepped
from mgie.errors import DeadlineError
from mgie.images.files import EditMetadata, read_mask, write_image
from mgie.images.geometry import resize
from mgie.inference.conditioner import EditCondition
from mgie.inference.renderer import Renderer, RenderRequest
from serving.deadline import within
from serving.errors import MixedVersionsError
from serving.stages.autoscaling import Work
from serving.stages.base import Stage, StageSettings
from serving.stages.health import Health
from serving.stages.messages import Derived, EditOptions, Partial, RenderedEdit, StageStats
from serving.stages.packing import unpack
from serving.telemetry.metrics import (
    CANCELS,
    PIXELS_IN_FLIGHT,
    QUEUE_SECONDS,
    RUNNING,
    STEP_ROWS,
    STEP_SECONDS,
    STEPS,
    WAITING,
    Sample,
)

PROBE_SIDE_PX = 32
PROBE_TOKENS = 77  # as the models' text encoders give


@dataclass(frozen=True, kw_only=True)
class _Rendering:
    """A loaded bundle of the diffusion stage."""

    renderer: Renderer
    engine: Engine
    health: Health


class DiffusionStage(Stage[_Rendering]):
    """Renders edited images; edits join and leave the batch of their bundle's engine at step borders.

    Args:
        max_batch_rows, max_pixels_in_flight, max_waiting, num_codec_threads: See `mgie.engine.engine.Engine`.
        bundle, bundles, settings: See `Stage`; errors, too.
    """

    def __init__(
        self,
        bundle: str = "tiny",
        bundles: Sequence[str] = (),
        *,
        max_batch_rows: int = 24,
        max_pixels_in_flight: int | None = None,
        max_waiting: int = 64,
        num_codec_threads: int = 1,
        **settings: Unpack[StageSettings],
    ) -> None:
        self._closed_stats: list[EngineStats] = []  # of engines that made room, as one
        self._new_engine = partial(
            Engine,
            max_batch_rows=max_batch_rows,
            max_pixels_in_flight=max_pixels_in_flight,
            max_waiting=max_waiting,
            num_codec_threads=num_codec_threads,
        )
        super().__init__(bundle, bundles, **settings)

    async def render(
        self,
        image: bytes,
        derived: Derived,
        options: EditOptions,
        *,
        mask: bytes | None = None,
        timeout_s: float | None = None,
    ) -> RenderedEdit:
        """The edited images of one edit, encoded. Cancelling the call takes it out of the engine within a step.

        Args:
            image: Encoded photo, the same that the condition was derived from.
            derived: What the MLLM stage returned.
            options: The edit.
            mask: PNG of the photo's size, transparent where it may be edited; None: everywhere.
            timeout_s: When to give up; None: never.

        Raises:
            ImageError: The bytes are no image that can be edited; MaskError: the mask does not fit it.
            ConfigError: A setting is out of range or does not fit the bundle.
            MixedVersionsError: The condition comes from another bundle than this stage's.
            ModelUnavailableError: The bundle cannot be loaded.
            EngineFullError: Too many edits wait.
            DeadlineError: The time ran out.
        """
        async with self._submitted(image, derived, options, mask, timeout_s) as (renderer, request, handle):
            return await self._rendered(renderer, request, handle, options)

    async def render_stream(
        self,
        image: bytes,
        derived: Derived,
        options: EditOptions,
        *,
        mask: bytes | None = None,
        timeout_s: float | None = None,
    ) -> AsyncGenerator[Stepped | Partial | RenderedEdit, None]:
        """The same, and what happens on the way. Closing the iterator takes the edit out of the engine."""
        async with self._submitted(image, derived, options, mask, timeout_s) as (renderer, request, handle):
            async for event in handle.stream():
                if isinstance(event, Stepped):
                    yield event
                elif isinstance(event, Previewed):
                    data = await asyncio.to_thread(self._encode, event.image, options, options.seed)
                    yield Partial(data=data, number=event.number, width=event.image.width, height=event.image.height)
            yield await self._rendered(renderer, request, handle, options)

    async def stats(self) -> StageStats:
        """Figures of this stage object only; other replicas have their own."""
        return StageStats(
            replica=self._replica, pid=os.getpid(), loaded=tuple(self._pool.models()), work=self._engine_stats()
        )

    async def check_health(self) -> None:
        """Raises RuntimeError when an engine does not work; Ray Serve then replaces the replica.

        Serve takes a new replica into service after its first check: the probe warms it up.
        """
        dead = [name for name, one in self._pool.models().items() if not one.engine.is_alive()]
        # Looked up again: one that has just made room is closed on purpose.
        if not self._pool.is_open or set(dead) & set(self._pool.models()):
            raise RuntimeError(f"the worker thread of DiffusionStage has ended ({', '.join(dead) or 'closed'})")
        for name, one in self._pool.models().items():
            try:
                await one.health.check()
            except RuntimeError as error:
                if name in self._pool.models():  # else it has just made room, and is closed on purpose
                    raise RuntimeError(f"bundle {name!r} does not work: {error}") from error

    def _engine_stats(self) -> EngineStats:
        return _together([*self._closed_stats, *(one.engine.stats() for one in self._pool.models().values())])

    def _look_at_work(self) -> Work:
        stats = self._engine_stats()
        return self._work_meter.measure(done=stats.work_done, left=stats.work_left, has_line=stats.num_waiting > 0)

    def _samples(self) -> Iterator[Sample]:
        stats = self._engine_stats()
        yield WAITING, stats.num_waiting, {}
        yield RUNNING, stats.num_in_flight, {}
        yield PIXELS_IN_FLIGHT, stats.pixels_in_flight, {}
        yield STEPS, stats.num_steps, {}
        yield CANCELS, stats.num_cancelled, {}

    def _load(self, bundle: Bundle) -> _Rendering:
        renderer = bundle.load_renderer(**self._placed)
        health = self._monitoring.health(lambda: _probe(engine, renderer, bundle))

        def on_step(step: StepDone) -> None:
            health.note_work()
            self._monitoring.meter(STEP_SECONDS, step.seconds)
            self._monitoring.meter(STEP_ROWS, step.rows)

        engine = self._new_engine(renderer, num_threads=self._num_threads, on_step=on_step)
        return _Rendering(renderer=renderer, engine=engine, health=health)

    def _unload(self, model: _Rendering) -> None:
        model.engine.close()
        self._closed_stats = [_together([*self._closed_stats, model.engine.stats()])]

    async def _rendered(
        self, renderer: Renderer, request: RenderRequest, handle: EditHandle, options: EditOptions
    ) -> RenderedEdit:
        images = await asyncio.wrap_future(handle.result)
        self._meter(QUEUE_SECONDS, handle.run.waiting_s)
        if options.output_wh is not None:
            images = [await asyncio.to_thread(resize, image, options.output_wh) for image in images]
        encoded = await self._encoded(images, options)
        lossless: list[bytes] = []
        if options.keeps_lossless:
            is_png = options.output_format == "png"
            lossless = (
                encoded
                if is_png
                else await self._encoded(images, replace(options, output_format="png", output_quality=None))
            )
        return RenderedEdit(
            images=encoded,
            lossless=lossless,
            width=images[0].width,
            height=images[0].height,
            work_wh=renderer.work_size(request.image.size, request.settings),
            settings=request.settings,
            replica=self._replica,
            run=handle.run,
        )

    @contextlib.asynccontextmanager
    async def _submitted(
        self, image: bytes, derived: Derived, options: EditOptions, mask: bytes | None, timeout_s: float | None
    ) -> AsyncIterator[tuple[Renderer, RenderRequest, EditHandle]]:
        """The edit in its engine; when the block ends it is out of it again."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        name = await self._named(options.model)
        bundle = self._bundles[name]
        if derived.bundle != bundle.identity:
            raise MixedVersionsError(
                f"the condition comes from bundle {derived.bundle}; this stage serves {bundle.identity}"
            )
        request = RenderRequest(
            image=await self._read(image),
            edit_condition=unpack(derived),
            settings=bundle.config.defaults.override(**options.overrides),
            seed=options.seed,
            mask=None if mask is None else await asyncio.to_thread(read_mask, mask, limits=self._limits),
        )
        async with contextlib.AsyncExitStack() as held:
            span = held.enter_context(self._spans.span("render", options.trace))
            span.record(num_images=options.n, num_steps=request.settings.steps)
            late = DeadlineError(f"model {name!r} was not loaded within {timeout_s} s; the edit was given up")
            async with within(timeout_s, late):
                one = await held.enter_async_context(self._pool.use(name))
            handle = one.engine.submit(
                request,
                n=options.n,
                deadline=deadline,
                num_previews=options.num_partials,
                deterministic=options.deterministic,
                queue_delay_s=options.queue_delay_s,
            )
            held.callback(handle.cancel)
            held.enter_context(self._work_meter.edit())
            yield one.renderer, request, handle
            run = handle.run
            span.record(queue_s=run.waiting_s, denoise_s=run.denoise_s, mean_batch_size=run.mean_batch_size)

    async def _encoded(self, images: Sequence[Image.Image], options: EditOptions) -> list[bytes]:
        return [
            await asyncio.to_thread(self._encode, image, options, options.seed + i) for i, image in enumerate(images)
        ]

    def _encode(self, image: Image.Image, options: EditOptions, seed: int) -> bytes:
        # OpenAI counts from 0, the encoders from 1.
        quality = None if options.output_quality is None else max(1, options.output_quality)
        identity = self._bundles[options.model or self._default].identity
        metadata = EditMetadata(seed=seed, bundle=identity)
        return write_image(image, format=options.output_format, quality=quality, metadata=metadata)


async def _probe(engine: Engine, renderer: Renderer, bundle: Bundle) -> None:
    """One edit of one step, of a blank photo with a blank condition."""
    blank = torch.zeros(PROBE_TOKENS, renderer.condition_dim)
    edit_condition = EditCondition(
        expressive="",
        condition=blank,
        null_condition=blank,
        used_fallback=False,
        prompt_tokens=0,
        image_tokens=0,
        output_tokens=0,
        bundle=bundle.identity,
    )
    request = RenderRequest(
        image=Image.new("RGB", (PROBE_SIDE_PX, PROBE_SIDE_PX)),
        edit_condition=edit_condition,
        settings=bundle.config.defaults.override(steps=1),
        seed=0,
    )
    handle = engine.submit(request, is_probe=True)
    try:
        await asyncio.wrap_future(handle.result)
    finally:
        handle.cancel()  # one that hangs must not come back to life


def _together(parts: Sequence[EngineStats]) -> EngineStats:
    """The figures of several engines as those of one."""
    sums = {one.name: sum(getattr(part, one.name) for part in parts) for one in fields(EngineStats)}
    num_stepped = sum(part.mean_batch_size * part.num_steps for part in parts)
    return EngineStats(
        **sums
        | {
            "mean_batch_size": num_stepped / sums["num_steps"] if sums["num_steps"] else 0.0,
            "max_batch_rows": min((part.max_batch_rows for part in parts), default=0),
            "max_steps_after_end": max((part.max_steps_after_end for part in parts), default=0),
        }
    )
