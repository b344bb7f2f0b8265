"""The arguments of the application: every field is a `key=value` of `serve run serving.app`."""

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from mgie.config import ImageLimits
from serving.artifacts import MIN_TTL_S
from serving.mllm_stage import DEFAULT_CACHE_BYTES


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
