"""What the two stages have in common: bundles by name, loaded when they are asked for, and how long an edit may wait.

A stage loads only its own parts of a bundle and owns what runs the model on threads of its own. Images are decoded and
encoded on other threads, so that nothing blocks the event loop. Whoever cancels a call, or lets its time run out, frees
its place. Stages know no Ray and no HTTP: `app.py` makes them deployments, tests and benchmarks use them as they are.
Serve calls `check_health` and `record_autoscaling_stats` by their names.
"""

import asyncio
import secrets
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Generic, TypedDict, TypeVar

from PIL import Image

from mgie.bundle.bundle import Bundle
from mgie.bundle.resolve import locate_bundles
from mgie.config import ImageLimits
from mgie.errors import ConfigError
from mgie.images.files import read_image
from serving.stages.autoscaling import Work, WorkMeter
from serving.stages.health import UNMONITORED, Monitoring
from serving.stages.messages import BundleInfo
from serving.stages.model_pool import ModelPool
from serving.telemetry.metrics import LOADED_BUNDLES, WORK_LEFT, WORK_RATE, Sample, Sampler, unmetered
from serving.telemetry.tracing import open_spans

ModelT = TypeVar("ModelT")


class StageSettings(TypedDict, total=False):
    """What both stages may be given; see `Stage`."""

    max_loaded: int
    device: str
    dtype: str
    num_threads: int
    limits: ImageLimits
    on_use: Callable[[str], Awaitable[object]] | None
    monitoring: Monitoring


class Stage(ABC, Generic[ModelT]):
    """What both stages share: the opened bundles, those of them that are loaded, a name, and how they are watched.

    Args:
        bundle: The default, as `mgie.bundle.bundle.open_bundle` takes it. bundles: More that edits may ask for by name.
        max_loaded: Bundles in memory at a time.
        device: Name of torch's, or `auto`.
        dtype: `auto`, `float32`, `bfloat16`, ...
        num_threads: Threads of torch on the CPU.
        limits: What an input image may be.
        on_use: Told the name of the bundle before each use.
        monitoring: Who gets its figures, and when it has to show that it works.

    Raises:
        BundleError: A bundle is missing or damaged, lacks a part, or two have the same name.
        ConfigError: A value is out of range.
    """

    def __init__(
        self,
        bundle: str,
        bundles: Sequence[str],
        *,
        max_loaded: int = 2,
        device: str = "auto",
        dtype: str = "auto",
        num_threads: int = 1,
        limits: ImageLimits = ImageLimits(),  # noqa: B008  # frozen
        on_use: Callable[[str], Awaitable[object]] | None = None,
        monitoring: Monitoring = UNMONITORED,
    ) -> None:
        self._bundles = {name: Bundle.of(found) for name, found in locate_bundles(bundle, *bundles).items()}
        self._default = next(iter(self._bundles))
        self._placed = {"device": device, "dtype": dtype}
        self._num_threads, self._limits, self._on_use, self._monitoring = num_threads, limits, on_use, monitoring
        self._replica = secrets.token_hex(4)
        self._pool: ModelPool[ModelT] = ModelPool(
            lambda name: self._load(self._bundles[name]), self._unload, max_loaded=max_loaded
        )
        self._pool.add(self._default, self._load(self._bundles[self._default]))
        self._meter = monitoring.meter
        self._spans = open_spans(monitoring.tracing, service=type(self).__name__)
        self._work_meter = WorkMeter()
        self._work = Work(left=0, taken=0, rate=0, per_edit=0)
        self._sampler = None if monitoring.meter is unmetered else Sampler(self._all_samples, monitoring.meter)

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

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What `WorkPolicy` goes by, as Serve wants it."""
        self._work = self._look_at_work()
        return asdict(self._work)

    def close(self) -> None:
        """Ends all threads."""
        if self._sampler is not None:
            self._sampler.close()
        self._pool.close()

    @abstractmethod
    def _load(self, bundle: Bundle) -> ModelT: ...

    def _unload(self, model: ModelT) -> None:
        """Frees what garbage collection does not."""

    @abstractmethod
    def _look_at_work(self) -> Work: ...

    @abstractmethod
    def _samples(self) -> Iterator[Sample]:
        """Figures of this moment."""

    def _all_samples(self) -> Iterator[Sample]:
        yield LOADED_BUNDLES, len(self._pool.models()), {}
        yield WORK_LEFT, self._work.left, {}
        yield WORK_RATE, self._work.rate, {}
        yield from self._samples()

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
