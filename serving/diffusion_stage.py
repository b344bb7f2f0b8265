"""The second stage of an edit: guidance becomes pixels, in the engine of its bundle."""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from PIL import Image

from mgie.checkpoint import Bundle
from mgie.config import ImageLimits
from mgie.editor import SOFTWARE
from mgie.engine import Engine, EngineStats
from mgie.errors import BundleError
from mgie.handle import EditHandle, Previewed, Stepped
from mgie.images import EditMetadata, read_mask, resize, write_image
from mgie.renderer import Renderer, RenderRequest
from serving.stage import DEFAULT_LIMITS, Stage, open_bundles, within
from serving.stage_calls import Derived, Partial, RenderedEdit, RenderOptions, StageStats


@dataclass(frozen=True, kw_only=True)
class _Rendering:
    """A loaded bundle of the diffusion stage."""

    renderer: Renderer
    engine: Engine


class DiffusionStage(Stage[_Rendering]):
    """Renders edited images; edits join and leave the batch of their bundle's engine at step borders.

    Args:
        bundle, bundles, max_loaded, device, dtype, num_threads, limits, on_use: As those of `MLLMStage`.
        max_batch_rows, max_pixels_in_flight, max_waiting, num_codec_threads: As those of `mgie.engine.Engine`.

    Raises:
        BundleError: A bundle is missing or damaged, lacks a part, or two have the same name.
        ConfigError: A value is out of range.
    """

    def __init__(
        self,
        bundle: str = "tiny",
        bundles: Sequence[str] = (),
        *,
        max_loaded: int = 2,
        device: str = "auto",
        dtype: str = "auto",
        max_batch_rows: int = 24,
        max_pixels_in_flight: int | None = None,
        max_waiting: int = 64,
        num_codec_threads: int = 1,
        num_threads: int = 1,
        limits: ImageLimits = DEFAULT_LIMITS,
        on_use: Callable[[str], Awaitable[object]] | None = None,
    ) -> None:
        self._closed_stats: list[EngineStats] = []  # of engines that made room, as one

        def load(one: Bundle) -> _Rendering:
            renderer = one.load_renderer(device=device, dtype=dtype)
            engine = Engine(
                renderer,
                max_batch_rows=max_batch_rows,
                max_pixels_in_flight=max_pixels_in_flight,
                max_waiting=max_waiting,
                num_codec_threads=num_codec_threads,
                num_threads=num_threads,
            )
            return _Rendering(renderer=renderer, engine=engine)

        super().__init__(
            open_bundles(bundle, bundles),
            load=load,
            close=self._close,
            max_loaded=max_loaded,
            limits=limits,
            on_use=on_use,
        )

    async def render(
        self, image: bytes, derived: Derived, options: RenderOptions, *, timeout_s: float | None = None
    ) -> RenderedEdit:
        """The edited images of one edit, encoded. Cancelling the call takes it out of the engine within a step.

        Args:
            image: Encoded photo, the same that the guidance was derived from.
            derived: What the MLLM stage returned.
            options: What to make of them.
            timeout_s: When to give up; None = never.

        Raises:
            ImageError: The bytes are no image that can be edited; MaskError: the mask does not fit it.
            ConfigError: A setting is out of range or does not fit the bundle.
            BundleError: The guidance comes from another bundle than this stage's.
            ModelUnavailableError: The bundle cannot be loaded.
            EngineFullError: Too many edits wait.
            DeadlineError: The time ran out.
        """
        async with self._submitted(image, derived, options, timeout_s) as (renderer, request, handle):
            return await self._rendered(renderer, request, handle, options)

    async def render_stream(
        self, image: bytes, derived: Derived, options: RenderOptions, *, timeout_s: float | None = None
    ) -> AsyncGenerator[Stepped | Partial | RenderedEdit, None]:
        """The same, and what happens on the way. Closing the iterator takes the edit out of the engine."""
        async with self._submitted(image, derived, options, timeout_s) as (renderer, request, handle):
            async for event in handle.stream():
                if isinstance(event, Stepped):
                    yield event
                elif isinstance(event, Previewed):
                    data = await asyncio.to_thread(self._encode, event.image, options, options.seed)
                    yield Partial(data=data, number=event.number, width=event.image.width, height=event.image.height)
            yield await self._rendered(renderer, request, handle, options)

    async def stats(self) -> StageStats:
        """Figures of this stage object only; other replicas have their own."""
        loaded = self._pool.models()
        return StageStats(
            replica=self._replica,
            pid=os.getpid(),
            loaded=tuple(loaded),
            work=_together([*self._closed_stats, *(one.engine.stats() for one in loaded.values())]),
        )

    def recent_batches(self) -> list[tuple[Any, ...]]:
        """Compatibility keys of the images of each recent step, by loaded bundle."""
        return [batch for one in self._pool.models().values() for batch in one.engine.recent_batches()]

    def check_health(self) -> None:
        """Raises RuntimeError when an engine's thread is gone; Ray Serve calls it and replaces the replica."""
        dead = [name for name, one in self._pool.models().items() if not one.engine.is_alive()]
        # Looked up again: one that has just made room is closed on purpose.
        if not self._pool.is_open or set(dead) & set(self._pool.models()):
            raise RuntimeError(f"the worker thread of DiffusionStage has ended ({', '.join(dead) or 'closed'})")

    def close(self) -> None:
        """Ends the threads that run the models."""
        self._pool.close()

    def _close(self, one: _Rendering) -> None:
        one.engine.close()
        self._closed_stats = [_together([*self._closed_stats, one.engine.stats()])]

    async def _rendered(
        self, renderer: Renderer, request: RenderRequest, handle: EditHandle, options: RenderOptions
    ) -> RenderedEdit:
        images = await asyncio.wrap_future(handle.result)
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
        self, image: bytes, derived: Derived, options: RenderOptions, timeout_s: float | None
    ) -> AsyncIterator[tuple[Renderer, RenderRequest, EditHandle]]:
        """The edit in its engine; when the block ends it is out of it again."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        name = await self._named(options.model)
        bundle, mask = self._bundles[name], options.mask
        if derived.guidance.bundle != bundle.identity:
            raise BundleError(
                f"guidance comes from bundle {derived.guidance.bundle}; this stage serves {bundle.identity}"
            )
        request = RenderRequest(
            image=await self._read(image),
            guidance=derived.guidance,
            settings=bundle.config.defaults.override(**options.overrides),
            seed=options.seed,
            mask=None if mask is None else await asyncio.to_thread(read_mask, mask, limits=self._limits),
        )
        async with contextlib.AsyncExitStack() as held:
            async with within(timeout_s, f"model {name!r} was not loaded"):
                one = await held.enter_async_context(self._pool.use(name))
            handle = one.engine.submit(
                request,
                n=options.n,
                deadline=deadline,
                num_previews=options.num_partials,
                deterministic=options.deterministic,
            )
            held.callback(handle.cancel)
            yield one.renderer, request, handle

    async def _encoded(self, images: Sequence[Image.Image], options: RenderOptions) -> list[bytes]:
        return [
            await asyncio.to_thread(self._encode, image, options, options.seed + i) for i, image in enumerate(images)
        ]

    def _encode(self, image: Image.Image, options: RenderOptions, seed: int) -> bytes:
        # OpenAI counts from 0, the encoders from 1.
        quality = None if options.output_quality is None else max(1, options.output_quality)
        identity = self._bundles[options.model or self._default].identity
        metadata = EditMetadata(seed=seed, bundle=identity, software=SOFTWARE)
        return write_image(image, format=options.output_format, quality=quality, metadata=metadata)


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
