"""The settings of the training job."""

from dataclasses import dataclass, field
from typing import Literal

from mgie.config import TrainingConfig
from mgie.errors import ConfigError
from pipelines.runs.settings import ClusterSettings

KeepBy = Literal["last", "loss"]


@dataclass(frozen=True, kw_only=True)
class WorkerSize:
    """How many processes train, and what each takes of the cluster."""

    num: int = 1
    "workers; one per GPU"
    max: int = 0
    "elastic: between `num` and so many, as nodes come and go; 0 = always `num`"
    num_cpus: float = 1.0
    "CPUs of one worker"
    num_gpus: float = 0.0
    "GPUs of one worker; 0 = train on CPUs"

    def __post_init__(self) -> None:
        if self.num < 1 or (self.max and self.max < self.num):
            raise ConfigError(
                f"workers are {self.num} to {self.max}; num must be at least 1, and max 0 or at least num",
                param="workers",
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig(ClusterSettings):
    """Trains a bundle on ledgers."""

    ledger: tuple[str, ...] = ("out/ledger",)
    "ledger folders, local or s3://; for ip2p, which reads no expressive instructions, manifests as well"
    weights: tuple[float, ...] = ()
    "relative shares of the ledgers in the samples; none = all rows alike often"
    out: str = "out/run"
    "folder of the run, local or s3://"
    init: str = "tiny"
    "the bundle to begin from: embedded name, folder, hub id or s3://bucket/prefix"
    cache: str | None = None
    "folder of pipelines/cache.py; none: images are encoded in each step"
    images: tuple[str, ...] = ()
    "where the images lie, one folder per ledger, if not where the ledgers say"
    validation_share: float = 0.02
    "share of the photos kept for validation, where a ledger has no rows of split val"
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(steps=100))
    "what is trained, and how; by default for some minutes, to see it work"
    workers: WorkerSize = field(default_factory=WorkerSize)
    "size of the job"
    threads: int = 0
    "CPU threads of a worker's arithmetic, on which its rounding depends; 0 = its CPUs"
    checkpoint_every: int = 100
    "steps"
    checkpoint_every_s: float = 60.0
    "and after so many seconds, but no more than a twentieth of the time; 0 = by steps alone"
    keep: int = 2
    "checkpoints that are kept; the newest always is"
    keep_by: KeepBy = "last"
    "which: the last ones, or those of the lowest validation loss"
    validate_every: int = 100
    "steps; 0 = never"
    num_validation: int = 256
    "validation rows at most"
    sample_every: int = 100
    "steps between pictures of edits; 0 = never"
    num_samples: int = 4
    "edits in a picture"
    sample_steps: int = 20
    "denoising steps of these edits"
    log_every_s: float = 5.0
    "numbers become visible after so many seconds"
    tracker: str = "tensorboard"
    "beside the files: tensorboard, none, or module:callable that makes a pipelines.training.tracking.Tracker"
    loader_threads: int = 2
    "of each worker, that read and prepare batches ahead; more for images in a store"
    max_failures: int = 3
    "times that workers or Ray's controller may die without a new checkpoint in between before the job gives up"
    elastic_check_s: float = 60.0
    "how often an elastic job looks for nodes to grow onto"

    def __post_init__(self) -> None:
        for name, values in (("weights", self.weights), ("images", self.images)):
            if values and len(values) != len(self.ledger):
                raise ConfigError(f"{name} has {len(values)} entries for {len(self.ledger)} ledgers", param=name)
        for name, least in (
            ("loader_threads", 1), ("checkpoint_every", 1), ("keep", 1), ("num_validation", 1), ("num_samples", 1), ("sample_steps", 1),
            ("validate_every", 0), ("sample_every", 0), ("max_failures", 0), ("threads", 0), ("checkpoint_every_s", 0),
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least {least}", param=name)
        if self.cache and self.training.augment.is_on:
            raise ConfigError(
                "augmentation changes the images, a cache holds them unchanged; give only one", param="cache"
            )
        if self.training.global_batch < (most := max(self.workers.num, self.workers.max)):
            raise ConfigError(
                f"global_batch is {self.training.global_batch}; each of {most} workers needs a sample",
                param="global_batch",
            )
        if not 0 <= self.validation_share < 1:
            raise ConfigError(
                f"validation_share is {self.validation_share}; it must be at least 0 and below 1",
                param="validation_share",
            )
