"""The two stages of an edit as plain classes: words to guidance, and guidance to pixels.

Each loads only its own parts of a bundle and owns what runs the model on threads of its own: a greedy batcher
for the MLLM, the engine for diffusion. Images are decoded and encoded on other threads, so that nothing blocks the
event loop. Whoever cancels a call, or lets its time run out, frees its place. Knows no Ray and no HTTP: `app.py`
makes them deployments, tests and benchmarks use them as they are.
"""

import asyncio
import os
import secrets
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from PIL import Image

from mgie.bundles import open_bundle
from mgie.conditioner import EditRequest, Guidance
from mgie.config import EditSettings, ImageLimits
from mgie.editor import SOFTWARE
from mgie.engine import Engine, EngineStats
from mgie.errors import BundleError, DeadlineError
from mgie.handle import EditHandle, EditRun, Previewed, Stepped
from mgie.images import EditMetadata, OutputFormat, read_image, read_mask, write_image
from mgie.renderer import RenderRequest
from serving.batcher import BatchRun, BatcherStats, GreedyBatcher

DEFAULT_LIMITS = ImageLimits()


@dataclass(frozen=True, kw_only=True)
class Derived:
    """What the MLLM stage hands on."""

    guidance: Guidance
    replica: str
    "random name of the stage object"
    run: BatchRun


@dataclass(frozen=True, kw_only=True)
class RenderOptions:
    """What the diffusion stage is asked to do."""

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


@dataclass(frozen=True, kw_only=True)
class StageStats:
    """One stage object: who it is and what it did."""

    replica: str
    pid: int
    work: BatcherStats | EngineStats


class _Stage:
    """What both stages share: the opened bundle, a name, health."""

    def __init__(self, bundle: str, *, limits: ImageLimits) -> None:
        self._bundle = open_bundle(bundle)
        self._limits = limits
        self._replica = secrets.token_hex(4)
        self._worker: GreedyBatcher[EditRequest, Guidance] | Engine

    async def info(self) -> BundleInfo:
        """The bundle that this stage serves."""
        config = self._bundle.config
        return BundleInfo(
            name=config.name,
            identity=self._bundle.identity,
            trained=config.trained,
            made_by=config.provenance.made_by,
            work_area_px=config.work_area_px,
            defaults=asdict(config.defaults),
        )

    async def stats(self) -> StageStats:
        """Figures of this stage object only; other replicas have their own."""
        return StageStats(replica=self._replica, pid=os.getpid(), work=self._worker.stats())

    def recent_batches(self) -> list[tuple[Any, ...]]:
        """Compatibility keys of the items of each recent batch, or of the images of each recent step."""
        return self._worker.recent_batches()

    def check_health(self) -> None:
        """Raises RuntimeError when the model's thread is gone; Ray Serve calls it and replaces the replica."""
        if not self._worker.is_alive():
            raise RuntimeError(f"the worker thread of {type(self).__name__} has ended")

    def close(self) -> None:
        """Ends the threads that run the model."""
        self._worker.close()

    async def _read(self, image: bytes) -> Image.Image:
        return await asyncio.to_thread(read_image, image, limits=self._limits)


class MLLMStage(_Stage):
    """Derives guidance from a photo and an instruction.

    Args:
        bundle: As `mgie.bundles.open_bundle` takes it.
        device: As torch names it, or `auto`.
        dtype: `auto`, `float32`, `bfloat16`, ...
        max_batch_size: Largest batch.
        num_threads: Threads of torch on the CPU.
        limits: What an input image may be.

    Raises:
        BundleError: The bundle is missing, damaged, or lacks a part.
        ConfigError: A value is out of range.
    """

    def __init__(
        self,
        bundle: str = "tiny",
        *,
        device: str = "auto",
        dtype: str = "auto",
        max_batch_size: int = 8,
        num_threads: int = 1,
        limits: ImageLimits = DEFAULT_LIMITS,
    ) -> None:
        super().__init__(bundle, limits=limits)
        self._num_threads = num_threads
        self._conditioner = self._bundle.load_conditioner(device=device, dtype=dtype)
        # One forward pass writes a given text, many generate one: together, the short would wait for the long.
        self._worker: GreedyBatcher[EditRequest, Guidance] = GreedyBatcher(
            self._derive_batch,
            key=lambda request: "given" if request.expressive is not None else "generated",
            max_batch_size=max_batch_size,
            name="mllm",
        )

    async def derive(
        self, image: bytes, instruction: str, expressive: str | None = None, *, timeout_s: float | None = None
    ) -> Derived:
        """Guidance of one edit.

        Args:
            image: Encoded photo.
            instruction: The user's words.
            expressive: The expressive instruction, if the user gives it.
            timeout_s: When to give up; None = never. A batch that runs goes on for the others.

        Raises:
            ImageError: The bytes are no image that can be edited.
            PromptError: A text is blank or too long.
            DeadlineError: The time ran out.
        """
        deadline = asyncio.timeout(timeout_s)
        try:
            async with deadline:
                request = EditRequest(image=await self._read(image), instruction=instruction, expressive=expressive)
                batched = await self._worker.submit(request)
        except TimeoutError as error:
            if not deadline.expired():
                raise  # a timeout of something else
            raise DeadlineError(f"guidance was not derived within {timeout_s:.1f} s; it was given up") from error
        return Derived(guidance=batched.result, replica=self._replica, run=batched.run)

    def _derive_batch(self, requests: Sequence[EditRequest]) -> Iterator[tuple[int, Guidance]]:
        # OpenMP counts threads per calling thread, and Ray derives OMP_NUM_THREADS from the CPUs asked for; a number
        # of our own keeps results equal from run to run.
        if torch.get_num_threads() != self._num_threads:
            torch.set_num_threads(self._num_threads)
        yield from enumerate(self._conditioner.derive(requests))


class DiffusionStage(_Stage):
    """Renders edited images; edits join and leave the engine's batch at step borders.

    Args:
        bundle, device, dtype, num_threads, limits: As those of `MLLMStage`.
        max_batch_rows, max_pixels_in_flight, max_waiting, num_codec_threads: As those of `mgie.engine.Engine`.

    Raises:
        BundleError: The bundle is missing, damaged, or lacks a part.
        ConfigError: A value is out of range.
    """

    def __init__(
        self,
        bundle: str = "tiny",
        *,
        device: str = "auto",
        dtype: str = "auto",
        max_batch_rows: int = 24,
        max_pixels_in_flight: int | None = None,
        max_waiting: int = 64,
        num_codec_threads: int = 1,
        num_threads: int = 1,
        limits: ImageLimits = DEFAULT_LIMITS,
    ) -> None:
        super().__init__(bundle, limits=limits)
        self._renderer = self._bundle.load_renderer(device=device, dtype=dtype)
        self._worker: Engine = Engine(
            self._renderer,
            max_batch_rows=max_batch_rows,
            max_pixels_in_flight=max_pixels_in_flight,
            max_waiting=max_waiting,
            num_codec_threads=num_codec_threads,
            num_threads=num_threads,
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
            EngineFullError: Too many edits wait.
            DeadlineError: The time ran out.
        """
        request, handle = await self._submit(image, derived, options, timeout_s)
        return await self._rendered(request, handle, options)

    async def render_stream(
        self, image: bytes, derived: Derived, options: RenderOptions, *, timeout_s: float | None = None
    ) -> AsyncGenerator[Stepped | Partial | RenderedEdit, None]:
        """The same, and what happens on the way. Closing the iterator takes the edit out of the engine."""
        request, handle = await self._submit(image, derived, options, timeout_s)
        try:
            async for event in handle.stream():
                if isinstance(event, Stepped):
                    yield event
                elif isinstance(event, Previewed):
                    data = await asyncio.to_thread(self._encode, event.image, options, options.seed)
                    yield Partial(data=data, number=event.number, width=event.image.width, height=event.image.height)
            yield await self._rendered(request, handle, options)
        finally:
            handle.cancel()

    async def _rendered(self, request: RenderRequest, handle: EditHandle, options: RenderOptions) -> RenderedEdit:
        images = await asyncio.wrap_future(handle.result)
        return RenderedEdit(
            images=[
                await asyncio.to_thread(self._encode, image, options, options.seed + i)
                for i, image in enumerate(images)
            ],
            width=images[0].width,
            height=images[0].height,
            work_wh=self._renderer.work_size(request.image.size, request.settings),
            settings=request.settings,
            replica=self._replica,
            run=handle.run,
        )

    async def _submit(
        self, image: bytes, derived: Derived, options: RenderOptions, timeout_s: float | None
    ) -> tuple[RenderRequest, EditHandle]:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        if derived.guidance.bundle != self._bundle.identity:
            raise BundleError(
                f"guidance comes from bundle {derived.guidance.bundle}; this stage serves {self._bundle.identity}"
            )
        mask = options.mask
        request = RenderRequest(
            image=await self._read(image),
            guidance=derived.guidance,
            settings=self._bundle.config.defaults.override(**options.overrides),
            seed=options.seed,
            mask=None if mask is None else await asyncio.to_thread(read_mask, mask, limits=self._limits),
        )
        return request, self._worker.submit(
            request,
            n=options.n,
            deadline=deadline,
            num_previews=options.num_partials,
            deterministic=options.deterministic,
        )

    def _encode(self, image: Image.Image, options: RenderOptions, seed: int) -> bytes:
        # OpenAI counts from 0, the encoders from 1.
        quality = None if options.output_quality is None else max(1, options.output_quality)
        metadata = EditMetadata(seed=seed, bundle=self._bundle.identity, software=SOFTWARE)
        return write_image(image, format=options.output_format, quality=quality, metadata=metadata)
