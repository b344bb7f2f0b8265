"""The application: two separately autoscaled stages behind an HTTP ingress on Ray Serve. Composition only.

`serve run serving.app bundle=... device=cuda mllm_num_gpus=1 diffusion_num_gpus=1`; every `ServingArgs`
field is such a `key=value`.
"""

import sys
import warnings
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.config import AutoscalingConfig
from ray.serve.handle import DeploymentHandle

from mgie.checkpoint import required_parts
from mgie.config import DIFFUSION_PARTS
from mgie.tiny import cache_folder
from serving.args import ServingArgs
from serving.artifacts import ArtifactStore
from serving.backend import EditBackend
from serving.cancels import CancelBoard
from serving.diffusion_stage import DiffusionStage
from serving.handles import HandleBackend, HandleBoard
from serving.ingress import build_api
from serving.kept import KeptResults
from serving.mllm_stage import MLLMStage
from serving.safety import CheckedBackend, load_check
from serving.stage import open_bundles

MAX_OPEN_REQUESTS = 1000  # of one ingress replica, which only waits
DRAIN_SLACK_S = 10.0  # between the deadline of an edit and the moment at which a draining replica is stopped
DRAIN_POLL_S = 0.5  # how often a draining replica looks whether it is done
RESOURCE_SHARE = 0.001  # of a node's custom resource: it marks nodes and limits nothing


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
