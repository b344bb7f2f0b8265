"""The two stages of an edit as plain classes: words to guidance, and guidance to pixels.

Each loads only its own parts of a bundle and owns what runs the model on threads of its own: a greedy batcher
for the MLLM, an engine per bundle for diffusion. Several bundles may be served: the first is loaded at once, the others
when they are asked for. Images are decoded and encoded on other threads, so that nothing blocks the event loop. Whoever
cancels a call, or lets its time run out, frees its place. Knows no Ray and no HTTP: `app.py` makes them deployments,
tests and benchmarks use them as they are.
"""

import asyncio
import contextlib
import itertools
import os
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Generic, TypeVar

import torch
from PIL import Image

from mgie.bundles import open_bundle
from mgie.checkpoint import Bundle
from mgie.conditioner import Conditioner, EditRequest, Guidance
from mgie.config import EditSettings, ImageLimits
from mgie.editor import SOFTWARE
from mgie.engine import Engine, EngineStats
from mgie.errors import BundleError, ConfigError, DeadlineError
from mgie.guidance_cache import GuidanceCache, GuidanceCacheStats, guidance_key
from mgie.handle import EditHandle, EditRun, Previewed, Stepped
from mgie.images import EditMetadata, OutputFormat, read_image, read_mask, resize, write_image
from mgie.renderer import Renderer, RenderRequest
from serving.batcher import BatchRun, BatcherStats, GreedyBatcher
from serving.model_pool import ModelPool

DEFAULT_LIMITS = ImageLimits()
DEFAULT_CACHE_BYTES = 64 * 2**20  # of guidance: some 250 edits of a 7B bundle

_LENGTH_TOKENS = 32  # prompts are batched by length in such steps: that much padding costs less than one more batch

ModelT = TypeVar("ModelT")


@dataclass(frozen=True, kw_only=True)
class Derived:
    """What the MLLM stage hands on."""

    guidance: Guidance
    replica: str
    "random name of the stage object"
    run: BatchRun | None
    "None: it was in the cache, or was being derived for an equal edit"


@dataclass(frozen=True, kw_only=True)
class RenderOptions:
    """What the diffusion stage is asked to do."""

    model: str | None = None
    "name of the bundle; None = the default"
    seed: int
    "of the first image; image i has seed + i"
    overrides: Mapping[str, Any] = field(default_factory=dict)
    "settings that differ from the bundle's defaults, by field name of EditSettings"
    n: int = 1
    "images, 1 to 10"
    mask: bytes | None = None
    "PNG of the photo's size, transparent where it may be edited; None = everywhere"
    deterministic: bool = False
    "the same bits on this machine whoever shares the engine"
    num_partials: int = 0
    "pictures of the first image on its way; only a stream shows them"
    output_format: OutputFormat = "png"
    output_quality: int | None = None
    "0 to 100 for jpeg and webp; None for the default"
    output_wh: tuple[int, int] | None = None
    "size that the results are scaled to; None = the photo's"
    keeps_lossless: bool = False
    "return the results as PNG, too"


@dataclass(frozen=True, kw_only=True)
class Partial:
    """What the first image is going to be."""

    data: bytes
    "encoded as the result"
    number: int
    "from 0"
    width: int
    height: int


@dataclass(frozen=True, kw_only=True)
class RenderedEdit:
    """The result of the diffusion stage."""

    images: list[bytes]
    "encoded, in the order of their seeds"
    lossless: list[bytes]
    "the same as PNG, if asked for"
    width: int
    height: int
    work_wh: tuple[int, int]
    "size the diffusion model worked at"
    settings: EditSettings
    "all settings, the bundle's defaults filled in"
    replica: str
    "random name of the stage object"
    run: EditRun


@dataclass(frozen=True, kw_only=True)
class BundleInfo:
    """What clients may know of the bundle that a stage serves."""

    name: str
    identity: str
    trained: bool
    made_by: str
    work_area_px: int
    defaults: Mapping[str, Any]
    "fields of EditSettings"
    examples: tuple[str, ...] = ()
    "instructions that it can follow"


@dataclass(frozen=True, kw_only=True)
class StageStats:
    """One stage object: who it is and what it did."""

    replica: str
    pid: int
    loaded: tuple[str, ...]
    "names of the bundles in memory, the one used last at the end"
    work: BatcherStats | EngineStats
    cache: GuidanceCacheStats | None = None
    "of the MLLM stage"


def open_bundles(bundle: str, bundles: Sequence[str] = ()) -> dict[str, Bundle]:
    """The bundles by their own names, the default first.

    Raises:
        BundleError: One is missing or damaged, or two have the same name.
    """
    opened: dict[str, Bundle] = {}
    for where in (bundle, *bundles):
        one = open_bundle(where)
        if opened.setdefault(one.config.name, one) is not one:
            raise BundleError(f"bundle {where} is named {one.config.name!r}, as another one; names must differ")
    return opened


class _Stage(Generic[ModelT]):
    """What both stages share: the opened bundles, those of them that are loaded, a name."""

    def __init__(
        self,
        bundles: Mapping[str, Bundle],
        *,
        load: Callable[[Bundle], ModelT],
        close: Callable[[ModelT], None],
        max_loaded: int,
        limits: ImageLimits,
        on_use: Callable[[str], Awaitable[object]] | None,
    ) -> None:
        self._bundles = bundles
        self._default = next(iter(bundles))
        self._limits = limits
        self._on_use = on_use
        self._replica = secrets.token_hex(4)
        self._pool: ModelPool[ModelT] = ModelPool(lambda name: load(bundles[name]), close, max_loaded=max_loaded)
        self._pool.add(self._default, load(bundles[self._default]))

    async def models(self) -> tuple[BundleInfo, ...]:
        """The bundles that this stage serves, the default first."""
        return tuple(
            BundleInfo(
                name=name,
                identity=bundle.identity,
                trained=bundle.config.trained,
                made_by=bundle.config.provenance.made_by,
                work_area_px=bundle.config.work_area_px,
                defaults=asdict(bundle.config.defaults),
                examples=bundle.config.examples,
            )
            for name, bundle in self._bundles.items()
        )

    async def _named(self, model: str | None) -> str:
        """The name of the bundle that an edit is for."""
        name = self._default if model is None else model
        if name not in self._bundles:
            raise ConfigError(f"model is {name!r}; it must be one of {', '.join(self._bundles)}", param="model")
        if self._on_use is not None:
            await self._on_use(name)
        return name

    async def _read(self, image: bytes) -> Image.Image:
        return await asyncio.to_thread(read_image, image, limits=self._limits)


@contextlib.asynccontextmanager
async def _within(timeout_s: float | None, what: str) -> AsyncIterator[None]:
    """Raises DeadlineError when the block takes longer."""
    deadline = asyncio.timeout(timeout_s)
    try:
        async with deadline:
            yield
    except TimeoutError as error:
        if not deadline.expired():
            raise  # a timeout of something else
        raise DeadlineError(f"{what} within {timeout_s:.1f} s; it was given up") from error


@dataclass(frozen=True, kw_only=True)
class _Derivation:
    """An item of the MLLM's batcher."""

    request: EditRequest
    conditioner: Conditioner
    key: Hashable


class MLLMStage(_Stage[Conditioner]):
    """Derives guidance from a photo and an instruction.

    Args:
        bundle: The default, as `mgie.bundles.open_bundle` takes it. bundles: More that edits may ask for by name.
        max_loaded: Bundles in memory at a time.
        device: As torch names it, or `auto`.
        dtype: `auto`, `float32`, `bfloat16`, ...
        max_batch_size: Largest batch.
        cache_bytes: Of guidance that is kept; 0 = none.
        num_threads: Threads of torch on the CPU.
        limits: What an input image may be.
        on_use: Told the name of the bundle before each use.

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
        max_batch_size: int = 8,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        num_threads: int = 1,
        limits: ImageLimits = DEFAULT_LIMITS,
        on_use: Callable[[str], Awaitable[object]] | None = None,
    ) -> None:
        super().__init__(
            open_bundles(bundle, bundles),
            load=lambda one: one.load_conditioner(device=device, dtype=dtype),
            close=lambda _: None,
            max_loaded=max_loaded,
            limits=limits,
            on_use=on_use,
        )
        self._num_threads = num_threads
        self._cache = GuidanceCache(cache_bytes)
        self._numbers = itertools.count()  # of edits that share no batch
        self._worker: GreedyBatcher[_Derivation, Guidance] = GreedyBatcher(
            self._derive_batch, key=lambda item: item.key, max_batch_size=max_batch_size, name="mllm"
        )

    async def derive(
        self,
        image: bytes,
        instruction: str,
        expressive: str | None = None,
        *,
        model: str | None = None,
        deterministic: bool = False,
        timeout_s: float | None = None,
    ) -> Derived:
        """Guidance of one edit. Cancelling the call takes it out of a running batch within a token.

        Args:
            image: Encoded photo.
            instruction: The user's words.
            expressive: The expressive instruction, if the user gives it; its guidance is not kept.
            model: Name of the bundle; None = the default.
            deterministic: In a batch of its own: others in it would show in the last bits.
            timeout_s: When to give up; None = never.

        Raises:
            ImageError: The bytes are no image that can be edited.
            PromptError: A text is blank or too long.
            ConfigError: There is no such model. ModelUnavailableError: It cannot be loaded.
            DeadlineError: The time ran out.
        """
        run: BatchRun | None = None
        name = await self._named(model)
        identity = self._bundles[name].identity

        async def derive() -> Guidance:
            nonlocal run
            request = EditRequest(image=await self._read(image), instruction=instruction, expressive=expressive)
            async with self._pool.use(name) as conditioner:
                length = await asyncio.to_thread(conditioner.num_prompt_tokens, request) // _LENGTH_TOKENS
                # One forward pass reads a given text, many write one: together, the short would wait for the long.
                kind = "generated" if expressive is None else "given"
                alone = (next(self._numbers),) if deterministic else ()
                key = (identity, kind, length, *alone)
                batched = await self._worker.submit(_Derivation(request=request, conditioner=conditioner, key=key))
            run = batched.run
            return batched.result

        async with _within(timeout_s, "guidance was not derived"):
            if expressive is None:
                key = await asyncio.to_thread(
                    guidance_key,
                    image,
                    instruction,
                    expressive=None,
                    generation=None,
                    bundle=identity,
                    is_alone=deterministic,
                )
                guidance = await self._cache.get(key, derive)
            else:
                guidance = await derive()
        return Derived(guidance=guidance, replica=self._replica, run=run)

    async def stats(self) -> StageStats:
        """Figures of this stage object only; other replicas have their own."""
        return StageStats(
            replica=self._replica,
            pid=os.getpid(),
            loaded=tuple(self._pool.models()),
            work=self._worker.stats(),
            cache=self._cache.stats(),
        )

    def recent_batches(self) -> list[tuple[Any, ...]]:
        """Compatibility keys of the items of each recent batch."""
        return self._worker.recent_batches()

    def check_health(self) -> None:
        """Raises RuntimeError when the model's thread is gone; Ray Serve calls it and replaces the replica."""
        if not self._worker.is_alive():
            raise RuntimeError("the worker thread of MLLMStage has ended")

    def close(self) -> None:
        """Ends the thread that runs the models."""
        self._worker.close()
        self._pool.close()

    def _derive_batch(
        self, items: Sequence[_Derivation], is_wanted: Callable[[int], bool]
    ) -> Iterator[tuple[int, Guidance]]:
        # OpenMP counts threads per calling thread, and Ray derives OMP_NUM_THREADS from the CPUs asked for; a number
        # of our own keeps results equal from run to run.
        if torch.get_num_threads() != self._num_threads:
            torch.set_num_threads(self._num_threads)
        conditioner = items[0].conditioner  # that of all: they are of one bundle
        yield from enumerate(conditioner.derive([item.request for item in items], is_wanted=is_wanted))


@dataclass(frozen=True, kw_only=True)
class _Rendering:
    """A loaded bundle of the diffusion stage."""

    renderer: Renderer
    engine: Engine


class DiffusionStage(_Stage[_Rendering]):
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
            async with _within(timeout_s, f"model {name!r} was not loaded"):
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
