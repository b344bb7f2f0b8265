"""Settings that several jobs have, with their flags and checks."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mgie.config import MAX_SEED, Sampler, check_range
from mgie.errors import ConfigError

_SAMPLING = ("steps", "guidance_scale", "image_guidance_scale", "sampler", "detail_transfer")


@dataclass(frozen=True, kw_only=True)
class ClusterSettings:
    """Settings of every job that runs on a cluster."""

    endpoint: str | None = None
    "address of an S3 store that is not Amazon's; default: AWS_ENDPOINT_URL"
    cluster_grows: bool = False
    "the cluster adds nodes on demand: do not refuse to start because it is too small now"


@dataclass(frozen=True, kw_only=True)
class LedgerSettings(ClusterSettings):
    """Settings of jobs that run models over rows and write a ledger."""

    device: str = "auto"
    "auto, cpu or cuda"
    dtype: str = "auto"
    "auto, float32, bfloat16 or float16; T5 is never float16, metrics are always float32"
    rows_per_commit: int = 16
    "rows of one block, which is written whole or not at all; a kill loses at most this many for each actor"
    retry_failed: bool = False
    "try the rejected rows again, as their next attempt"
    max_rejected: float = 0.1
    "share of the rows that may be rejected without the job ending in status 4"

    def __post_init__(self) -> None:
        check_range("rows_per_commit", self.rows_per_commit, 1, 1_000_000)
        check_range("max_rejected", self.max_rejected, 0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class EditSettings(LedgerSettings):
    """Settings of jobs that edit."""

    bundle: str = "tiny"
    "who edits: embedded name, folder, hub id or s3://bucket/prefix"
    seed: int = 0
    "each row's own seed follows from this one and the row"
    steps: int | None = None
    "denoising steps; none: the bundle's"
    guidance_scale: float | None = None
    "text guidance; none: the bundle's"
    image_guidance_scale: float | None = None
    "image guidance; none: the bundle's"
    sampler: Sampler | None = None
    "sampling algorithm; none: the bundle's"
    detail_transfer: bool | None = None
    "make the change to the photo's own pixels; none: the bundle's"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("seed", self.seed, 0, MAX_SEED)

    @property
    def sampling(self) -> dict[str, Any]:
        """The sampling settings given."""
        return {name: getattr(self, name) for name in _SAMPLING}


def load_named(name: str, *, param: str, others: str = "") -> Callable[..., Any]:
    """The callable that a setting names as `module:callable`. Raises ConfigError, which names `others`, too."""
    module, _, attribute = name.partition(":")
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{param} is {name!r}; it must be {others}module:callable ({error})", param=param) from error
    return found
