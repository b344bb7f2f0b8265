"""The HTTP application that the arguments of a service ask for, and all that has to be opened for it."""

from dataclasses import dataclass

from fastapi import FastAPI

from mgie.bundle.embedded import cache_folder
from serving.access.keys import KeyRing, open_keys
from serving.api.routes import build_api
from serving.args import ServingArgs
from serving.edits.backend import EditBackend
from serving.edits.cancellation import Board
from serving.edits.results import ResultStore
from serving.edits.safety import CheckedBackend, SafetyCheck, load_check
from serving.jobs.runner import JobSettings
from serving.jobs.store import JobStore
from serving.jobs.webhooks import WebhookSettings, webhook_settings
from serving.storage.artifacts import ArtifactStore
from serving.telemetry.metrics import Meter, unmetered
from serving.telemetry.tracing import Spans, open_spans


@dataclass(frozen=True, kw_only=True)
class Opened:
    """What a replica of the ingress holds beside its backend."""

    store: ArtifactStore
    keys: KeyRing | None
    webhooks: WebhookSettings | None
    safety_check: SafetyCheck | None
    spans: Spans

    @classmethod
    def of(cls, args: ServingArgs) -> "Opened":
        """Opens and tries all of it.

        Raises:
            ConfigError: A key, a webhook host or its secret, the safety check or the address of traces is wrong.
            StoreError: The store of results cannot be used.
        """
        store = ArtifactStore.open(args.artifacts or str(cache_folder() / "results"), ttl_s=args.artifacts_ttl_s)
        store.check()
        return cls(
            store=store,
            keys=open_keys(args.keys_file, num_sharing=args.ingress_replicas),
            webhooks=webhook_settings(
                args.webhook_hosts, secret_file=args.webhook_secret_file, give_up_s=args.webhook_give_up_s
            ),
            safety_check=None if args.safety_check is None else load_check(args.safety_check),
            spans=open_spans(args.tracing, service="Ingress"),
        )


def configured_api(
    args: ServingArgs,
    backend: EditBackend,
    *,
    board: Board | None = None,
    meter: Meter = unmetered,
    adds_request_id: bool = True,
) -> FastAPI:
    """The application; arguments as those of `build_api`, errors as those of `Opened.of`."""
    opened = Opened.of(args)
    if opened.safety_check is not None:
        backend = CheckedBackend(backend, opened.safety_check, limits=args.limits)
    return build_api(
        backend,
        timeout_s=args.timeout_s,
        limits=args.limits,
        kept=ResultStore(opened.store, keeps_all=args.keep_results),
        jobs=JobStore(opened.store, limits=args.limits),
        job_settings=JobSettings(
            timeout_s=args.job_timeout_s,
            max_running=args.max_running_jobs,
            max_queued=args.max_queued_jobs,
            lease_s=args.job_lease_s,
            webhooks=opened.webhooks,
        ),
        board=board,
        public_url=args.public_url,
        adds_request_id=adds_request_id,
        meter=meter,
        spans=opened.spans,
        keys=opened.keys,
        edit_limits=args.edit_limits,
        batch_patience_s=args.batch_patience_s,
        logs_prompts=args.log_prompts,
    )
