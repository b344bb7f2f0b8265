"""The application: two separately autoscaled stages behind an HTTP ingress on Ray Serve. Composition only.

`serve run serving.app bundle=... device=cuda mllm_num_gpus=1 diffusion_num_gpus=1`; every `ServingArgs`
field is such a `key=value`.

The way of an edit: the ingress puts the photo into the object store once and sends the reference to both
stages; the guidance that the MLLM stage returns goes to the diffusion stage by reference too.
"""

import asyncio
import contextlib
import logging
import sys
import warnings
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from ray import serve
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError
from ray.serve.config import AutoscalingConfig
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle, DeploymentResponse

from mgie.checkpoint import required_parts
from mgie.config import DIFFUSION_PARTS, ImageLimits
from mgie.errors import EngineFullError
from mgie.tiny import cache_folder
from serving.artifacts import MIN_TTL_S, ArtifactStore
from serving.backend import (
    READY_TIMEOUT_S,
    EditBackend,
    EditEvent,
    EditOutcome,
    ServiceStats,
    StageUnavailableError,
    render_options,
    same_bundles,
    seconds_left,
)
from serving.cancels import CancelBoard
from serving.ingress import build_api
from serving.kept import KeptResults
from serving.safety import CheckedBackend, load_check
from serving.schema import EditCall
from serving.stages import (
    DEFAULT_CACHE_BYTES,
    BundleInfo,
    Derived,
    DiffusionStage,
    MLLMStage,
    RenderedEdit,
    StageStats,
    open_bundles,
)

MAX_STAGE_RETRIES = 2  # one for the replica that died, one for another that was about to
MAX_OPEN_REQUESTS = 1000  # of one ingress replica, which only waits
DRAIN_SLACK_S = 10.0  # between the deadline of an edit and the moment at which a draining replica is stopped
DRAIN_POLL_S = 0.5  # how often a draining replica looks whether it is done
RESOURCE_SHARE = 0.001  # of a node's custom resource: it marks nodes and limits nothing

logger = logging.getLogger("serving.app")

_LOST = (RayActorError, ObjectLostError)  # the replica died or is cut off; an argument was lost with its node


class ServingArgs(BaseModel):
    """Arguments of the application builder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bundle: str = Field("tiny", description="Folder, hub id, s3:// address, or the name of an embedded bundle")
    bundles: tuple[str, ...] = Field(
        (), description="More of them, separated by commas, that edits may ask for by `model`; loaded on demand"
    )
    max_loaded: int = Field(2, ge=1, description="Bundles that a stage replica holds in memory at a time")
    device: str = Field("auto", description="auto, cpu, mps, cuda or cuda:N")
    dtype: str = Field("auto", description="auto, float32, float16 or bfloat16")
    timeout_s: float = Field(
        300.0, gt=0, description="Deadline of an edit, unless it asks for less; then it is given up with status 504"
    )
    max_image_bytes: int = Field(ImageLimits().max_bytes, ge=1, description="Largest photo, encoded")
    max_image_pixels: int = Field(ImageLimits().max_pixels, ge=1, description="Largest photo, width x height")

    artifacts: str | None = Field(
        None,
        description="Where results are kept: a folder that all ingress replicas share, or s3://bucket/prefix; "
        "none: a folder in the user's cache, for a service on one machine",
    )
    artifacts_ttl_s: float = Field(86_400.0, ge=MIN_TTL_S, description="How long a result is kept")
    keep_results: bool = Field(
        default=False, description="Keep every result that no client asks not to keep; else only those asked for"
    )
    public_url: str | None = Field(
        None, description="Where clients reach the service, for addresses of results; none: as their requests say"
    )
    safety_check: str | None = Field(
        None, description="module:function that may refuse photos, instructions and results; see docs/serving.md"
    )

    ingress_replicas: int = Field(1, ge=1, description="Replicas of the ingress, which does no heavy work")

    mllm_num_gpus: float = Field(0.0, ge=0, description="GPUs of one MLLM replica; may be a fraction")
    # Small by default: everything, with two replicas of each stage, starts on two CPUs.
    mllm_num_cpus: float = Field(0.2, ge=0, description="CPUs that Ray sets aside for one MLLM replica")
    mllm_num_threads: int = Field(1, ge=1, description="Threads of torch in one MLLM replica")
    mllm_resource: str | None = Field(None, description="Custom resource of the nodes that may run the MLLM stage")
    mllm_max_batch_size: int = Field(8, ge=1, description="Largest MLLM batch")
    mllm_cache_bytes: int = Field(
        DEFAULT_CACHE_BYTES, ge=0, description="Memory of one MLLM replica for guidance that may be asked for again"
    )
    mllm_min_replicas: int = Field(1, ge=0, description="Fewest MLLM replicas")
    mllm_max_replicas: int = Field(2, ge=1, description="Most MLLM replicas")
    mllm_target_ongoing_requests: float = Field(
        8.0, gt=0, description="Edits that one MLLM replica should have; above it another is started"
    )

    diffusion_num_gpus: float = Field(0.0, ge=0, description="GPUs of one diffusion replica; may be a fraction")
    diffusion_num_cpus: float = Field(0.2, ge=0, description="CPUs that Ray sets aside for one diffusion replica")
    diffusion_num_threads: int = Field(1, ge=1, description="Threads of torch in one diffusion replica")
    diffusion_resource: str | None = Field(
        None, description="Custom resource of the nodes that may run the diffusion stage"
    )
    diffusion_max_batch_rows: int = Field(24, ge=1, description="Largest batch of the denoiser; an image takes 3 rows")
    diffusion_max_pixels_in_flight: int | None = Field(
        None, ge=1, description="Work pixels times rows that one diffusion replica holds; none: two full batches"
    )
    diffusion_max_waiting: int = Field(64, ge=0, description="Edits in line for them; more get status 429")
    diffusion_num_codec_threads: int = Field(1, ge=1, description="Threads of one diffusion replica for the VAE")
    diffusion_min_replicas: int = Field(1, ge=0, description="Fewest diffusion replicas")
    diffusion_max_replicas: int = Field(2, ge=1, description="Most diffusion replicas")
    diffusion_target_ongoing_requests: float = Field(
        8.0, gt=0, description="Edits that one diffusion replica should have; above it another is started"
    )

    max_open_edits: int = Field(
        128,
        ge=1,
        description="Edits that one ingress replica has under way; more get status 429 before any work is done for them",
    )
    max_ongoing_requests: int = Field(
        128,
        ge=1,
        description="Edits that one stage replica accepts; those beyond its batch wait inside, ready to be batched",
    )
    max_queued_requests: int = Field(
        256, ge=1, description="Edits that one ingress replica lets wait for a stage replica; more get status 429"
    )
    upscale_delay_s: float = Field(10.0, ge=0, description="How long load must last before a replica is added")
    downscale_delay_s: float = Field(300.0, ge=0, description="How long load must be gone before a replica is removed")
    look_back_period_s: float = Field(15.0, gt=0, description="Time over which the autoscaler averages the load")
    metrics_interval_s: float = Field(2.0, gt=0, description="How often the load is reported to the autoscaler")
    health_check_period_s: float = Field(2.0, gt=0, description="How soon a dead replica is noticed and replaced")

    @field_validator("bundles", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(filter(None, value.split(","))) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_replicas(self) -> "ServingArgs":
        for stage in ("mllm", "diffusion"):
            fewest, most = getattr(self, f"{stage}_min_replicas"), getattr(self, f"{stage}_max_replicas")
            if fewest > most:
                raise ValueError(f"{stage}_min_replicas is {fewest}; it must be at most {stage}_max_replicas, {most}")
            if self.device.startswith("cuda") and getattr(self, f"{stage}_num_gpus") == 0:
                raise ValueError(
                    f"device is {self.device}, but {stage}_num_gpus is 0: Ray would hide every GPU from it"
                )
        return self

    @property
    def limits(self) -> ImageLimits:
        """What an input image may be."""
        return ImageLimits(max_bytes=self.max_image_bytes, max_pixels=self.max_image_pixels)


class HandleBackend:
    """Edits through the handles of the two stages; the `EditBackend` of a running service.

    Args:
        mllm, diffusion: The stages.
        has_choice: There are several bundles: an edit goes to a replica that has its own in memory, if one is free.
        max_open: Edits under way; more are refused.
    """

    def __init__(
        self,
        mllm: DeploymentHandle[MLLMStage],
        diffusion: DeploymentHandle[DiffusionStage],
        *,
        has_choice: bool,
        max_open: int,
    ) -> None:
        self._mllm = mllm
        self._diffusion = diffusion
        self._has_choice = has_choice
        self._max_open, self._num_open = max_open, 0

    @contextlib.contextmanager
    def _admitted(self) -> Iterator[None]:
        """A place for an edit, here rather than in a stage: else the MLLM would work for edits that are refused later.

        Raises:
            EngineFullError: There is none.
        """
        if self._num_open == self._max_open:
            raise EngineFullError(f"{self._num_open} edits are under way; at most {self._max_open} may be")
        self._num_open += 1
        try:
            yield
        finally:
            self._num_open -= 1

    def _for(self, stage: DeploymentHandle[Any], call: EditCall) -> Any:
        return stage.options(multiplexed_model_id=call.model) if self._has_choice else stage

    async def _derive(self, call: EditCall, image: "ray.ObjectRef[bytes]") -> "_Called":
        return await _call(
            lambda _: self._for(self._mllm, call).derive.remote(
                image,
                call.instruction,
                call.expressive,
                model=call.model,
                deterministic=call.deterministic,
                timeout_s=seconds_left(call),
            )
        )

    async def edit(self, call: EditCall) -> EditOutcome:
        """See `EditBackend`."""
        with self._admitted():
            return await self._edit(call)

    async def _edit(self, call: EditCall) -> EditOutcome:
        image = ray.put(call.image)
        mllm = await self._derive(call, image)
        # Awaited, though a handle accepts unfinished arguments: the words are part of the answer, a failure belongs to
        # its stage, and only finished derivations may count as load of the diffusion stage. (Ray 2.60 sees to the last
        # point by itself: it queues a call when its arguments are there.)
        diffusion = await _call(
            lambda retry: self._for(self._diffusion, call).render.remote(
                image,
                # By reference. After a failure by value: the node that held the object may be gone.
                mllm.result if retry else mllm.response,
                render_options(call),
                timeout_s=seconds_left(call),
            )
        )
        return EditOutcome(
            derived=mllm.result,
            rendered=diffusion.result,
            retries={"mllm": mllm.num_retries, "diffusion": diffusion.num_retries},
        )

    async def stream(self, call: EditCall) -> AsyncGenerator[EditEvent, None]:
        """See `EditBackend`. A replica that dies under the diffusion ends the stream: half of it has been sent."""
        with self._admitted():
            async with contextlib.aclosing(self._stream(call)) as events:
                async for event in events:
                    yield event

    async def _stream(self, call: EditCall) -> AsyncGenerator[EditEvent, None]:
        image = ray.put(call.image)
        mllm = await self._derive(call, image)
        derived: Derived = mllm.result
        yield derived
        stage: Any = self._for(self._diffusion, call).options(stream=True)
        events = stage.render_stream.remote(image, mllm.response, render_options(call), timeout_s=seconds_left(call))
        try:
            async for event in events:
                yield EditOutcome(derived=derived, rendered=event) if isinstance(event, RenderedEdit) else event
        except BackPressureError as error:
            raise EngineFullError("too many edits wait for a replica; try again later") from error
        except RayTaskError as error:
            raise error.cause from None  # as in `_call`
        except _LOST as error:
            raise StageUnavailableError("the replica died under the edit") from error
        finally:
            events.cancel()

    async def models(self) -> tuple[BundleInfo, ...]:
        """See `EditBackend`."""
        mllm, diffusion = await asyncio.gather(
            _call(lambda _: self._mllm.models.remote()), _call(lambda _: self._diffusion.models.remote())
        )
        return same_bundles(mllm.result, diffusion.result)

    async def stats(self) -> ServiceStats:
        """See `EditBackend`."""
        mllm, diffusion, status = await asyncio.gather(
            _stats_of(self._mllm), _stats_of(self._diffusion), asyncio.to_thread(serve.status)
        )
        deployments = status.applications[serve.get_replica_context().app_name].deployments
        # Plain strings, though Serve's types promise its enumeration.
        replicas = {
            name: {str(getattr(state, "value", state)): number for state, number in details.replica_states.items()}
            for name, details in deployments.items()
        }
        return ServiceStats(mllm=mllm, diffusion=diffusion, replicas=replicas)


class HandleBoard:
    """The board of cancels through its handle; the `Board` of a running service."""

    def __init__(self, board: DeploymentHandle[CancelBoard]) -> None:
        self._board = board

    async def listen(self, replica: str, answers: Mapping[int, bool]) -> Sequence[tuple[int, str]]:
        """See `Board`."""
        requests: list[tuple[int, str]] = (await _call(lambda _: self._board.listen.remote(replica, answers))).result
        return requests

    async def cancel(self, edit_id: str) -> bool | None:
        """See `Board`."""
        is_cancelled: bool | None = (await _call(lambda _: self._board.cancel.remote(edit_id))).result
        return is_cancelled


@dataclass(frozen=True)
class _Called:
    result: Any
    response: DeploymentResponse[Any]
    "stands for the result as an argument, by reference"
    num_retries: int


async def _call(send: Callable[[int], Any]) -> _Called:
    """Awaits a stage call and repeats it when the replica dies under it; calls are seeded, so nothing changes.

    Args:
        send: Sends the call and returns Serve's response; gets the number of the try, from 0.

    Raises:
        StageUnavailableError: Replicas died on every try.
        EngineFullError: Too many calls wait for a replica.
        Exception: What the stage itself raised, as it raised it.
    """
    for retry in range(MAX_STAGE_RETRIES + 1):
        response: DeploymentResponse[Any] = send(retry)
        try:
            return _Called(await response, response, retry)
        except asyncio.CancelledError:
            response.cancel()  # else the stage would go on for nobody
            raise
        except BackPressureError as error:
            raise EngineFullError("too many edits wait for a replica; try again later") from error
        except RayTaskError as error:
            if not isinstance(error.cause, _LOST):
                raise error.cause from None  # Ray's wrapper would hide the class that the error table looks for
            logger.warning("a stage call lost its input and is repeated: %s", error.cause)
        except _LOST as error:
            logger.warning("a stage replica died under a call, which is repeated: %s", error)
    raise StageUnavailableError(f"replicas died under each of {MAX_STAGE_RETRIES + 1} tries")


async def _stats_of(stage: DeploymentHandle[Any]) -> StageStats | None:
    try:
        async with asyncio.timeout(READY_TIMEOUT_S):
            stats: StageStats = (await _call(lambda _: stage.stats.remote())).result
    except (TimeoutError, StageUnavailableError):
        return None
    return stats


@serve.ingress()
class Ingress:
    """The HTTP side of the application."""

    def __init__(
        self,
        args: ServingArgs,
        mllm: DeploymentHandle[MLLMStage],
        diffusion: DeploymentHandle[DiffusionStage],
        board: DeploymentHandle[CancelBoard],
    ) -> None:
        self._args = args
        self._backend: EditBackend = HandleBackend(
            mllm, diffusion, has_choice=bool(args.bundles), max_open=args.max_open_edits
        )
        if args.safety_check is not None:
            self._backend = CheckedBackend(self._backend, load_check(args.safety_check), limits=args.limits)
        self._board = HandleBoard(board)
        self._store = ArtifactStore.open(args.artifacts or str(cache_folder() / "results"), ttl_s=args.artifacts_ttl_s)
        self._store.check()  # now, rather than after the first edit that needs it

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve in the replica, after the constructor."""
        return build_api(
            self._backend,
            timeout_s=self._args.timeout_s,
            limits=self._args.limits,
            kept=KeptResults(self._store, keeps_all=self._args.keep_results),
            board=self._board,
            public_url=self._args.public_url,
            adds_request_id=False,  # Serve's proxy puts x-request-id on every answer itself
        )


def app(args: ServingArgs) -> serve.Application:
    """Builds the application; `serve run serving.app key=value ...` calls it.

    Raises:
        BundleError: A bundle cannot be opened, lacks a part that a stage needs, or has the name of another.
        ConfigError: The safety check cannot be imported.
    """
    # Here already, so that a wrong name fails at once and an embedded bundle is built before replicas race for it.
    for bundle in open_bundles(args.bundle, args.bundles).values():
        bundle.config.require((*required_parts(bundle.config), *DIFFUSION_PARTS))
    if args.safety_check is not None:
        load_check(args.safety_check)
    drain_s = args.timeout_s + DRAIN_SLACK_S  # longer than the longest edit
    common: dict[str, Any] = {
        "max_ongoing_requests": args.max_ongoing_requests,
        "graceful_shutdown_timeout_s": drain_s,
        "graceful_shutdown_wait_loop_s": DRAIN_POLL_S,
        "health_check_period_s": args.health_check_period_s,
    }

    def stage(kind: type[MLLMStage | DiffusionStage], name: str, **settings: Any) -> serve.Application:
        def given(setting: str) -> Any:
            return getattr(args, f"{name}_{setting}")

        deployment = serve.deployment(
            name=kind.__name__,
            autoscaling_config=_autoscaling(
                args,
                min_replicas=given("min_replicas"),
                max_replicas=given("max_replicas"),
                target_ongoing_requests=given("target_ongoing_requests"),
            ),
            ray_actor_options={
                "num_cpus": given("num_cpus"),
                "num_gpus": given("num_gpus"),
                "resources": {given("resource"): RESOURCE_SHARE} if given("resource") else {},
            },
            max_queued_requests=args.max_queued_requests,
            **common,
        )(kind)
        return deployment.bind(
            args.bundle,
            args.bundles,
            max_loaded=args.max_loaded,
            on_use=_tell_router(args.max_loaded) if args.bundles else None,
            device=args.device,
            dtype=args.dtype,
            num_threads=given("num_threads"),
            # The ingress has counted the bytes of uploads, and results that were kept are larger than photos are.
            limits=replace(args.limits, max_bytes=sys.maxsize),
            **settings,
        )

    # One for all; a long poll of each ingress replica is always open, so that it never drains.
    board = serve.deployment(
        name="CancelBoard",
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=MAX_OPEN_REQUESTS,
        graceful_shutdown_timeout_s=DRAIN_POLL_S,
        graceful_shutdown_wait_loop_s=DRAIN_POLL_S,
        health_check_period_s=args.health_check_period_s,
    )(CancelBoard)
    ingress = serve.deployment(
        name="Ingress",
        num_replicas=args.ingress_replicas,
        ray_actor_options={"num_cpus": 0},
        **common | {"max_ongoing_requests": MAX_OPEN_REQUESTS},
    )(Ingress)
    return ingress.bind(
        args,
        stage(MLLMStage, "mllm", max_batch_size=args.mllm_max_batch_size, cache_bytes=args.mllm_cache_bytes),
        stage(
            DiffusionStage,
            "diffusion",
            max_batch_rows=args.diffusion_max_batch_rows,
            max_pixels_in_flight=args.diffusion_max_pixels_in_flight,
            max_waiting=args.diffusion_max_waiting,
            num_codec_threads=args.diffusion_num_codec_threads,
        ),
        board.bind(),
    )


def _tell_router(max_loaded: int) -> Callable[[str], Awaitable[str]]:
    """Tells Serve's router which bundles a replica has used last.

    Serve's own loader would close a model under the edits that use it, so the stage's pool holds the models, and
    Serve holds their names only. Where the two differ for a moment, an edit costs a load, no more.
    """

    async def use(name: str) -> str:
        return name

    told: Callable[[str], Awaitable[str]] = serve.multiplexed(max_num_models_per_replica=max_loaded)(use)
    return told


def _autoscaling(args: ServingArgs, **stage: Any) -> AutoscalingConfig:
    with warnings.catch_warnings():
        # Announced to become an environment variable, which Ray 2.60 does not read yet: can go when it does.
        warnings.filterwarnings("ignore", message="The `metrics_interval_s` field", category=DeprecationWarning)
        return AutoscalingConfig(
            upscale_delay_s=args.upscale_delay_s,
            downscale_delay_s=args.downscale_delay_s,
            look_back_period_s=args.look_back_period_s,
            metrics_interval_s=args.metrics_interval_s,
            **stage,
        )
