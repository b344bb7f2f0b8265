"""The arguments of the application: every field is a `key=value` of `serve run serving.app`."""

from difflib import get_close_matches
from typing import Any, Literal

import click
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from mgie.config import MAX_INSTRUCTION_CHARS, MAX_RESULTS, MAX_STEPS, ImageLimits
from mgie.errors import ConfigError
from mgie.inference.condition_cache import DEFAULT_CACHE_BYTES
from serving.access.limits import EditLimits
from serving.edits.service import BATCH_PATIENCE_S
from serving.errors import quoted
from serving.storage.artifacts import MIN_TTL_S


class ArgumentError(ConfigError, click.ClickException):
    """A service cannot be started with its arguments.

    `serve run` is made of click, which tells such an error in one line and ends with status 2.
    """

    exit_code = 2


class ServingArgs(BaseModel):
    """Arguments of the application builder.

    Raises:
        ArgumentError: A name or a value is not allowed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    bundle: str = Field("tiny", description="Folder, hub id, s3:// address, or the name of an embedded bundle")
    bundles: tuple[str, ...] = Field(
        (), description="More of them, separated by commas, that edits may ask for by `model`; loaded on demand"
    )
    max_loaded: int = Field(2, ge=1, description="Bundles that a stage replica holds in memory at a time")
    device: str = Field("auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="auto, cpu, mps, cuda or cuda:N")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field("auto", description="Of the models' weights")
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

    job_timeout_s: float = Field(
        3600.0, gt=0, description="Time from the acceptance of a job until it is given up, unless it asks for less"
    )
    max_running_jobs: int = Field(4, ge=1, description="Jobs that one ingress replica runs at a time")
    max_queued_jobs: int = Field(10_000, ge=1, description="Jobs that have not ended; more get status 429")
    job_lease_s: float = Field(
        6.0, ge=1, description="How long a job is left to a replica of which nothing is heard; then another runs it"
    )
    webhook_hosts: tuple[str, ...] = Field(
        (), description="Whom jobs may call at their end: host or host:port, separated by commas; none: nobody"
    )
    webhook_secret_file: str | None = Field(
        None, description="File with the secret that signs webhooks (whsec_...); none: variable MGIE_WEBHOOK_SECRET"
    )
    webhook_give_up_s: float = Field(
        21_600.0, gt=0, description="How long after the end of a job its webhook is tried again"
    )

    keys_file: str | None = Field(
        None,
        description="API keys, a TOML file that every ingress replica can read, followed when it changes; none, and no "
        "environment variable MGIE_API_KEYS with the same text: the service is open to everybody",
    )
    max_steps: int = Field(100, ge=1, le=MAX_STEPS, description="Most denoising steps of an edit")
    max_n: int = Field(MAX_RESULTS, ge=1, le=MAX_RESULTS, description="Most results of an edit")
    max_prompt_chars: int = Field(
        MAX_INSTRUCTION_CHARS, ge=1, le=MAX_INSTRUCTION_CHARS, description="Longest prompt, and expressive instruction"
    )
    batch_patience_s: float = Field(
        BATCH_PATIENCE_S,
        ge=0,
        description="So much later an interactive edit may come and still pass a batch edit in a stage's line",
    )

    log_format: Literal["json", "text"] = Field(
        "json", description="Of the replicas' log files; json for those that search them, text for those that read them"
    )
    log_prompts: bool = Field(
        default=False, description="Write the words of users into the logs, and all that exceptions say"
    )

    ingress_replicas: int = Field(1, ge=1, description="Replicas of the ingress, which does no heavy work")

    mllm_num_gpus: float = Field(0.0, ge=0, description="GPUs of one MLLM replica; may be a fraction")
    # Small by default: everything, with two replicas of each stage, starts on two CPUs.
    mllm_num_cpus: float = Field(0.2, ge=0, description="CPUs that Ray sets aside for one MLLM replica")
    mllm_num_threads: int = Field(1, ge=1, description="Threads of torch in one MLLM replica")
    mllm_resource: str | None = Field(None, description="Custom resource of the nodes that may run the MLLM stage")
    mllm_max_batch_size: int = Field(8, ge=1, description="Largest MLLM batch")
    mllm_cache_bytes: int = Field(
        DEFAULT_CACHE_BYTES, ge=0, description="Memory of one MLLM replica for conditions that may be asked for again"
    )
    mllm_min_replicas: int = Field(1, ge=0, description="Fewest MLLM replicas")
    mllm_max_replicas: int = Field(2, ge=1, description="Most MLLM replicas")
    mllm_clear_s: float = Field(
        5.0, gt=0, description="In which the work that waits for the MLLM should be done; else replicas are added"
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
    diffusion_clear_s: float = Field(
        20.0, gt=0, description="In which the work that waits for the diffusion should be done; else replicas are added"
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
    cold_start_s: float = Field(
        20.0, ge=0, description="A guess of how long a new replica takes to come; what is seen replaces it"
    )
    health_check_period_s: float = Field(2.0, gt=0, description="How soon a dead replica is noticed and replaced")
    health_probe_period_s: float = Field(
        10.0, gt=0, description="How often a stage replica with nothing to do shows by a small edit that it works"
    )
    health_probe_timeout_s: float = Field(
        30.0, gt=0, description="When such an edit is taken to hang; the replica is replaced after three failed checks"
    )
    tracing: str | None = Field(
        None,
        description="Where the spans of edits go: an address that takes OTLP over HTTP (http://host:4318/v1/traces), or "
        "console, the replicas' logs; none: there are none",
    )
    max_surge_percent: int = Field(
        100,
        ge=0,
        le=100,
        description="Replicas that a roll-out may start before old ones stop, of those there are; 0 where there is no "
        "room for more: then edits wait meanwhile",
    )

    @field_validator("bundles", "webhook_hosts", mode="before")
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

    @model_validator(mode="after")
    def _check_times(self) -> "ServingArgs":
        # The photo of a job must still be there when the job is run.
        if self.job_timeout_s > self.artifacts_ttl_s:
            raise ValueError(
                f"job_timeout_s is {self.job_timeout_s:g}; it must be at most artifacts_ttl_s, {self.artifacts_ttl_s:g}"
            )
        return self

    @model_validator(mode="wrap")  # the last of them: outside of all others
    @classmethod
    def _in_one_line(cls, values: Any, check: ModelWrapValidatorHandler["ServingArgs"]) -> "ServingArgs":
        try:
            return check(values)
        except ValidationError as error:
            raise ArgumentError(_told(error.errors(include_url=False)[0])) from None

    @property
    def edit_limits(self) -> EditLimits:
        """What one edit may ask for."""
        return EditLimits(max_steps=self.max_steps, max_n=self.max_n, max_prompt_chars=self.max_prompt_chars)

    @property
    def limits(self) -> ImageLimits:
        """What an input image may be."""
        return ImageLimits(max_bytes=self.max_image_bytes, max_pixels=self.max_image_pixels)


def _told(problem: ErrorDetails) -> str:
    """One sentence: the argument, its value, what is allowed."""
    if problem["type"] == "value_error":  # of a validator above
        return str(problem["ctx"]["error"])
    name = str(problem["loc"][0])
    if problem["type"] == "extra_forbidden":
        similar = get_close_matches(name, ServingArgs.model_fields, n=1)
        hint = f"did you mean {similar[0]}?" if similar else "serving/args.py describes them all"
        return f"there is no setting {quoted(name)}; {hint}"
    allowed = problem["msg"].replace("Input should be", "it must be")
    if problem["type"] == "string_pattern_mismatch":
        allowed = f"it must be {ServingArgs.model_fields[name].description}"
    return f"{name} is {quoted(problem['input'])}; {allowed}"
