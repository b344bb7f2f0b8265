"""All that a replica of the ingress opens beside its backend."""

from dataclasses import dataclass, field

from mgie.bundle.embedded import cache_folder
from serving.access.keys import KeyRing, open_keys
from serving.args import ServingArgs
from serving.edits.safety import SafetyCheck, load_check
from serving.jobs.runner import JobSettings
from serving.jobs.webhooks import webhook_settings
from serving.storage.artifacts import ArtifactStore
from serving.telemetry.tracing import NO_SPANS, Spans, open_spans


@dataclass(frozen=True, kw_only=True)
class Opened:
    """What stands behind names in the arguments of a service."""

    store: ArtifactStore
    "where results and jobs are kept"
    keys: KeyRing | None = None
    "who may use the service; None: everybody"
    jobs: JobSettings = field(default_factory=JobSettings)
    "how jobs are run"
    safety_check: SafetyCheck | None = None
    spans: Spans = NO_SPANS
    "makes the spans of edits"

    @classmethod
    def of(cls, args: ServingArgs) -> "Opened":
        """Opens and tries all of it.

        Raises:
            ConfigError: A key, a webhook host or its secret, the safety check or the address of traces is wrong.
            StoreError: The store cannot be used.
        """
        store = ArtifactStore.open(args.artifacts or str(cache_folder() / "results"), ttl_s=args.artifacts_ttl_s)
        store.check()
        return cls(
            store=store,
            keys=open_keys(args.keys_file, num_sharing=args.ingress_replicas),
            jobs=JobSettings(
                timeout_s=args.job_timeout_s,
                max_running=args.max_running_jobs,
                max_queued=args.max_queued_jobs,
                lease_s=args.job_lease_s,
                webhooks=webhook_settings(
                    args.webhook_hosts, secret_file=args.webhook_secret_file, give_up_s=args.webhook_give_up_s
                ),
            ),
            safety_check=None if args.safety_check is None else load_check(args.safety_check),
            spans=open_spans(args.tracing, service="Ingress"),
        )
