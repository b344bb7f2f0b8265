"""The application: two separately autoscaled stages behind an HTTP ingress on Ray Serve. Composition only.

`serve run serving.app bundle=... device=cuda mllm_num_gpus=1 diffusion_num_gpus=1`; every `ServingArgs`
field is such a `key=value`.
"""

import logging
import sys
import warnings
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from ray import serve
from ray.serve import metrics as exporter
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from mgie.bundle.record import required_parts
from mgie.bundle.resolve import locate_bundles
from mgie.config import DIFFUSION_PARTS
from mgie.errors import ConfigError, MGIEError
from serving.api.opened import Opened
from serving.api.routes import build_api
from serving.args import ArgumentError, ServingArgs
from serving.edits.cancellation import CancelBoard
from serving.ray_backend import HandleBackend, HandleBoard
from serving.stages.autoscaling import WorkPolicy
from serving.stages.health import Monitoring
from serving.telemetry.logs import configure_logs
from serving.telemetry.metrics import Metric

if TYPE_CHECKING:
    from serving.stages.diffusion import DiffusionStage
    from serving.stages.mllm import MLLMStage

MAX_OPEN_REQUESTS = 1000  # of one ingress replica, which only waits
DRAIN_SLACK_S = 10.0  # between the deadline of an edit and the moment at which a draining replica is stopped
DRAIN_POLL_S = 0.5  # how often a draining replica looks whether it is done
HEALTH_SLACK_S = 10.0  # so much later than a stage itself does Serve take a probe of it to hang
SERVE_LOGGER = "ray.serve"  # whose files and format the replicas of an application share
RESOURCE_SHARE = 0.001  # of a node's custom resource: it marks nodes and limits nothing


class RayMeter:
    """The `Meter` of a replica: writes to the exporter of its node."""

    def __init__(self) -> None:
        self._writers: dict[str, Callable[[float, dict[str, str]], None]] = {}

    def __call__(self, metric: Metric, value: float = 1.0, **tags: str) -> None:
        """See `Meter`."""
        # Made in the replica, at the first use, or it would lack the replica's tags.
        write = self._writers.get(metric.name) or self._writers.setdefault(metric.name, _writer(metric))
        write(value, tags)


def _writer(metric: Metric) -> Callable[[float, dict[str, str]], None]:
    kinds = {"counter": exporter.Counter, "gauge": exporter.Gauge, "histogram": exporter.Histogram}
    settings = {"boundaries": list(metric.boundaries)} if metric.kind == "histogram" else {}
    one = kinds[metric.kind](metric.name, description=metric.help, tag_keys=metric.tags, **settings)
    write: Callable[[float, dict[str, str]], None] = getattr(
        one, {"counter": "inc", "gauge": "set", "histogram": "observe"}[metric.kind]
    )
    return write


@serve.ingress()
class Ingress:
    """The HTTP side of the application."""

    def __init__(
        self,
        args: ServingArgs,
        mllm: "DeploymentHandle[MLLMStage]",
        diffusion: "DeploymentHandle[DiffusionStage]",
        board: DeploymentHandle[CancelBoard],
    ) -> None:
        configure_logs(logging.getLogger(SERVE_LOGGER), shows_words=args.log_prompts)
        meter = RayMeter()
        backend = HandleBackend(
            mllm,
            diffusion,
            max_open=args.max_open_edits,
            may_sleep=0 in (args.mllm_min_replicas, args.diffusion_min_replicas),
            meter=meter,
        )
        # Serve's proxy puts x-request-id on every answer itself.
        self._api = build_api(
            backend, args, Opened.of(args), board=HandleBoard(board), meter=meter, adds_request_id=False
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve in the replica, after the constructor."""
        return self._api


def app(args: ServingArgs) -> serve.Application:
    """Builds the application; `serve run serving.app key=value ...` calls it.

    Raises:
        ArgumentError: A bundle cannot be opened or served, the store of results cannot be used, or the safety check,
            the keys, a webhook host or its secret is wrong.
    """
    try:
        _check(args)
    except MGIEError as error:
        raise ArgumentError(str(error), param=error.param) from error
    # Here, because they need torch: this file is imported by the ingress and the board, which pass on words and bytes.
    from serving.stages.diffusion import DiffusionStage
    from serving.stages.mllm import MLLMStage

    drain_s = args.timeout_s + DRAIN_SLACK_S  # longer than the longest edit
    common: dict[str, Any] = {
        "max_ongoing_requests": args.max_ongoing_requests,
        "graceful_shutdown_timeout_s": drain_s,
        "graceful_shutdown_wait_loop_s": DRAIN_POLL_S,
        "health_check_period_s": args.health_check_period_s,
        "health_check_timeout_s": args.health_probe_timeout_s + HEALTH_SLACK_S,
        "max_surge_percent": args.max_surge_percent,
    }

    logging_config = LoggingConfig(encoding=args.log_format.upper())

    def stage(kind: "type[MLLMStage | DiffusionStage]", name: str, **settings: Any) -> serve.Application:
        def given(setting: str) -> Any:
            return getattr(args, f"{name}_{setting}")

        deployment = serve.deployment(
            name=kind.__name__,
            autoscaling_config=_autoscaling(
                args,
                min_replicas=given("min_replicas"),
                max_replicas=given("max_replicas"),
                policy=AutoscalingPolicy(
                    policy_function=WorkPolicy,
                    policy_kwargs={"clear_s": given("clear_s"), "cold_start_s": args.cold_start_s},
                ),
            ),
            ray_actor_options={
                "num_cpus": given("num_cpus"),
                "num_gpus": given("num_gpus"),
                "resources": {given("resource"): RESOURCE_SHARE} if given("resource") else {},
            },
            max_queued_requests=args.max_queued_requests,
            logging_config=logging_config,
            **common,
        )(_logged(kind, args))
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
            monitoring=Monitoring(
                meter=RayMeter(),
                probe_period_s=args.health_probe_period_s,
                probe_timeout_s=args.health_probe_timeout_s,
                tracing=args.tracing,
            ),
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
        logging_config=logging_config,
    )(_logged(CancelBoard, args))
    ingress = serve.deployment(
        name="Ingress",
        num_replicas=args.ingress_replicas,
        ray_actor_options={"num_cpus": 0},
        # Our own line of a request says more than Serve's.
        logging_config=logging_config.model_copy(update={"enable_access_log": False}),
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


def _check(args: ServingArgs) -> None:
    """Tries all that replicas will open: what is wrong is told at once, and before Ray starts anything.

    An embedded bundle is built here, before replicas race for it.
    """
    for bundle in locate_bundles(args.bundle, *args.bundles).values():
        bundle.config.require((*required_parts(bundle.config), *DIFFUSION_PARTS))
        name, steps = bundle.config.name, bundle.config.defaults.steps
        if steps > args.max_steps:
            raise ConfigError(f"max_steps is {args.max_steps}; bundle {name!r} takes {steps} by default")
    Opened.of(args)


def _logged(kind: type[Any], args: ServingArgs) -> type[Any]:
    """A class that sets up the logs of its replica first."""

    def __init__(self: Any, *given: Any, **settings: Any) -> None:  # noqa: N807
        configure_logs(logging.getLogger(SERVE_LOGGER), shows_words=args.log_prompts)
        kind.__init__(self, *given, **settings)

    return type(kind.__name__, (kind,), {"__init__": __init__, "__doc__": kind.__doc__})


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
