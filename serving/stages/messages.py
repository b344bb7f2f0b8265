"""What the two stages are asked, and what they answer: records that travel between processes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mgie.config import EditSettings
from mgie.engine.handle import EditRun, EngineStats
from mgie.images.files import OutputFormat
from mgie.inference.condition_cache import ConditionCacheStats
from serving.stages.batcher import BatcherStats, BatchRun
from serving.telemetry.tracing import Trace


@dataclass(frozen=True, kw_only=True)
class PackedTensor:
    """A tensor as bytes; see `packing.py`."""

    data: bytes
    shape: tuple[int, ...]
    dtype: str
    "by torch's name: float16"


@dataclass(frozen=True, kw_only=True)
class Derived:
    """What the MLLM stage hands on: the fields of an `EditCondition`, and how it came to be."""

    expressive: str
    "the expressive instruction; empty where the model wrote none"
    used_fallback: bool
    "the model gave no usable visual tokens, so states of other tokens stand in: the edit may ignore the words"
    prompt_tokens: int
    "text tokens of the prompt"
    image_tokens: int
    "image features in the prompt"
    output_tokens: int
    "tokens generated"
    bundle: str
    "identity of the bundle that derived it"
    condition: PackedTensor
    "conditioning of the UNet, [Q, C]"
    null_condition: PackedTensor
    "conditioning that means `no words`, [Q, C]"
    replica: str
    "random name of the stage object"
    run: BatchRun | None
    "None: it was in the cache, or was being derived for an equal edit"


@dataclass(frozen=True, kw_only=True)
class RenderOptions:
    """What the diffusion stage is asked to do."""

    model: str | None = None
    "name of the bundle; None = the default"
    seed: int
    "of the first image; image i has seed + i"
    overrides: Mapping[str, Any] = field(default_factory=dict)
    "settings that differ from the bundle's defaults, by field name of EditSettings"
    n: int = 1
    "images, 1 to 10"
    mask: bytes | None = None
    "PNG of the photo's size, transparent where it may be edited; None = everywhere"
    deterministic: bool = False
    "the same bits on this machine whoever shares the engine"
    queue_delay_s: float = 0.0
    "in line it lets those pass that come so much later, and nobody after them"
    num_partials: int = 0
    "pictures of the first image on its way; only a stream shows them"
    output_format: OutputFormat = "png"
    output_quality: int | None = None
    "0 to 100 for jpeg and webp; None for the default"
    output_wh: tuple[int, int] | None = None
    "size that the results are scaled to; None = the photo's"
    keeps_lossless: bool = False
    "return the results as PNG, too"
    trace: Trace = field(default_factory=dict)
    "to which the call belongs"


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
    "of the MLLM stage"
