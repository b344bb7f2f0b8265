"""What the two stages are asked, and what they answer: records that travel between processes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field

from mgie.config import EditSettings
from mgie.engine.handle import EditRun, EngineStats
from mgie.images.files import OutputFormat
from mgie.inference.condition_cache import ConditionCacheStats
from mgie.inference.words import DerivedWords
from serving.stages.batcher import BatcherStats, BatchRun
from serving.telemetry.tracing import Trace


@dataclass(frozen=True, kw_only=True)
class PackedTensor:
    """A tensor as bytes; see `packing.py`."""

    data: bytes
    shape: tuple[int, ...]
    dtype: str
    "number format by torch's name: float16"


@dataclass(frozen=True, kw_only=True)
class Derived(DerivedWords):
    """What the MLLM stage hands on: an `EditCondition` whose tensors are bytes, and how it came to be."""

    condition: PackedTensor
    "conditioning of the UNet, [Q, C]"
    null_condition: PackedTensor
    "conditioning that means `no words`, [Q, C]"
    replica: str
    "random name of the stage object"
    run: BatchRun | None
    "None: it was in the cache, or was being derived for an equal edit"


@dataclass(frozen=True, kw_only=True)
class EditOptions:
    """All that both stages are asked of an edit, beside its pictures; the record of a job holds the same."""

    model: str | None = None
    "name of the bundle; None: the default"
    instruction: str
    "the user's words"
    expressive: str | None = None
    "expressive instruction that the user gives; None: it is derived"
    overrides: Mapping[str, Any] = field(default_factory=dict)
    "settings that differ from the bundle's defaults, by field name of EditSettings"
    seed: int
    "seed of the first image; image i has seed + i"
    n: int = 1
    "images, 1 to 10"
    deterministic: bool = False
    "the same bits on this machine whoever shares the batches"
    num_partials: int = 0
    "pictures of the first image on its way; only a stream shows them"
    output_format: OutputFormat = "png"
    output_quality: int | None = None
    "0 to 100 for jpeg and webp; None: the default"
    output_wh: tuple[int, int] | None = None
    "size that the results are scaled to; None: the photo's"
    keeps_lossless: bool = False
    "make the results as PNG, too, and keep them"
    queue_delay_s: Annotated[float, Field(alias="patience_s")] = 0.0  # its name in the records of jobs
    "in each line it lets those pass that come so much later, and nobody after them"
    trace: Trace = field(default_factory=dict)
    "trace to which the edit belongs"


@dataclass(frozen=True, kw_only=True)
class Partial:
    """What the first image is going to be."""

    data: bytes
    "encoded as the result"
    number: int
    "from 0"
    width: int
    height: int


@dataclass(frozen=True, kw_only=True)
class RenderedEdit:
    """The result of the diffusion stage."""

    images: list[bytes]
    "encoded, in the order of their seeds"
    lossless: list[bytes]
    "the same as PNG, if asked for"
    width: int
    height: int
    work_wh: tuple[int, int]
    "size the diffusion model worked at"
    settings: EditSettings
    "all settings, the bundle's defaults filled in"
    replica: str
    "random name of the stage object"
    run: EditRun


@dataclass(frozen=True, kw_only=True)
class BundleInfo:
    """What clients may know of the bundle that a stage serves."""

    name: str
    identity: str
    trained: bool
    made_by: str
    work_area_px: int
    defaults: Mapping[str, Any]
    "fields of EditSettings"
    examples: tuple[str, ...] = ()
    "instructions that it can follow"


@dataclass(frozen=True, kw_only=True)
class StageStats:
    """One stage object: who it is and what it did."""

    replica: str
    pid: int
    loaded: tuple[str, ...]
    "names of the bundles in memory, the one used last at the end"
    work: BatcherStats | EngineStats
    cache: ConditionCacheStats | None = None
    "limits of the MLLM stage"
