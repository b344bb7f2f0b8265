"""The two stages of an edit as plain classes: words to guidance, and guidance to pixels.

Each loads only its own parts of a bundle, owns a greedy batcher whose one thread owns the model, and
decodes and encodes images on other threads, so that neither blocks the event loop. Knows no Ray and no
HTTP: `app.py` makes them deployments, tests and benchmarks use them as they are.
"""

import asyncio
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from PIL import Image

from mgie.bundles import open_bundle
from mgie.conditioner import EditRequest, Guidance
from mgie.config import EditSettings, ImageLimits
from mgie.editor import SOFTWARE
from mgie.errors import BundleError
from mgie.images import EditMetadata, OutputFormat, read_image, write_image
from mgie.renderer import RenderRequest
from serving.batcher import BatchRun, BatcherStats, GreedyBatcher

DEFAULT_LIMITS = ImageLimits()


@dataclass(frozen=True, kw_only=True)
class StageRun:
    """How and where a stage ran one edit."""

    replica: str
    "random name of the stage object"
    run: BatchRun


@dataclass(frozen=True, kw_only=True)
class Derived:
    """What the MLLM stage hands on."""

    guidance: Guidance
    run: StageRun


@dataclass(frozen=True, kw_only=True)
class RenderedEdit:
    """The encoded result of the diffusion stage."""

    data: bytes
    width: int
    height: int
    work_wh: tuple[int, int]
    "size the diffusion model worked at"
    settings: EditSettings
    "all settings, the bundle's defaults filled in"
    run: StageRun


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
    """One stage object: who it is and what its batcher did."""

    replica: str
    pid: int
    batches: BatcherStats


class _Stage:
    """What both stages share: the opened bundle, a name, health."""

    def __init__(self, bundle: str, *, num_threads: int, limits: ImageLimits) -> None:
        self._num_threads = num_threads
        self._bundle = open_bundle(bundle)
        self._limits = limits
        self._replica = secrets.token_hex(4)
        self._batcher: GreedyBatcher[Any, Any]

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
        return StageStats(replica=self._replica, pid=os.getpid(), batches=self._batcher.stats())

    def recent_batches(self) -> list[tuple[Any, ...]]:
        """Compatibility keys of the items of each recent batch."""
        return self._batcher.recent_batches()

    def check_health(self) -> None:
        """Raises RuntimeError when the model's thread is gone; Ray Serve calls it and replaces the replica."""
        if not self._batcher.is_alive():
            raise RuntimeError(f"the worker thread of {type(self).__name__} has ended")

    def close(self) -> None:
        """Ends the worker thread."""
        self._batcher.close()

    def _fix_threads(self) -> None:
        """Called on the thread that runs the model: OpenMP counts threads per calling thread.

        Ray derives OMP_NUM_THREADS from the CPUs asked for; a number of our own keeps results equal from run to run.
        """
        if torch.get_num_threads() != self._num_threads:
            torch.set_num_threads(self._num_threads)

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
        super().__init__(bundle, num_threads=num_threads, limits=limits)
        self._conditioner = self._bundle.load_conditioner(device=device, dtype=dtype)
        # One forward pass writes a given text, many generate one: together, the short would wait for the long.
        self._batcher = GreedyBatcher(
            self._derive_batch,
            key=lambda request: "given" if request.expressive is not None else "generated",
            max_batch_size=max_batch_size,
            name="mllm",
        )

    async def derive(self, image: bytes, instruction: str, expressive: str | None = None) -> Derived:
        """Guidance of one edit.

        Args:
            image: Encoded photo.
            instruction: The user's words.
            expressive: The expressive instruction, if the user gives it.

        Raises:
            ImageError: The bytes are no image that can be edited.
            PromptError: A text is blank or too long.
        """
        request = EditRequest(image=await self._read(image), instruction=instruction, expressive=expressive)
        batched = await self._batcher.submit(request)
        return Derived(guidance=batched.result, run=StageRun(replica=self._replica, run=batched.run))

    def _derive_batch(self, requests: Sequence[EditRequest]) -> Iterator[tuple[int, Guidance]]:
        self._fix_threads()
        yield from enumerate(self._conditioner.derive(requests))


class DiffusionStage(_Stage):
    """Renders the edited image. Arguments and errors as those of `MLLMStage`."""

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
        super().__init__(bundle, num_threads=num_threads, limits=limits)
        self._renderer = self._bundle.load_renderer(device=device, dtype=dtype)
        self._batcher = GreedyBatcher(
            self._render_batch, key=self._work_size, max_batch_size=max_batch_size, name="diffusion"
        )

    async def render(
        self,
        image: bytes,
        derived: Derived,
        *,
        overrides: Mapping[str, Any],
        seed: int,
        output_format: OutputFormat = "png",
        output_quality: int | None = None,
    ) -> RenderedEdit:
        """The edited image of one edit, encoded.

        Args:
            image: Encoded photo, the same that the guidance was derived from.
            derived: What the MLLM stage returned.
            overrides: Settings that differ from the bundle's defaults, by field name of EditSettings.
            seed: Of the noise.
            output_format: File type.
            output_quality: 0 to 100 for jpeg and webp; None for the default.

        Raises:
            ImageError: The bytes are no image that can be edited.
            ConfigError: A setting is out of range or does not fit the bundle.
            BundleError: The guidance comes from another bundle than this stage's.
        """
        if derived.guidance.bundle != self._bundle.identity:
            raise BundleError(
                f"guidance comes from bundle {derived.guidance.bundle}; this stage serves {self._bundle.identity}"
            )
        request = RenderRequest(
            image=await self._read(image),
            guidance=derived.guidance,
            settings=self._bundle.config.defaults.override(**overrides),
            seed=seed,
        )
        batched = await self._batcher.submit(request)
        metadata = EditMetadata(seed=seed, bundle=self._bundle.identity, software=SOFTWARE)
        # OpenAI counts from 0, the encoders from 1.
        quality = None if output_quality is None else max(1, output_quality)
        data = await asyncio.to_thread(
            write_image, batched.result, format=output_format, quality=quality, metadata=metadata
        )
        return RenderedEdit(
            data=data,
            width=batched.result.width,
            height=batched.result.height,
            work_wh=self._work_size(request),
            settings=request.settings,
            run=StageRun(replica=self._replica, run=batched.run),
        )

    def _render_batch(self, requests: Sequence[RenderRequest]) -> Iterator[tuple[int, Image.Image]]:
        self._fix_threads()
        yield from self._renderer.render(requests)

    def _work_size(self, request: RenderRequest) -> tuple[int, int]:
        return self._renderer.work_size(request.image.size, request.settings)
