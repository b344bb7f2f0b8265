"""What the two stages have in common: bundles by name, loaded when they are asked for, and how long an edit may wait.

A stage loads only its own parts of a bundle and owns what runs the model on threads of its own. Images are decoded and
encoded on other threads, so that nothing blocks the event loop. Whoever cancels a call, or lets its time run out, frees
its place. Stages know no Ray and no HTTP: `app.py` makes them deployments, tests and benchmarks use them as they are.
"""

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Generic, TypeVar

from PIL import Image

from mgie.bundles import open_bundle
from mgie.checkpoint import Bundle
from mgie.config import ImageLimits
from mgie.errors import BundleError, ConfigError, DeadlineError
from mgie.images import read_image
from serving.model_pool import ModelPool
from serving.stage_calls import BundleInfo

DEFAULT_LIMITS = ImageLimits()

ModelT = TypeVar("ModelT")


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


class Stage(Generic[ModelT]):
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
async def within(timeout_s: float | None, what: str) -> AsyncIterator[None]:
    """Raises DeadlineError when the block takes longer."""
    deadline = asyncio.timeout(timeout_s)
    try:
        async with deadline:
            yield
    except TimeoutError as error:
        if not deadline.expired():
            raise  # a timeout of something else
        raise DeadlineError(f"{what} within {timeout_s:.1f} s; it was given up") from error
