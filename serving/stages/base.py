"""What the two stages have in common: bundles by name, loaded when they are asked for, and how long an edit may wait.

A stage loads only its own parts of a bundle and owns what runs the model on threads of its own. Images are decoded and
encoded on other threads, so that nothing blocks the event loop. Whoever cancels a call, or lets its time run out, frees
its place. Stages know no Ray and no HTTP: `app.py` makes them deployments, tests and benchmarks use them as they are.
Serve calls `check_health` and `record_autoscaling_stats` by their names.
"""

import asyncio
import secrets
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Generic, TypeVar

from PIL import Image

from mgie.bundle.bundle import Bundle
from mgie.bundle.resolve import locate_bundles
from mgie.config import ImageLimits
from mgie.errors import ConfigError
from mgie.images.files import read_image
from serving.stages.autoscaling import Work, WorkMeter
from serving.stages.health import Monitoring
from serving.stages.messages import BundleInfo
from serving.stages.model_pool import ModelPool
from serving.telemetry.metrics import LOADED_BUNDLES, WORK_LEFT, WORK_RATE, Sample, Sampler, unmetered
from serving.telemetry.tracing import open_spans

ModelT = TypeVar("ModelT")


def open_bundles(bundle: str, bundles: Sequence[str] = ()) -> dict[str, Bundle]:
    """The bundles by their own names, the default first; see `locate_bundles`."""
    return {name: Bundle.of(found) for name, found in locate_bundles(bundle, *bundles).items()}


class Stage(ABC, Generic[ModelT]):
    """What both stages share: the opened bundles, those of them that are loaded, a name, and how they are watched."""

    def __init__(
        self,
        bundles: Mapping[str, Bundle],
        *,
        load: Callable[[Bundle], ModelT],
        close: Callable[[ModelT], None],
        max_loaded: int,
        limits: ImageLimits,
        on_use: Callable[[str], Awaitable[object]] | None,
        monitoring: Monitoring,
    ) -> None:
        self._bundles = bundles
        self._default = next(iter(bundles))
        self._limits = limits
        self._on_use = on_use
        self._replica = secrets.token_hex(4)
        self._pool: ModelPool[ModelT] = ModelPool(lambda name: load(bundles[name]), close, max_loaded=max_loaded)
        self._pool.add(self._default, load(bundles[self._default]))
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
